// grad_x, grad_offset and grad_mask of one round of images.
#pragma once

#include "backward_round.hpp"

namespace dcn::DCN_ISA {

template <class T, int NDim>
class PositionPass : public BackwardRound<T, NDim> {
 public:
  using BackwardRound<T, NDim>::BackwardRound;

  bool run() {
    if (!plan_.grads_at_x && !plan_.grads_at_positions) return true;
    for (int64_t strip = 0; strip < plan_.strips; ++strip) {
      const int64_t first = strip * plan_.strip, count = least(plan_.strip, plan_.positions - first);
      const bool finished = team_.run(plan_.blocks * images_, [&](int64_t item, int thread) {
        const int64_t slot = item / plan_.blocks;
        for (int64_t at = first; at < first + count && team_.keep_going(thread); at += kScatterPositions) {
          const Tile<NDim> tile(geometry(), at, least(kScatterPositions, first + count - at));
          scatter_block(slot, item % plan_.blocks, tile, at - first, buffers_.thread[thread]);
        }
      });
      if (!finished || !combine(first, count)) return false;
    }
    return true;
  }

 private:
  using Round = BackwardRound<T, NDim>;
  using Round::arguments_;
  using Round::buffers_;
  using Round::first_image_;
  using Round::geometry;
  using Round::grad_output_of;
  using Round::grad_x_of;
  using Round::images_;
  using Round::moved;
  using Round::plan_;
  using Round::team_;
  using Round::x_of;
  using typename Round::PackedBlock;
  using typename Round::Thread;
  static constexpr int kDotsEach = kCorners<NDim>;

  T* dots_of(int64_t slot, int64_t block, int64_t tap, int64_t position) const {
    return buffers_.dots + slot * plan_.dots_elements() +
           ((block * plan_.taps + tap) * plan_.strip + position) * kDotsEach;
  }

  void scatter_block(int64_t slot, int64_t index, const Tile<NDim>& tile, int64_t at, Thread& mine) {
    const PackedBlock& block = buffers_.blocks[index];
    const int64_t outputs = plan_.group_outputs, stride = plan_.grad_output_stride;
    if (plan_.depthwise) {
      const T* grad_output = grad_output_of(slot) + tile.first * stride + block.first;
      for (int64_t tap = 0; tap < plan_.taps; ++tap) {
        const T* weights = block.weights + tap * block.count;
        scatter_tap(slot, index, tile, tap, at, mine, [=](auto lanes, int64_t p, int64_t c) {
          using V = Vec<T, decltype(lanes)::count>;
          return load<V>(grad_output + p * stride + c) * load<V>(weights + c);
        });
      }
      return;
    }
    const T* grad_output = grad_output_of(slot) + tile.first * stride + block.group * outputs;
    const T* weights = block.weights;
    if (outputs == 0) __builtin_memset(mine.columns, 0, kScatterPositions * kBlockChannels<T> * sizeof(T));
    for (int64_t chunk = 0; chunk < plan_.chunks(block); ++chunk) {
      const Panels panels = plan_.panels(block, chunk);
      const int64_t width = panels.padded(), first = chunk * plan_.chunk_taps(block);
      for (int64_t panel = 0; panel < panels.count(); ++panel) {
        const int64_t column = panels.first(panel), after = column + panels.width(panel);
        multiply_panel<T>(panels, panel, tile.count, grad_output, stride, Terms{1, 0, outputs, 1}, kPiece,
                          weights + column * outputs, mine.columns + column, width, true,
                          plan_.weights_are_far() ? weights + after * outputs : nullptr);
      }
      for (int64_t tap = first; tap < least(first + plan_.chunk_taps(block), plan_.taps); ++tap) {
        const T* columns = mine.columns + (tap - first) * block.count;
        scatter_tap(slot, index, tile, tap, at, mine, [=](auto lanes, int64_t p, int64_t c) {
          return load<Vec<T, decltype(lanes)::count>>(columns + p * width + c);
        });
      }
      weights += outputs * width;
    }
  }

  template <class Gradient>
  void scatter_tap(int64_t slot, int64_t index, const Tile<NDim>& tile, int64_t tap, int64_t at, Thread& mine,
                   const Gradient& gradient) {
    const Block& block = buffers_.blocks[index];
    const Displacement<T, NDim> moved = this->moved(slot, block.offset_group);
    locate_corners(geometry(), tile, Tap<NDim>(geometry(), tap), moved, x_of(slot, block), buffers_.zeros,
                   grad_x_of(slot, block), mine.nowhere, *mine.corners);
    T* dots = plan_.grads_at_positions ? dots_of(slot, index, tap, at) : nullptr;
    with_distance<kHasNarrowLanes<T>>(mine.corners->near, [&](auto distance) {
      using Distance = decltype(distance);
      const auto pass = [&](int64_t channels) __attribute__((always_inline)) {
        if (!plan_.grads_at_positions)
          scatter_and_dot<Distance, false, true>(*mine.corners, tile.count, channels, gradient, dots);
        else if (!plan_.grads_at_x)
          scatter_and_dot<Distance, true, false>(*mine.corners, tile.count, channels, gradient, dots);
        else
          scatter_and_dot<Distance, true, true>(*mine.corners, tile.count, channels, gradient, dots);
      };
      with_channels<T>(block.count, pass);
    });
  }

  bool combine(int64_t first, int64_t count) {
    if (!plan_.grads_at_positions) return true;
    const int64_t tiles = ceiling(count, kScatterPositions), groups = geometry().offset_groups;
    return team_.run(tiles * groups * images_, [&](int64_t item, int) {
      const int64_t slot = item / (tiles * groups), group = item / tiles % groups;
      const int64_t at = item % tiles * kScatterPositions;
      const Tile<NDim> tile(geometry(), first + at, least(kScatterPositions, count - at));
      int64_t begin = 0, end;  // the blocks of the group follow each other
      while (begin < plan_.blocks && buffers_.blocks[begin].offset_group < group) ++begin;
      for (end = begin; end < plan_.blocks && buffers_.blocks[end].offset_group == group;) ++end;
      for (int64_t tap = 0; tap < plan_.taps; ++tap)
        combine_tap(slot, group, begin, end, tile, Tap<NDim>(geometry(), tap), at);
    });
  }

  void combine_tap(int64_t slot, int64_t group, int64_t begin, int64_t end, const Tile<NDim>& tile,
                   const Tap<NDim>& tap, int64_t at) {
    const Displacement<T, NDim> moved = this->moved(slot, group);
    const Displacement<T, NDim> gradients(arguments_.grad_offset, arguments_.grad_mask, arguments_.positions,
                                          plan_.taps, first_image_ + slot, group, geometry().offset_groups);
    gradients.expect_writes(tap.index + 1, tile.first, tile.count);
    with_lanes<T>(fits_narrow_lanes<NDim>(geometry()), [&](auto lanes) {
      using L = decltype(lanes);
      const TapNumbers<T, NDim> numbers(moved, tap.index, tile.first);
      for (int64_t p = 0; p < tile.count; p += L::count) {
        const int64_t position = tile.first + p, count = tile.count - p;
        typename L::Real dots[kDotsEach];
        sum_dots<L>(slot, begin, end, tap.index, at + p, dots);
        AxisSample<L> axes[NDim];
        locate<L>(geometry(), tile, tap, numbers, p, axes);
        const auto mask = numbers.template masks<L>(p, count);
        const PositionGradients<L, NDim> gradient = position_gradients<L, NDim>(axes, mask, dots);
        for (int axis = 0; axis < NDim; ++axis)
          gradients.template write_offsets<L>(tap.index, axis, position, count, gradient.offset[axis]);
        gradients.template write_masks<L>(tap.index, position, count, gradient.mask);
      }
    });
  }

  // The dots of L::count positions over the channels of blocks [begin, end), in their order. Past the last position
  // of a tile it reads what lies there, and nobody uses the result.
  template <class L>
  DCN_INLINE void sum_dots(int64_t slot, int64_t begin, int64_t end, int64_t tap, int64_t position,
                           typename L::Real (&dots)[kDotsEach]) {
    for (int i = 0; i < kDotsEach; ++i) dots[i] = typename L::Real{};
    for (int64_t index = begin; index < end; ++index) {
      const T* block = dots_of(slot, index, tap, position);
      for (int i = 0; i < kDotsEach; ++i) dots[i] += load<typename L::Real>(block + i * L::count);
    }
    deinterleave(dots);
  }
};

}  // namespace dcn::DCN_ISA
