// How the backward pass cuts up its work, and the memory it takes for it.
#pragma once

#include "plan.hpp"

namespace dcn::DCN_ISA {

constexpr int64_t kPositionPiece = 256;  // positions whose columns are gathered at once for grad_weight

// Channels of one weight group and one offset group.
struct Block {
  int64_t first, count;
  int64_t group, offset_group;
};

template <class T, int NDim>
struct BackwardPlan : Plan<T, NDim> {
  using Plan<T, NDim>::geometry;
  using Plan<T, NDim>::taps;
  using Plan<T, NDim>::positions;

  const BackwardArguments& arguments;
  Images<T, NDim> x, grad_x;
  int threads;
  bool grads_at_x, grads_at_positions, grads_at_weight;  // which of the three parts are asked for
  bool grad_output_in_place;
  int64_t grad_output_stride;  // from position to position, in elements
  int64_t block_channels, blocks;
  int64_t strip, strips;  // positions
  int64_t terms;          // taps x inputs of a weight group
  int64_t round_images;

  BackwardPlan(const BackwardArguments& arguments, int threads)
      : Plan<T, NDim>(arguments.geometry),
        arguments(arguments),
        x(arguments.x, arguments.images, geometry.in_channels, geometry.input),
        grad_x(arguments.grad_x, arguments.images, geometry.in_channels, geometry.input),
        threads(threads) {
    const Planes& grad_output = arguments.grad_output;
    grads_at_x = arguments.grad_x.data;
    grads_at_positions = arguments.grad_offset.data || arguments.grad_mask.data;
    grads_at_weight = arguments.grad_weight;
    grad_output_in_place = arguments.images == Storage::kSame &&
                           (geometry.out_channels <= 1 || grad_output.channel == sizeof(T));
    grad_output_stride = grad_output_in_place ? grad_output.position / static_cast<int64_t>(sizeof(T))
                                              : uncrowded<T>(geometry.out_channels);
    terms = taps * this->group_inputs;

    // Narrower blocks where there would be too few to share among threads; the choice fixes the order of
    // sums, so it depends on the shape alone.
    block_channels =
        geometry.in_channels >= 2 * kBlockChannels<T> ? kBlockChannels<T> : kBlockChannels<T> / 2;
    blocks = 0;
    for_each_block([&](const Block&) { ++blocks; });

    constexpr int64_t kDotsBytes = 3 << 20;
    const int64_t per_position = blocks * taps * kCorners<NDim> * static_cast<int64_t>(sizeof(T));
    const int64_t fitting =
        per_position > 0 ? kDotsBytes / per_position / kScatterPositions * kScatterPositions : positions;
    strip = !grads_at_positions               ? positions
            : fitting > 4 * kScatterPositions ? fitting
                                              : 4 * kScatterPositions;
    strip = least(strip, positions) > 0 ? least(strip, positions) : 1;
    strips = ceiling(positions, strip);

    constexpr size_t kRoundBytes = 2 << 20;
    const size_t image_bytes =
        (x.buffer_elements() + grad_x_elements() + grad_output_elements()) * sizeof(T) +
        static_cast<size_t>(dots_elements()) * sizeof(T) + 1;
    const int64_t images = static_cast<int64_t>(kRoundBytes * threads / image_bytes);
    round_images = least(images > 1 ? images : 1, geometry.batch);
  }

  template <class Body>
  void for_each_block(const Body& body) const {
    const int64_t outer = this->depthwise ? geometry.in_channels : this->group_inputs;
    for (int64_t first = 0; first < geometry.in_channels;) {
      const int64_t to_group = outer - first % outer;
      const int64_t to_offset_group = this->offset_group_channels - first % this->offset_group_channels;
      const int64_t count = least(block_channels, least(to_group, to_offset_group));
      body(Block{first, count, first / outer, first / this->offset_group_channels});
      first += count;
    }
  }

  size_t grad_x_elements() const { return grads_at_x ? grad_x.buffer_elements() : 0; }
  size_t grad_output_elements() const { return grad_output_in_place ? 0 : positions * grad_output_stride; }
  int64_t dots_elements() const { return grads_at_positions ? blocks * taps * strip * kCorners<NDim> : 0; }

  // Taps are taken so many at a time that their columns fill a panel: one, unless a block has few channels. Then it is
  // the only panel.
  int64_t chunk_taps(const Block& block) const {
    const int64_t fitting = 2 * kLanes<T> / block.count;
    return least(fitting > 1 ? fitting : 1, taps);
  }
  int64_t chunks(const Block& block) const { return ceiling(taps, chunk_taps(block)); }
  // All of one width.
  Panels panels(const Block& block, int64_t chunk) const {
    const int64_t first = chunk * chunk_taps(block);
    const Panels panels = Panels::of<T>(least(chunk_taps(block), taps - first) * block.count);
    if (panels.whole == 0) return panels;
    return {panels.lanes, panels.columns, panels.count(), false};
  }
  // Elements that one block takes when its weights are packed: a panel of a chunk is (outputs of the group, padded
  // columns).
  int64_t packed_elements(const Block& block) const {
    if (this->depthwise) return taps * block.count;
    int64_t columns = 0;
    for (int64_t chunk = 0; chunk < chunks(block); ++chunk) columns += panels(block, chunk).padded();
    return columns * this->group_outputs;
  }

  // weight is (out, in, tap) and a packed block (chunk, panel, output of the group, column). Calls body(channels,
  // taps, first element of weight, first element of the packed block, packed distance from tap to tap) for
  // matrices that cover both.
  template <class Body>
  void for_each_weight_matrix(const Block& block, const Body& body) const {
    if (this->depthwise) return body(block.count, taps, block.first * taps, int64_t{0}, block.count);
    const int64_t outputs = this->group_outputs, input = block.first - block.group * this->group_inputs;
    const int64_t chunk_taps = this->chunk_taps(block);
    int64_t packed = 0;
    for (int64_t tap = 0; tap < taps; tap += chunk_taps) {
      const Panels panels = this->panels(block, tap / chunk_taps);
      // Chunks of a single tap lie at a constant distance, so one matrix takes them all.
      const bool all = chunk_taps == 1;
      for (int64_t panel = 0; panel < panels.count(); ++panel) {
        const int64_t first = panels.first(panel), width = panels.width(panel);
        for (int64_t output = 0; output < outputs; ++output)
          body(least(block.count - first, width), all ? taps : least(chunk_taps, taps - tap),
               (block.group * outputs + output) * terms + (input + first) * taps + tap,
               packed + first * outputs + output * width, all ? outputs * panels.padded() : block.count);
      }
      if (all) return;
      packed += outputs * panels.padded();
    }
  }
};

template <class T, int NDim>
struct BackwardBuffers {
  struct PackedBlock : Block {
    T* weights;
    T* grad_weight;
  };
  T* x;
  T* grad_x;
  T* grad_output;
  T* dots;
  T* zeros;
  PackedBlock* blocks;
  struct PerThread {
    BackwardSamples<T, NDim>* corners;
    Samples<T, NDim>* samples;
    T* columns;  // kPositionPiece positions of one chunk
    T* nowhere;  // where grad_x of corners without weight goes
  };
  PerThread* thread;

  BackwardBuffers(const BackwardPlan<T, NDim>& plan, Workspace& space) {
    const size_t images = plan.round_images;
    x = space.take<T>(images * plan.x.buffer_elements());
    grad_x = space.take<T>(images * plan.grad_x_elements());
    grad_output = space.take<T>(images * plan.grad_output_elements());
    dots =
        space.take<T>(images * plan.dots_elements() + kMostLanes * kCorners<NDim>);  // read in whole vectors
    zeros = space.take<T>(plan.block_channels);
    blocks = space.take<PackedBlock>(plan.blocks);
    int64_t index = 0;
    plan.for_each_block([&](const Block& block) {
      const size_t elements = plan.packed_elements(block);
      const PackedBlock packed = {block, space.take<T>(elements),
                                  space.take<T>(plan.grads_at_weight ? elements : 0)};
      if (blocks) blocks[index++] = packed;
    });
    thread = space.take<PerThread>(plan.threads);
    const size_t columns = kPositionPiece * kBlockChannels<T>;
    for (int i = 0; i < plan.threads; ++i) {
      const PerThread mine = {space.take<BackwardSamples<T, NDim>>(1), space.take<Samples<T, NDim>>(1),
                              space.take<T>(columns), space.take<T>(plan.block_channels)};
      if (!thread) continue;
      thread[i] = mine;
      // Lanes past the last column are multiplied too; their results are dropped, but they must hold numbers.
      __builtin_memset(mine.columns, 0, columns * sizeof(T));
      __builtin_memset(mine.nowhere, 0, plan.block_channels * sizeof(T));
    }
    if (zeros) __builtin_memset(zeros, 0, plan.block_channels * sizeof(T));
  }
};

}  // namespace dcn::DCN_ISA
