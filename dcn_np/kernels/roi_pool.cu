// Pooling over regions. DCN_T: what images and results are stored in.
//
// A warp has a bin at a time, its threads the channels. The bin is located once per block, its lines of pixels
// a few at a time; no value of a region or an offset makes a kernel read or write outside x.
//
//     average_bins  y
//     sum_parts     grad_offset and grad_mask
//     locate_bins   bins and boxes of some regions, for
//     sum_tiles     grad_x: a block owns some pixels, and adds what the bins give them in order
//
// An array whose data is null is not wanted. The grid has one axis; the numbers below count its blocks.
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

// Pixels of an image: rows and columns from `first` to before `end`.
struct Box {
  int64_t image, first[2], end[2];

  DCN_INLINE bool empty() const { return first[0] >= end[0] || first[1] >= end[1]; }
  DCN_INLINE bool touches(const Box& other) const {
    return image == other.image && first[0] < other.end[0] && other.first[0] < end[0] &&
           first[1] < other.end[1] && other.first[1] < end[1];
  }
  DCN_INLINE void include(const Box& other) {
    if (other.empty()) return;
    const bool alone = empty();
    image = other.image;
    for (int i = 0; i < 2; ++i) {
      first[i] = alone || other.first[i] < first[i] ? other.first[i] : first[i];
      end[i] = alone || other.end[i] > end[i] ? other.end[i] : end[i];
    }
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
    axis[0].count = axis[1].count = 0;
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
  DCN_INLINE Box box() const {
    if (axis[0].count < 1 || axis[1].count < 1) return {};
    return {image,
            {axis[0].first, axis[1].first},
            {axis[0].first + axis[0].count, axis[1].first + axis[1].count}};
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

// Where a block of average_bins stands: kBins bins, for a block of channels of a class.
// Blocks: channel tiles of a class, classes, tiles of bins.
struct Tile {
  int64_t class_id;
  Channels channels;
  int64_t first;  // bin

  DCN_INLINE Tile(const RoIArguments& a, int64_t block) {
    const RoIGeometry& geometry = a.geometry;
    const int64_t outputs = quotient(geometry.outputs, geometry.classes);
    const int64_t from = take(block, ceiling(outputs, kChannels)) * kChannels;
    class_id = take(block, geometry.classes);
    channels = Channels(geometry, class_id, from);
    first = a.first + block * kBins;
  }
  DCN_INLINE int bins(const RoIArguments& a) const {
    return static_cast<int>(least(kBins, a.first + a.count - first));
  }
  DCN_INLINE void locate(const RoIArguments& a, int index, Bin& bin) const {
    int64_t number = first + index;
    const int64_t column = take(number, a.geometry.output[1]), row = take(number, a.geometry.output[0]);
    bin.locate(a, number, row, column, class_id);
  }
};

DCN_INLINE R grad_at(const RoIArguments& a, const Bin& bin, int64_t channel) {
  return widened(
      load(reinterpret_cast<const T*>(place(a.output, bin.roi, 0, bin.row, bin.column)) + channel));
}

// The bins of a region that one offset of a class moves, in a fixed order.
struct Part {
  int64_t roi, class_id, row, column;
  Range rows, columns;

  DCN_INLINE Part(const RoIGeometry& geometry, int64_t number) {
    column = take(number, geometry.part[1]), row = take(number, geometry.part[0]);
    class_id = take(number, geometry.classes), roi = number;
    rows = bins_of_part(row, geometry.part[0], geometry.output[0]);
    columns = bins_of_part(column, geometry.part[1], geometry.output[1]);
  }
  DCN_INLINE int64_t bins() const { return (rows.end - rows.first) * (columns.end - columns.first); }
  DCN_INLINE void locate(const RoIArguments& a, int64_t index, Bin& bin) const {
    const int64_t along = take(index, columns.end - columns.first);
    bin.locate(a, roi, rows.first + index, columns.first + along, class_id);
  }
};

struct BinGradients {
  R mask, y, x;
};

// By the mask, and by the offset along y and x. All threads of the warp take part.
DCN_INLINE BinGradients bin_gradients(const RoIArguments& a, const Bin& bin, int64_t class_id, Lines& lines) {
  const R nan = static_cast<R>(DCN_NAN);
  if (bin.is_nan) return {nan, nan, nan};
  const int64_t outputs = quotient(a.geometry.outputs, a.geometry.classes);
  bool touches = false;
  R dots[3] = {};
  for (int64_t from = 0; from < outputs; from += kChannels) {
    const Channels channels(a.geometry, class_id, from);
    R totals[3][kPerThread] = {};
    touches = sum_pixels(a, bin, channels, lines, totals);
    channels.for_each([&](int i, int64_t channel) {
      const R grad = grad_at(a, bin, channel);
#pragma unroll
      for (int j = 0; j < 3; ++j) dots[j] += grad * totals[j][i];
    });
  }
  if (!touches) return {0, 0, 0};
#pragma unroll
  for (int j = 0; j < 3; ++j) dots[j] = sum_of_warp(dots[j]);
  return {bin.inverse * dots[0], bin.mask * (bin.slope[0] * dots[1]), bin.mask * (bin.slope[1] * dots[2])};
}

DCN_INLINE int64_t size(int64_t stride) { return stride < 0 ? -stride : stride; }

}  // namespace

extern "C" __global__ void __launch_bounds__(kThreads, 2) average_bins(const RoIArguments a) {
  __shared__ Bin bins[kBins];
  __shared__ Lines lines[kBins];
  __shared__ R averages[kBins][kChannels + 4];  // + 4: without conflicts of banks along both axes
  const Tile tile(a, blockIdx.x);
  const int count = tile.bins(a), thread = threadIdx.x, warp = thread / kWarp;
  if (thread < count) tile.locate(a, thread, bins[thread]);
  barrier();
  if (warp < count) {
    const Bin& bin = bins[warp];
    R totals[1][kPerThread] = {};
    const bool touches = sum_pixels(a, bin, tile.channels, lines[warp], totals);
#pragma unroll
    for (int i = 0; i < kPerThread; ++i)
      averages[warp][lane() + i * kWarp] = bin.is_nan ? static_cast<R>(DCN_NAN)
                                           : touches  ? totals[0][i] * bin.inverse * bin.mask
                                                      : R(0);
  }
  barrier();
  // Side by side, whichever axis that is.
  const bool along_channels = size(a.output.channel) <= size(a.output.axis[1]);
  for (int i = thread; i < kBins * kChannels; i += kThreads) {
    const int b = along_channels ? i / kChannels : i % kBins, c = along_channels ? i % kChannels : i / kBins;
    if (b >= count || c >= tile.channels.count) continue;
    store(reinterpret_cast<T*>(
              place(a.output, bins[b].roi, tile.channels.first + c, bins[b].row, bins[b].column)),
          averages[b][c]);
  }
}

// Blocks: tiles of kBins parts, numbered through classes and regions.
extern "C" __global__ void __launch_bounds__(kThreads, 2) sum_parts(const RoIArguments a) {
  __shared__ Bin bins[kBins];
  __shared__ Lines lines[kBins];
  const RoIGeometry& geometry = a.geometry;
  const int64_t first = a.first + static_cast<int64_t>(blockIdx.x) * kBins;
  const int thread = threadIdx.x, warp = thread / kWarp;
  const int count = static_cast<int>(least(kBins, a.first + a.count - first));
  const int64_t most =
      ceiling(geometry.output[0], geometry.part[0]) * ceiling(geometry.output[1], geometry.part[1]);
  const Part mine(geometry, first + warp);
  R y = 0, x = 0;
  for (int64_t step = 0; step < most; ++step) {
    barrier();
    if (thread < count) {
      const Part part(geometry, first + thread);
      if (step < part.bins()) part.locate(a, step, bins[thread]);
    }
    barrier();
    if (warp >= count || step >= mine.bins()) continue;
    const BinGradients grads = bin_gradients(a, bins[warp], mine.class_id, lines[warp]);
    y += grads.y, x += grads.x;
    if (a.grad_mask.data && lane() == 0)
      put_number(place(a.grad_mask, bins[warp].roi, 0, bins[warp].row, bins[warp].column), a.float_positions,
                 grads.mask);
  }
  if (warp >= count || lane() > 0 || !a.grad_offset.data) return;
  put_number(place(a.grad_offset, mine.roi, 2 * mine.class_id, mine.row, mine.column), a.float_positions, x);
  put_number(place(a.grad_offset, mine.roi, 2 * mine.class_id + 1, mine.row, mine.column), a.float_positions,
             y);
}

namespace {

constexpr int kLocators = 64;
constexpr int kBinBytes = 288, kBoxBytes = 40;
constexpr int kSide = kBins;  // of a tile of pixels: a warp has a row
constexpr int kBatch = 16;    // bins
static_assert(sizeof(Bin) <= kBinBytes && kBinBytes % alignof(Bin) == 0, "each in a place of its own");
static_assert(sizeof(Box) == kBoxBytes, "as dcn_np/cuda/regions.py has it");

// Of the regions of this launch; `region` also counts classes.
DCN_INLINE Bin& bin_at(const RoIArguments& a, int64_t region, int64_t bin) {
  const int64_t number = region * (a.geometry.output[0] * a.geometry.output[1]) + bin;
  return *reinterpret_cast<Bin*>(static_cast<char*>(a.bins) + number * kBinBytes);
}
DCN_INLINE Box& box_at(const RoIArguments& a, int64_t region) { return static_cast<Box*>(a.boxes)[region]; }

// What a block of sum_tiles owns. Blocks: channel tiles of a class, classes, slices, columns, rows, images.
struct PixelTile {
  Channels channels;
  int64_t class_id, slice;
  Box box;

  PixelTile() = default;
  DCN_INLINE PixelTile(const RoIArguments& a, int64_t block) {
    const RoIGeometry& geometry = a.geometry;
    const int64_t outputs = quotient(geometry.outputs, geometry.classes);
    const int64_t from = take(block, ceiling(outputs, kChannels)) * kChannels;
    class_id = take(block, geometry.classes);
    channels = Channels(geometry, class_id, from);
    slice = take(block, geometry.group * geometry.group);
    for (int i = 1; i >= 0; --i) {
      box.first[i] = take(block, ceiling(geometry.input[i], kSide)) * kSide;
      box.end[i] = least(box.first[i] + kSide, geometry.input[i]);
    }
    box.image = block;
  }
};

// Calls body(number) for those of `count` numbers that pass a test, in their order. All threads of the block
// take part.
template <class Test, class Body>
DCN_INLINE void for_each_hit(bool (&hits)[kThreads], int64_t count, const Test& test, const Body& body) {
  for (int64_t first = 0; first < count; first += kThreads) {
    barrier();
    const int64_t mine = first + threadIdx.x;
    hits[threadIdx.x] = mine < count && test(mine);
    barrier();
    for (int i = 0; i < kThreads; ++i)
      if (hits[i]) body(first + i);
  }
}

// The bins of which a tile adds up gradients, a few at a time.
struct Batch {
  const Bin* bin[kBatch];
  R row[kBatch][kSide], column[kBatch][kSide];  // weights of the lines of the tile

  // Finds the weights of `count` bins. All threads of the block take part.
  DCN_INLINE void weigh(const Box& box, int count) {
    for (int i = threadIdx.x; i < count * 2 * kSide; i += kThreads) {
      const int b = i / (2 * kSide), axis = i / kSide % 2, line = i % kSide;
      const int64_t index = box.first[axis] + line;
      const R weight = index < box.end[axis] ? Line(bin[b]->axis[axis], index).weight : R(0);
      (axis == 0 ? row : column)[b][line] = weight;
    }
  }
  // Adds to the sums of this warp's row of pixels.
  DCN_INLINE void add(const RoIArguments& a, const Channels& channels, int count,
                      R (&sums)[kSide][kPerThread]) const {
    const int mine = threadIdx.x / kWarp;
    for (int b = 0; b < count; ++b) {
      if (row[b][mine] == 0) continue;
      R grads[kPerThread] = {};
      channels.for_each([&](int i, int64_t channel) {
        grads[i] = grad_at(a, *bin[b], channel) * (bin[b]->inverse * bin[b]->mask * row[b][mine]);
      });
#pragma unroll
      for (int c = 0; c < kSide; ++c)
        if (column[b][c] != 0)
#pragma unroll
          for (int i = 0; i < kPerThread; ++i) sums[c][i] += grads[i] * column[b][c];
    }
  }
};

}  // namespace

// Blocks: classes, regions.
extern "C" __global__ void __launch_bounds__(kLocators) locate_bins(const RoIArguments a) {
  __shared__ Box boxes[kLocators];
  const int64_t width = a.geometry.output[1], bins = a.geometry.output[0] * width;
  int64_t region = blockIdx.x;
  const int64_t class_id = take(region, a.geometry.classes);
  Box& box = boxes[threadIdx.x];
  box = {};
  for (int64_t b = threadIdx.x; b < bins; b += kLocators) {
    Bin& bin = bin_at(a, blockIdx.x, b);
    const int64_t row = quotient(b, width);
    bin.locate(a, a.first + region, row, b - row * width, class_id);
    box.include(bin.box());
  }
  barrier();
  if (threadIdx.x > 0) return;
  for (int i = 1; i < kLocators; ++i) box.include(boxes[i]);
  box_at(a, blockIdx.x) = box;
}

// Blocks: see PixelTile.
extern "C" __global__ void __launch_bounds__(kThreads, 2) sum_tiles(const RoIArguments a) {
  __shared__ bool regions[kThreads], bins[kThreads];
  __shared__ Batch batch;
  __shared__ PixelTile tile;
  if (threadIdx.x == 0) tile = PixelTile(a, blockIdx.x);
  barrier();
  const int64_t bins_of_region = a.geometry.output[0] * a.geometry.output[1];
  R sums[kSide][kPerThread] = {};
  int waiting = 0;
  bool any = false;
  const auto add_batch = [&] {
    barrier();
    batch.weigh(tile.box, waiting);
    barrier();
    batch.add(a, tile.channels, waiting, sums);
    barrier();
    waiting = 0, any = true;
  };
  const auto number = [&](int64_t region) { return region * a.geometry.classes + tile.class_id; };
  const auto touches_region = [&](int64_t region) { return box_at(a, number(region)).touches(tile.box); };
  for_each_hit(regions, a.count, touches_region, [&](int64_t region) {
    const auto touches_bin = [&](int64_t index) {
      const Bin& bin = bin_at(a, number(region), index);
      return bin.slice == tile.slice && bin.box().touches(tile.box);
    };
    for_each_hit(bins, bins_of_region, touches_bin, [&](int64_t index) {
      if (threadIdx.x == 0) batch.bin[waiting] = &bin_at(a, number(region), index);
      if (++waiting == kBatch) add_batch();
    });
  });
  if (waiting > 0) add_batch();
  const int64_t row = tile.box.first[0] + threadIdx.x / kWarp;
  if (!any || row >= tile.box.end[0]) return;
  for (int64_t column = tile.box.first[1]; column < tile.box.end[1]; ++column) {
    char* pixel = pixel_at(a.grad_x, tile.box.image, tile.slice, row, column);
    tile.channels.for_each([&](int i, int64_t channel) {
      reinterpret_cast<R*>(pixel)[channel] += sums[column - tile.box.first[1]][i];
    });
  }
}

}  // namespace dcn
