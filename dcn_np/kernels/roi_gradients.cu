// Pooling over regions, backward, without atomics.
//
//     sum_parts     grad_offset and grad_mask
//     locate_bins   bins and boxes of some regions, for
//     sum_tiles     grad_x: a block owns some pixels, and adds what the bins give them in order
//
// x, grad_x and the gradient of the output in `output` have their channels side by side. An array whose data is
// null is not wanted. The grid has one axis; the numbers below count its blocks.
#include "roi_bins.hpp"

namespace dcn {
namespace {

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

}  // namespace

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

// Pixels of an image: rows and columns from `first` to before `end`.
struct Box {
  int64_t image, first[2], end[2];

  Box() = default;
  // Of the pixels that a bin can touch.
  DCN_INLINE explicit Box(const Bin& bin) : image(bin.image) {
    for (int i = 0; i < 2; ++i) first[i] = bin.axis[i].first, end[i] = first[i] + bin.axis[i].count;
  }
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
  // Calls body(c, i, sum) for this thread's channels i of the pixels c of its warp's row.
  template <class Body>
  DCN_INLINE void for_each_pixel(const Array& images, const Body& body) const {
    const int64_t row = box.first[0] + threadIdx.x / kWarp;
    if (row >= box.end[0]) return;
#pragma unroll
    for (int c = 0; c < kSide; ++c) {
      if (box.first[1] + c >= box.end[1]) break;
      R* pixel = reinterpret_cast<R*>(pixel_at(images, box.image, slice, row, box.first[1] + c));
      channels.for_each([&](int i, int64_t channel) { body(c, i, pixel[channel]); });
    }
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
    const int some = static_cast<int>(least(kThreads, count - first));
    for (int i = 0; i < some; ++i)
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
      // Past the last line of the image it is 0.
      (axis == 0 ? row : column)[b][line] = Line(bin[b]->axis[axis], box.first[axis] + line).weight;
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
  box.end[0] = box.first[0] = 0;  // empty
  for (int64_t b = threadIdx.x; b < bins; b += kLocators) {
    Bin& bin = bin_at(a, blockIdx.x, b);
    const int64_t row = quotient(b, width);
    bin.locate(a, a.first + region, row, b - row * width, class_id);
    box.include(Box(bin));
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
    if (!any) tile.for_each_pixel(a.grad_x, [&](int c, int i, R& pixel) { sums[c][i] = pixel; });
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
      return bin.slice == tile.slice && Box(bin).touches(tile.box);
    };
    for_each_hit(bins, bins_of_region, touches_bin, [&](int64_t index) {
      if (threadIdx.x == 0) batch.bin[waiting] = &bin_at(a, number(region), index);
      if (++waiting == kBatch) add_batch();
    });
  });
  if (waiting > 0) add_batch();
  if (any) tile.for_each_pixel(a.grad_x, [&](int c, int i, R& pixel) { pixel = sums[c][i]; });
}

}  // namespace dcn
