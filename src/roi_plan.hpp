// What both passes of the pooling over regions share: the cut of channels, the copies of images, and the
// patch of a bin.
#pragma once

#include "plan.hpp"
#include "roi_patch.hpp"

namespace dcn::DCN_ISA {

// Of images of x: group^2 slices of the channels, each of which some bins read; slice s has the channels s,
// s + group^2, ... An image is copied slice by slice.
template <class T>
struct Slices {
  Array array;
  Storage storage;
  int64_t count, channels;
  const int64_t* extents;

  Slices(const RoIGeometry& geometry, const Array& array, Storage storage)
      : array(array),
        storage(storage),
        count(geometry.group * geometry.group),
        channels(geometry.outputs),
        extents(geometry.input) {}
  Images<T, 2> slice(int64_t index) const {
    Array part = array;
    part.data += index * array.channel;
    part.channel *= count;
    return Images<T, 2>(part, storage, channels, extents);
  }
  size_t slice_elements() const { return slice(0).buffer_elements(); }
  size_t image_elements() const { return count * slice_elements(); }
  // Copies are cut into items slice by slice: what a thread copies, it then reads.
  struct CopyItem {
    int64_t slice, item;
  };
  int64_t copy_items() const { return count * slice(0).copy_items(); }
  CopyItem copy_item(int64_t index) const {
    const int64_t items = slice(0).copy_items();
    return {index / items, index % items};
  }

  // Pixels of some channels of a slice; `images` holds the copies of a round, one image to a slot.
  Pixels<2> view(int64_t image, T* images, int64_t slot, int64_t index, int64_t first, int64_t count) const {
    return slice(index).view(image, buffer(images, slot, index), first, count);
  }
  T* buffer(T* images, int64_t slot, int64_t index) const {
    return images + slot * image_elements() + index * slice_elements();
  }
};

// The geometry with what follows from it.
struct RoIPlan {
  const RoIGeometry& geometry;
  const double* rois;     // (rois, 5)
  const int64_t* order;   // the regions by image, and along its longer side
  const int64_t* begins;  // (batch + 1): where each image's begin in `order`
  Planes offset, mask;
  Storage positions;
  int64_t bins, class_outputs;

  RoIPlan(const RoIGeometry& geometry, const RoIArrays& arrays)
      : geometry(geometry),
        rois(arrays.rois),
        order(arrays.order),
        begins(arrays.begins),
        offset(arrays.offset),
        mask(arrays.mask),
        positions(arrays.positions),
        bins(geometry.output[0] * geometry.output[1]),
        class_outputs(geometry.outputs / geometry.classes) {}

  // The most lines that a bin has in an axis: a sample touches two.
  int64_t most_lines(int axis) const {
    double samples = static_cast<double>(geometry.samples);
    for (int64_t roi = 0; geometry.samples == 0 && roi < geometry.rois; ++roi) {
      const double* corners = rois + roi * 5 + 1;
      const RoIAxis y_or_x(geometry, corners[1 - axis], corners[3 - axis], axis);
      if (y_or_x.samples > samples) samples = y_or_x.samples;
    }
    const int64_t extent = geometry.input[axis];
    return 2 * samples < static_cast<double>(extent) ? static_cast<int64_t>(2 * samples) : extent;
  }
  // Images whose copies, `bytes` each, exist at the same time.
  int64_t round_images(size_t bytes, int threads) const {
    constexpr size_t kRoundBytes = 2 << 20;
    const int64_t images = static_cast<int64_t>(kRoundBytes * threads / (bytes + 1));
    return clamp(images, 1, geometry.batch > 0 ? geometry.batch : 1);
  }
};

template <class T>
DCN_INLINE T number_at(const Planes& planes, Storage storage, int64_t batch, int64_t channel,
                       int64_t position) {
  const char* from =
      planes.data + batch * planes.batch + channel * planes.channel + position * planes.position;
  T value;
  if constexpr (sizeof(T) == sizeof(float)) {
    if (storage != Storage::kSame) {
      widen_some(storage, from, kHalfBytes, 1, &value);
      return value;
    }
  }
  __builtin_memcpy(&value, from, sizeof value);
  return value;
}

template <class T>
DCN_INLINE void put_number(const Planes& planes, Storage storage, int64_t batch, int64_t channel,
                           int64_t position, T value) {
  if (!planes.data) return;
  char* to = planes.data + batch * planes.batch + channel * planes.channel + position * planes.position;
  if constexpr (sizeof(T) == sizeof(float)) {
    if (storage != Storage::kSame) return narrow_some(storage, &value, 1, to, kHalfBytes);
  }
  __builtin_memcpy(to, &value, sizeof value);
}

// Of a region's offsets, the number of the one that moves a bin, and that of the slice of x which the bin reads.
struct BinCell {
  int64_t part, slice;
};

// The cells of all bins: the sums of what their rows and columns contribute, for a bin alone costs divisions.
struct BinCells {
  BinCell* rows;
  BinCell* columns;

  BinCells(const RoIGeometry& geometry, Workspace& space)
      : rows(space.take<BinCell>(geometry.output[0])), columns(space.take<BinCell>(geometry.output[1])) {
    if (!rows) return;
    const auto cell = [&](int64_t row, int64_t column) -> BinCell {
      return {cell_of_bin(geometry, row, column, geometry.part[0], geometry.part[1]),
              cell_of_bin(geometry, row, column, geometry.group, geometry.group)};
    };
    for (int64_t row = 0; row < geometry.output[0]; ++row) rows[row] = cell(row, 0);
    for (int64_t column = 0; column < geometry.output[1]; ++column) columns[column] = cell(0, column);
  }
  BinCell at(int64_t row, int64_t column) const {
    return {rows[row].part + columns[column].part, rows[row].slice + columns[column].slice};
  }
};

// The memory of a Patch: lines in two axes.
template <class T>
struct PatchBuffers {
  Line<T>* lines[2];
  typename Lines<T>::Sums* sums[2];

  PatchBuffers() = default;
  PatchBuffers(const RoIGeometry& geometry, Workspace& space) {
    for (int axis = 0; axis < 2; ++axis) {
      lines[axis] = space.take<Line<T>>(geometry.input[axis] + kLinesTogether);
      sums[axis] = space.take<typename Lines<T>::Sums>(geometry.input[axis]);
    }
  }
};

// What turns the dots of a bin into its gradients: all NaN where an offset is, all 0 unless it touches.
template <class T>
struct BinFactors {
  T inverse;  // of the number of samples
  T mask;
  T slope[2];  // d coordinate / d offset, over the number of samples; y is axis 0

  static BinFactors all(T value) { return {value, value, {value, value}}; }
};

// The bins of one region, one at a time.
template <class T>
class Patch {
 public:
  Lines<T> rows, columns;
  bool is_nan;
  bool touches;  // there are pixels, and the average is a number
  T inverse;     // of the number of samples
  T mask;
  int64_t slice;  // of x

  Patch(const RoIPlan& plan, const BinCells& cells, const PatchBuffers<T>& buffers, int64_t roi)
      : rows(lines(plan, buffers, 0)),
        columns(lines(plan, buffers, 1)),
        plan_(plan),
        cells_(cells),
        roi_(roi),
        y_(plan.geometry, plan.rois[roi * 5 + 2], plan.rois[roi * 5 + 4], 0),
        x_(plan.geometry, plan.rois[roi * 5 + 1], plan.rois[roi * 5 + 3], 1) {}

  template <bool kSlopes>
  void locate(int64_t bin, int64_t class_id) {
    const int64_t row = quotient(bin, plan_.geometry.output[1]),
                  column = bin - row * plan_.geometry.output[1];
    const BinCell cell = cells_.at(row, column);
    const double scale = plan_.geometry.offset_scale, y = offset(cell.part, class_id, 1),
                 x = offset(cell.part, class_id, 0);
    slice = cell.slice;
    is_nan = touches = false;
    mask = plan_.mask.data ? number_at<T>(plan_.mask, plan_.positions, roi_, 0, bin) : T(1);
    if (!(y_.samples > 0 && x_.samples > 0)) return;
    is_nan = y != y || x != x;
    if (is_nan) return;
    // Without offsets the bins of a row share their rows of pixels.
    if (plan_.offset.data || row != row_) {
      row_ = row;
      rows.template find<kSlopes>(y_, y_.base(row, y, scale));
    }
    if (!rows.weighs) return;
    columns.template find<kSlopes>(x_, x_.base(column, x, scale));
    touches = columns.weighs;
    if (touches) samples_ = rows.samples * columns.samples, inverse = static_cast<T>(1 / samples_);
  }
  // What locate() found, for the pixels and for the sums of their dots.
  void keep(LocatedBin<T>& bin, BinFactors<T>& factors) const {
    bin.rows = bin.columns = 0;
    factors = BinFactors<T>::all(is_nan ? static_cast<T>(DCN_NAN) : 0);
    if (!touches) return;
    const auto slope = [&](const RoIAxis& axis) {
      return static_cast<T>(plan_.geometry.offset_scale * axis.size / samples_);
    };
    factors = {inverse, mask, slope(y_), slope(x_)};
    bin.factor = inverse * mask;
    bin.rows = rows.count, bin.columns = columns.count;
    copy_lines(rows.line, rows.count, bin.row());
    copy_lines(columns.line, columns.count, bin.column());
  }

 private:
  static Lines<T> lines(const RoIPlan& plan, const PatchBuffers<T>& buffers, int axis) {
    return {buffers.lines[axis], buffers.sums[axis], 0, 0, false};
  }
  double offset(int64_t part, int64_t class_id, int64_t channel) const {
    if (!plan_.offset.data) return 0;
    return number_at<T>(plan_.offset, plan_.positions, roi_, 2 * class_id + channel, part);
  }

  const RoIPlan& plan_;
  const BinCells& cells_;
  int64_t roi_;
  RoIAxis y_, x_;
  int64_t row_ = -1;
  double samples_ = 0;
};

}  // namespace dcn::DCN_ISA
