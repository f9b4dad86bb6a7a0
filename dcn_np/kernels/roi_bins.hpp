// What the kernels of the pooling over regions share: a warp has a bin at a time, its threads the channels.
//
// DCN_T: what images and results are stored in. A bin is located by one thread, its lines of pixels by a warp, a
// few at a time; no value of a region or an offset makes a kernel read or write outside the images.
#pragma once

#include "integers.hpp"
#include "roi_arguments.hpp"
#include "roi_sampling.hpp"
#include "scalar.hpp"

namespace dcn {
namespace {

using T = DCN_T;
using R = Sum<T>;

constexpr int kThreads = 256;
constexpr int kWarp = 32;
constexpr int kBins = kThreads / kWarp;        // of a block
constexpr int kPerThread = 16 / sizeof(R);     // channels
constexpr int kChannels = kPerThread * kWarp;  // of a warp
constexpr int kLines = kWarp / 2;              // of an axis at a time: a thread locates a row or a column

DCN_INLINE int lane() { return static_cast<int>(threadIdx.x) % kWarp; }

DCN_INLINE char* place(const Array& array, int64_t batch, int64_t channel, int64_t row, int64_t column) {
  return array.data + batch * array.batch + channel * array.channel + row * array.axis[0] +
         column * array.axis[1];
}

// Of regions, offsets or masks.
DCN_INLINE double number_at(const char* at, bool is_float) {
  if (is_float) return widened(load(reinterpret_cast<const float*>(at)));
  return widened(load(reinterpret_cast<const T*>(at)));
}
DCN_INLINE void put_number(char* at, bool is_float, R value) {
  if (is_float) return store(reinterpret_cast<float*>(at), static_cast<float>(value));
  store(reinterpret_cast<T*>(at), value);
}

// ---- locate

// One axis of a bin.
struct AxisOfBin {
  RoIAxis axis;
  double base;
  double samples;        // what the axis contributes to the number of samples of the average
  int64_t first, count;  // the lines of pixels that samples can touch

  DCN_INLINE void move_to(double to) {
    base = to;
    samples = axis.counts_all ? axis.samples : static_cast<double>(inside());
    const double last = static_cast<double>(axis.extent - 1);
    const double a = axis.coordinate(base, 0), b = axis.coordinate(base, axis.samples - 1);
    const double low = a < b ? a : b, high = a < b ? b : a;
    if (!(axis.extent > 0 && high >= -axis.margin && low <= last + axis.margin)) return;
    first = low < 0 ? 0 : low > last ? axis.extent - 1 : static_cast<int64_t>(low);
    count = (high < last ? static_cast<int64_t>(high < 0 ? 0 : high) + 1 : axis.extent - 1) - first + 1;
  }

 private:
  DCN_INLINE int64_t inside() const {
    const RoISpan span = roi_span(axis, base);
    int64_t number = 0;
    for (int64_t i = 0; i < span.count; ++i)
      number += roi_sample(axis, axis.coordinate(base, span.first + static_cast<double>(i))).inside;
    return number;
  }
};

// A row or a column of pixels as a bin sees it.
struct Line {
  R weight;  // sum over the samples of the weight of this line
  R slope;   // sum over the samples of the derivative of that weight by the coordinate

  Line() = default;
  DCN_INLINE Line(const AxisOfBin& bin, int64_t index) {
    const RoIAxis& axis = bin.axis;
    const double at = static_cast<double>(index);
    const double from = index > 0 ? at - 1 : -axis.margin;
    const double to = index + 1 < axis.extent ? at + 1 : at + axis.margin;
    const RoISpan span = roi_span(axis, bin.base, from, to);
    double weights = 0, slopes = 0;
    for (int64_t i = 0; i < span.count; ++i) {
      const RoISample sample =
          roi_sample(axis, axis.coordinate(bin.base, span.first + static_cast<double>(i)));
      if (!sample.inside) continue;
      if (sample.low == index) weights += 1 - sample.fraction, slopes -= sample.moves;
      if (sample.low + 1 == index) weights += sample.fraction, slopes += sample.moves;
    }
    weight = static_cast<R>(weights), slope = static_cast<R>(slopes);
  }
};

// A bin of one region, for the channels of one class.
struct Bin {
  AxisOfBin axis[2];  // y, x
  int64_t roi, row, column, image, slice;
  bool is_nan;
  R mask;
  R inverse;   // of the number of samples
  R slope[2];  // d coordinate / d offset, over the number of samples

  // In place, by one thread: it has no registers for all of a bin.
  DCN_INLINE void locate(const RoIArguments& a, int64_t region, int64_t at_row, int64_t at_column,
                         int64_t class_id) {
    const RoIGeometry& geometry = a.geometry;
    roi = region, row = at_row, column = at_column, image = 0;
    slice = cell_of_bin(geometry, row, column, geometry.group, geometry.group);
    for (AxisOfBin& one : axis) one.first = one.count = 0;
    is_nan = !find_region(a);
    if (is_nan || !(axis[0].axis.samples > 0 && axis[1].axis.samples > 0)) return;
    const double y = offset(a, class_id, 1), x = offset(a, class_id, 0);
    is_nan = y != y || x != x;
    if (is_nan) return;
    axis[0].move_to(axis[0].axis.base(row, y, geometry.offset_scale));
    axis[1].move_to(axis[1].axis.base(column, x, geometry.offset_scale));
    const double samples = axis[0].samples * axis[1].samples;
    inverse = static_cast<R>(1 / samples);
    for (int i = 0; i < 2; ++i)
      slope[i] = static_cast<R>(geometry.offset_scale * axis[i].axis.size / samples);
    mask =
        a.mask.data ? static_cast<R>(number_at(place(a.mask, roi, 0, row, column), a.float_positions)) : R(1);
  }

 private:
  // Tells whether the region is one: of an image that exists, finite, also in pixels and however it is moved.
  DCN_INLINE bool find_region(const RoIArguments& a) {
    const auto number = [&](int64_t column) {
      return number_at(place(a.rois, roi, column, 0, 0), a.float_rois);
    };
    const double index = number(0);
    // False for NaN.
    if (!(index >= 0 && index < static_cast<double>(a.geometry.batch) && index == floor_of(index)))
      return false;
    image = static_cast<int64_t>(index);
    for (int i = 0; i < 2; ++i) {
      RoIAxis& found = axis[i].axis;
      found = RoIAxis(a.geometry, number(2 - i), number(4 - i), i);
      const double most = a.geometry.offset_scale * found.size;
      if (found.start - found.start != 0 || most - most != 0) return false;
    }
    return true;
  }
  DCN_INLINE double offset(const RoIArguments& a, int64_t class_id, int64_t channel) const {
    if (!a.offset.data) return 0;
    const int64_t width = a.geometry.part[1];
    const int64_t part = cell_of_bin(a.geometry, row, column, a.geometry.part[0], width);
    const int64_t part_row = quotient(part, width);
    return number_at(place(a.offset, roi, 2 * class_id + channel, part_row, part - part_row * width),
                     a.float_positions);
  }
};

// ---- gather, scatter

struct Lines {
  Line row[kLines], column[kLines];
};

// Calls body(row, rows, column, columns) for blocks of the pixels that a bin can touch; `lines` holds their
// rows and columns. All threads of the warp take part.
template <class Body>
DCN_INLINE void for_each_block_of_pixels(const Bin& bin, Lines& lines, const Body& body) {
  const AxisOfBin& y = bin.axis[0];
  const AxisOfBin& x = bin.axis[1];
  const int mine = lane() % kLines;
  for (int64_t row = 0; row < y.count; row += kLines)
    for (int64_t column = 0; column < x.count; column += kLines) {
      const int rows = static_cast<int>(least(kLines, y.count - row));
      const int columns = static_cast<int>(least(kLines, x.count - column));
      warp_barrier();
      if (lane() < kLines) {
        if (mine < rows) lines.row[mine] = Line(y, y.first + row + mine);
      } else {
        if (mine < columns) lines.column[mine] = Line(x, x.first + column + mine);
      }
      warp_barrier();
      body(y.first + row, rows, x.first + column, columns);
    }
}

// A block of channels of one class; this thread's are kWarp apart.
struct Channels {
  int64_t first;  // of the outputs
  int count;      // from `first` on

  Channels() = default;
  DCN_INLINE Channels(const RoIGeometry& geometry, int64_t class_id, int64_t from) {
    const int64_t outputs = quotient(geometry.outputs, geometry.classes);
    first = class_id * outputs + from;
    count = static_cast<int>(least(kChannels, outputs - from));
  }
  // Calls body(i, channel) for each of this thread's.
  template <class Body>
  DCN_INLINE void for_each(const Body& body) const {
#pragma unroll
    for (int i = 0; i < kPerThread; ++i)
      if (lane() + i * kWarp < count) body(i, first + lane() + i * kWarp);
  }
};

DCN_INLINE char* pixel_at(const Array& images, int64_t image, int64_t slice, int64_t row, int64_t column) {
  return images.data + image * images.batch + slice * images.axis[0] + row * images.axis[1] +
         column * images.axis[2];
}

// totals[0] = sum over the pixels of weights * x and, with three of them, [1] and [2] the same with the slopes
// of rows and of columns. A factor of 0 is left out: 0 * Inf would be NaN. Each block of pixels is a piece of
// the sum. Returns whether a pixel has a weight.
template <int kSums>
DCN_INLINE bool sum_pixels(const RoIArguments& a, const Bin& bin, const Channels& channels, Lines& lines,
                           R (&totals)[kSums][kPerThread]) {
  bool touches = false;
  for_each_block_of_pixels(bin, lines, [&](int64_t first_row, int rows, int64_t first_column, int columns) {
    R pieces[kSums][kPerThread] = {};
    for (int r = 0; r < rows; ++r) {
      const Line row = lines.row[r];
      if (row.weight == 0 && (kSums == 1 || row.slope == 0)) continue;
      const char* pixel = pixel_at(a.x, bin.image, bin.slice, first_row + r, first_column);
      R weighed[kPerThread] = {}, moved[kPerThread] = {};
      for (int c = 0; c < columns; ++c, pixel += a.x.axis[2]) {
        const Line column = lines.column[c];
        if (column.weight == 0 && (kSums == 1 || column.slope == 0)) continue;
        touches |= row.weight != 0 && column.weight != 0;
        channels.for_each([&](int i, int64_t channel) {
          const R value = widened(load(reinterpret_cast<const T*>(pixel) + channel));
          if (column.weight != 0) weighed[i] += column.weight * value;
          if (kSums > 1 && column.slope != 0) moved[i] += column.slope * value;
        });
      }
#pragma unroll
      for (int i = 0; i < kPerThread; ++i) {
        if (row.weight != 0) pieces[0][i] += row.weight * weighed[i];
        if constexpr (kSums > 1) {
          if (row.slope != 0) pieces[1][i] += row.slope * weighed[i];
          if (row.weight != 0) pieces[2][i] += row.weight * moved[i];
        }
      }
    }
#pragma unroll
    for (int sum = 0; sum < kSums; ++sum)
#pragma unroll
      for (int i = 0; i < kPerThread; ++i) totals[sum][i] += pieces[sum][i];
  });
  return touches;
}

}  // namespace
}  // namespace dcn
