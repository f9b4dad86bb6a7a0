// Pooling over regions, forward: each bin averages the pixels of its patch while they are in cache.
#pragma once

#include "roi_plan.hpp"

namespace dcn::DCN_ISA {

template <class T>
struct RoIForwardPlan : RoIPlan {
  Slices<T> x;
  Storage images;
  Planes output;
  int64_t tile_bins, tiles;  // a tile is a run of bins of one region and one band
  int64_t tile_stride;       // from bin to bin, in elements
  int64_t rounds;            // images at a time
  int threads;

  RoIForwardPlan(const RoIForwardArguments& arguments, int threads)
      : RoIPlan(arguments.geometry, arguments.arrays),
        x(arguments.geometry, arguments.arrays.x, arguments.arrays.images),
        images(arguments.arrays.images),
        output(arguments.output),
        tile_stride(uncrowded<T>(arguments.geometry.outputs)),
        threads(threads) {
    constexpr int64_t kTileBytes = 256 << 10, kMostBins = 64;
    static_assert(kMostBins <= kCopyPixels);
    const int64_t fitting = kTileBytes / (tile_stride * static_cast<int64_t>(sizeof(T)) + 1);
    tile_bins = clamp(fitting, 8, kMostBins);
    const int64_t bands = geometry.group;
    tiles = ceiling(ceiling(geometry.output[0], bands) * geometry.output[1], tile_bins);
    rounds = round_images(x.image_elements() * sizeof(T), threads);
  }
  // The bins that read one row of slices.
  Range band(int64_t index) const {
    const Range rows = bins_of_part(index, geometry.group, geometry.output[0]);
    return {rows.first * geometry.output[1], rows.end * geometry.output[1]};
  }
};

template <class T>
struct RoIForwardBuffers {
  struct PerThread {
    PatchBuffers<T> patch;
    T* tile;
  };
  T* x;
  BinCells cells;
  PerThread* thread;

  RoIForwardBuffers(const RoIForwardPlan<T>& plan, Workspace& space)
      : x(space.take<T>(plan.rounds * plan.x.image_elements())), cells(plan.geometry, space) {
    thread = space.take<PerThread>(plan.threads);
    for (int i = 0; i < plan.threads; ++i) {
      const PerThread mine = {PatchBuffers<T>(plan.geometry, space),
                              space.take<T>(plan.tile_bins * plan.tile_stride)};
      if (thread) thread[i] = mine;
    }
  }
};

template <class T>
class RoIForwardRun {
 public:
  RoIForwardRun(const RoIForwardPlan<T>& plan, const RoIForwardBuffers<T>& buffers, Team& team)
      : plan_(plan), buffers_(buffers), team_(team) {}

  bool run() {
    for (int64_t first = 0; first < plan_.geometry.batch; first += plan_.rounds) {
      const int64_t end = least(first + plan_.rounds, plan_.geometry.batch);
      if (plan_.begins[first] == plan_.begins[end]) continue;
      if (!copy(first, end) || !pool(first, end)) return false;
    }
    return true;
  }

 private:
  bool copy(int64_t first, int64_t end) {
    const int64_t items = plan_.x.copy_items();
    return team_.run(items * (end - first), [&](int64_t item, int) {
      const int64_t image = first + item / items;
      if (plan_.begins[image] == plan_.begins[image + 1]) return;
      const auto at = plan_.x.copy_item(item % items);
      plan_.x.slice(at.slice).copy_in(image, at.item, plan_.x.buffer(buffers_.x, image - first, at.slice), 0,
                                      plan_.x.channels);
    });
  }

  // Band by band: what one thread reads of an image stays in its cache.
  bool pool(int64_t first, int64_t end) {
    const int64_t begin = plan_.begins[first], items = (plan_.begins[end] - begin) * plan_.tiles;
    return team_.run(items * plan_.geometry.group, [&](int64_t item, int thread) {
      const Range band = plan_.band(item / items);
      const int64_t roi = plan_.order[begin + item % items / plan_.tiles];
      const int64_t bin = band.first + item % plan_.tiles * plan_.tile_bins;
      if (bin < band.end) tile(first, roi, bin, least(plan_.tile_bins, band.end - bin), thread);
    });
  }

  void tile(int64_t first_image, int64_t roi, int64_t first, int64_t count, int thread) {
    const auto& mine = buffers_.thread[thread];
    const int64_t image = static_cast<int64_t>(plan_.rois[roi * 5]), outputs = plan_.geometry.outputs;
    Patch<T> patch(plan_, buffers_.cells, mine.patch, roi);
    constexpr int64_t kPolledBins = 8;  // to ask takes as long as a small bin
    for (int64_t i = 0; i < count; ++i) {
      if (i % kPolledBins == 0 && !team_.keep_going(thread)) return;
      for (int64_t class_id = 0; class_id < plan_.geometry.classes; ++class_id) {
        const int64_t channel = class_id * plan_.class_outputs;
        patch.template locate<false>(first + i, class_id);
        const Pixels<2> pixels =
            plan_.x.view(image, buffers_.x, image - first_image, patch.slice, 0, plan_.x.channels);
        average(patch,
                {pixels.data + channel * static_cast<int64_t>(sizeof(T)), {pixels.axis[0], pixels.axis[1]}},
                mine.tile + i * plan_.tile_stride + channel);
      }
    }
    char* to = plan_.output.data + roi * plan_.output.batch + first * plan_.output.position;
    const StoredMatrix<T> stored = {to, plan_.output.position, plan_.output.channel, plan_.images};
    stored.copy_from(count, outputs, {mine.tile, plan_.tile_stride, 1});
  }

  void average(const Patch<T>& patch, const Pixels<2>& pixels, T* to) {
    const int64_t channels = plan_.class_outputs;
    if (patch.touches)
      average_patch<T>(patch.rows, patch.columns, pixels, channels, patch.inverse, patch.mask, to);
    else
      for (int64_t c = 0; c < channels; ++c) to[c] = patch.is_nan ? static_cast<T>(DCN_NAN) : T(0);
  }

  const RoIForwardPlan<T>& plan_;
  const RoIForwardBuffers<T>& buffers_;
  Team& team_;
};

template <class T>
Status roi_forward(const RoIForwardArguments& arguments, Team& team) {
  if (arguments.geometry.rois == 0 || arguments.geometry.outputs == 0) return Status::kOk;
  const RoIForwardPlan<T> plan(arguments, team.threads());
  return with_workspace<RoIForwardBuffers<T>>(
      plan, [&](const RoIForwardBuffers<T>& buffers) { return RoIForwardRun<T>(plan, buffers, team).run(); });
}

}  // namespace dcn::DCN_ISA
