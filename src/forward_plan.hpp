// How the forward pass cuts up its work, and the memory it takes for it.
#pragma once

#include "plan.hpp"

namespace dcn::DCN_ISA {

template <class T, int NDim>
struct ForwardPlan : Plan<T, NDim> {
  using Plan<T, NDim>::geometry;
  using Plan<T, NDim>::taps;
  using Plan<T, NDim>::positions;

  const PreparedForward* prepared;  // or null
  Images<T, NDim> x;
  Panels panels;         // of the outputs of a weight group
  int64_t terms;         // of one output: taps x inputs of its group
  int64_t piece;         // the most of them in one running sum
  int64_t chunk_taps;    // taps gathered before they are multiplied
  int64_t taps_at_once;  // taps located before they are gathered
  // The order of terms: [offset group][tap][input] instead of [tap][input]. What the taps of an offset group write then
  // lies together.
  bool by_offset_group;
  int64_t columns_stride, sums_stride;
  int64_t tile_positions, tiles;
  int64_t round_images;  // images whose channels-last copies exist at the same time
  int64_t copies;        // items that the copy of an image consists of
  int threads;

  ForwardPlan(const ForwardArguments& arguments, int threads)
      : Plan<T, NDim>(arguments.geometry),
        prepared(arguments.prepared),
        x(arguments.x, arguments.images, arguments.geometry.in_channels, arguments.geometry.input),
        panels(Panels::of<T>(this->group_outputs)),
        threads(threads) {
    constexpr int64_t kLine = 64 / sizeof(T), kChunkTerms = 2304 / sizeof(T), kColumnsBytes = 400 << 10,
                      kTapsAtOnce = 9;
    terms = taps * this->group_inputs;
    piece = output_piece(terms);
    const int64_t channels = geometry.in_channels > 0 ? geometry.in_channels : 1;
    // Small weight groups are multiplied in one go: their sums are loaded and stored once. That pays also where columns
    // then outgrow the second-level cache, but they may not take memory without end.
    constexpr int64_t kWholeColumns = (2 << 20) / sizeof(T);
    const int64_t columns = taps * channels * 2 * kTileRows;  // of the fewest positions of a tile
    const bool whole = geometry.groups > 1 && terms <= kChunkTerms && columns <= kWholeColumns;
    chunk_taps = whole ? taps : ceiling(taps, ceiling(taps * channels, kChunkTerms));
    taps_at_once = least(chunk_taps, kTapsAtOnce);
    by_offset_group =
        geometry.groups == 1 && geometry.offset_groups > 1 && geometry.in_channels > 0 && chunk_taps == taps;
    columns_stride = this->depthwise ? 0 : ceiling(chunk_taps * channels, kLine) * kLine + kLine;
    sums_stride = uncrowded<T>(this->depthwise ? channels : geometry.groups * panels.padded());

    const int64_t per_position = (columns_stride + 1) * sizeof(T);
    const int64_t fitting = kColumnsBytes / per_position / kTileRows * kTileRows;
    const int64_t most = clamp(fitting, 2 * kTileRows, kTilePositions);
    tile_positions = most;
    for (int64_t fewer = most - kTileRows; fewer >= 2 * kTileRows; fewer -= kTileRows)
      if (longest(fewer) < longest(tile_positions)) tile_positions = fewer;
    tiles = ceiling(positions, tile_positions);

    constexpr size_t kRoundBytes = 2 << 20;
    const size_t image_bytes = x.buffer_elements() * sizeof(T) + 1;
    const int64_t images = static_cast<int64_t>(kRoundBytes * threads / image_bytes);
    round_images = x.in_place ? geometry.batch : clamp(images, 1, geometry.batch);
    copies = x.copy_items();
  }
  bool copied_by_tiles() const {
    constexpr int64_t kFewCopies = 8;
    return copies > kFewCopies;
  }
  // What the busiest thread has to do with tiles of this size, in positions: a tile never changes the bits of a result.
  // To go through the weights once more costs as much as a few positions.
  int64_t longest(int64_t tile) const {
    constexpr int64_t kWeights = 8;
    return ceiling(geometry.batch * ceiling(positions, tile), threads) * (tile + kWeights);
  }
  // Where a tap and an input stand among the terms of some taps, of which each has `inputs`.
  int64_t term(int64_t tap, int64_t input, int64_t inputs) const {
    const int64_t within = by_offset_group ? input % this->offset_group_channels : input;
    return (input - within) * taps + tap * tap_stride(inputs) + within;
  }
  int64_t tap_stride(int64_t inputs) const { return by_offset_group ? this->offset_group_channels : inputs; }
  int64_t sums_buffers() const { return this->depthwise && taps > piece ? 2 : 1; }
  size_t packed_elements() const {
    return (this->depthwise ? geometry.in_channels : geometry.groups * panels.padded()) * terms;
  }
  template <class Weight>
  Weight* packed(Weight* weights, int64_t group, int64_t panel) const {
    return weights + (group * panels.padded() + panels.first(panel)) * terms;
  }
};

template <class T, int NDim>
struct PackedWeights {
  T* data;

  PackedWeights(const ForwardPlan<T, NDim>& plan, Workspace& space)
      : data(space.take<T>(plan.packed_elements())) {}
};

template <class T, int NDim>
struct ForwardBuffers {
  T* x;
  T* weights;
  T* zeros;
  unsigned char* copied;  // marks of the items of a round
  struct PerThread {
    Samples<T, NDim>* samples;
    T* columns;
    T* sums;
    int64_t image;  // of which `provided` is there
    Slab provided;
  };
  PerThread* thread;

  ForwardBuffers(const ForwardPlan<T, NDim>& plan, Workspace& space) {
    x = space.take<T>(plan.x.buffer_elements() * plan.round_images);
    weights =
        plan.prepared ? static_cast<T*>(plan.prepared->weights) : PackedWeights<T, NDim>(plan, space).data;
    zeros = space.take<T>(plan.geometry.in_channels);
    copied = space.take<unsigned char>(plan.x.most_copy_items() * plan.round_images);
    thread = space.take<PerThread>(plan.threads);
    for (int i = 0; i < plan.threads; ++i) {
      const PerThread mine = {space.take<Samples<T, NDim>>(plan.taps_at_once),
                              space.take<T>(plan.columns_stride * plan.tile_positions),
                              space.take<T>(plan.sums_stride * plan.tile_positions * plan.sums_buffers()),
                              -1,
                              {0, 0}};
      if (thread) thread[i] = mine;
    }
    if (zeros) __builtin_memset(zeros, 0, plan.geometry.in_channels * sizeof(T));
  }
};

}  // namespace dcn::DCN_ISA
