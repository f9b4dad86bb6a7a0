// Pooling over regions, forward: y, from x with its channels side by side. The grid has one axis; the numbers
// below count its blocks.
#include "roi_bins.hpp"

namespace dcn {
namespace {

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

}  // namespace dcn
