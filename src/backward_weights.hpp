// grad_weight and grad_bias of one round of images, added to those of the rounds before.
#pragma once

#include "backward_round.hpp"

namespace dcn::DCN_ISA {

template <class T, int NDim>
class WeightPass : public BackwardRound<T, NDim> {
 public:
  using BackwardRound<T, NDim>::BackwardRound;

  bool run() {
    // An item takes several chunks of taps, which find the same pixels in the cache, unless threads would
    // stay idle.
    int64_t most_chunks = 0;
    for (int64_t i = 0; i < plan_.blocks; ++i) {
      const int64_t chunks = weight_chunks(buffers_.blocks[i]);
      if (chunks > most_chunks) most_chunks = chunks;
    }
    const int64_t fair = ceiling(3 * plan_.threads, plan_.blocks > 0 ? plan_.blocks : 1);
    const int64_t parts = least(fair, most_chunks);
    const int64_t items = plan_.grads_at_weight ? plan_.blocks * parts : 0;
    constexpr int64_t kBiases = 64;
    const int64_t biases = arguments_.grad_bias ? ceiling(geometry().out_channels, kBiases) : 0;
    return team_.run(items + biases, [&](int64_t item, int thread) {
      if (item >= items) {
        const int64_t first = (item - items) * kBiases;
        return sum_bias(first, least(kBiases, geometry().out_channels - first));
      }
      const PackedBlock& block = buffers_.blocks[item / parts];
      const int64_t chunks = weight_chunks(block), part = item % parts;
      weigh(block, chunks * part / parts, chunks * (part + 1) / parts, thread);
    });
  }

 private:
  using Round = BackwardRound<T, NDim>;
  using Round::arguments_;
  using Round::buffers_;
  using Round::first_image_;
  using Round::geometry;
  using Round::grad_output_of;
  using Round::images_;
  using Round::moved;
  using Round::plan_;
  using Round::team_;
  using Round::x_of;
  using typename Round::PackedBlock;
  using typename Round::Thread;

  // Chunks of taps that are summed on their own; a depthwise block has no matrices, and a chunk is a tap.
  int64_t weight_chunks(const Block& block) const {
    return plan_.depthwise ? plan_.taps : plan_.chunks(block);
  }

  void weigh(const PackedBlock& block, int64_t first_chunk, int64_t last_chunk, int thread) {
    for (int64_t slot = 0; slot < images_; ++slot)
      for (int64_t first = 0; first < plan_.positions; first += kPositionPiece)
        for (int64_t chunk = first_chunk; chunk < last_chunk; ++chunk) {
          if (!team_.keep_going(thread)) return;
          const int64_t count = least(kPositionPiece, plan_.positions - first);
          if (plan_.depthwise)
            weigh_piece_per_channel(slot, block, chunk, first, count, buffers_.thread[thread]);
          else
            weigh_piece(slot, block, chunk, first, count, buffers_.thread[thread]);
        }
  }

  // Gathers `taps` taps of a block for a piece of positions, a tile at a time: body(tile, first position,
  // tap).
  template <class Body>
  void for_each_sampled_tap(int64_t slot, const Block& block, int64_t first_tap, int64_t taps, int64_t first,
                            int64_t count, Thread& mine, const Body& body) {
    static_assert(kPositionPiece % kGatherPositions == 0 && kGatherPositions <= kTilePositions);
    const Pixels<NDim> pixels = x_of(slot, block);
    const Displacement<T, NDim> moved = this->moved(slot, block.offset_group);
    for (int64_t at = 0; at < count; at += kGatherPositions) {
      const Tile<NDim> tile(geometry(), first + at, least(kGatherPositions, count - at));
      for (int64_t tap = first_tap; tap < first_tap + taps; ++tap) {
        locate_values(geometry(), tile, Tap<NDim>(geometry(), tap), moved, pixels, buffers_.zeros,
                      *mine.samples);
        body(tile, at, tap);
      }
    }
  }

  void weigh_piece(int64_t slot, const PackedBlock& block, int64_t chunk, int64_t first, int64_t count,
                   Thread& mine) {
    const int64_t chunk_taps = plan_.chunk_taps(block), first_tap = chunk * chunk_taps;
    const int64_t outputs = plan_.group_outputs, stride = plan_.grad_output_stride;
    const Panels panels = plan_.panels(block, chunk);
    const int64_t width = panels.width(0);
    T* grad_weight = block.grad_weight;
    for (int64_t i = 0; i < chunk; ++i) grad_weight += plan_.panels(block, i).padded() * outputs;
    for_each_sampled_tap(slot, block, first_tap, least(chunk_taps, plan_.taps - first_tap), first, count,
                         mine, [&](const Tile<NDim>& tile, int64_t at, int64_t tap) {
                           T* columns = mine.columns + at * width + (tap - first_tap) * block.count;
                           gather_columns<T, NDim>(
                               *mine.samples, tile.count, block.count, [=](int64_t p, int64_t c) {
                                 constexpr int64_t kPanel = 2 * kLanes<T>;
                                 return columns + c / kPanel * kPanel * count + p * width + c % kPanel;
                               });
                         });
    const T* grad_output = grad_output_of(slot) + first * stride + block.group * outputs;
    for (int64_t panel = 0; panel < panels.count(); ++panel)
      multiply_panel<T>(panels, panel, outputs, grad_output, 1, Terms{1, 0, count, stride}, kPiece,
                        mine.columns + panels.first(panel) * count,
                        grad_weight + panels.first(panel) * outputs, width, false);
  }

  void weigh_piece_per_channel(int64_t slot, const PackedBlock& block, int64_t tap, int64_t first,
                               int64_t count, Thread& mine) {
    T* piece = mine.columns;
    __builtin_memset(piece, 0, block.count * sizeof(T));
    const int64_t stride = plan_.grad_output_stride;
    for_each_sampled_tap(
        slot, block, tap, 1, first, count, mine, [&](const Tile<NDim>& tile, int64_t at, int64_t) {
          const T* grad_output = grad_output_of(slot) + (first + at) * stride + block.first;
          gather<T, NDim>(
              *mine.samples, tile.count, block.count, [&](auto, int64_t p, int64_t c, auto sample) {
                using V = decltype(sample);
                store(piece + c, load<V>(piece + c) + sample * load<V>(grad_output + p * stride + c));
              });
        });
    T* grad_weight = block.grad_weight + tap * block.count;
    for (int64_t c = 0; c < block.count; ++c) grad_weight[c] += piece[c];
  }

  void sum_bias(int64_t first, int64_t count) {
    T* grad_bias = static_cast<T*>(arguments_.grad_bias) + first;
    const int64_t stride = plan_.grad_output_stride;
    for_each_vector<T>(count, [&](auto lanes, int64_t c) {
      using V = Vec<T, decltype(lanes)::count>;
      V total = load<V>(grad_bias + c);
      for (int64_t slot = 0; slot < images_; ++slot)
        for (int64_t at = 0; at < plan_.positions; at += kPositionPiece) {
          const T* grad_output = grad_output_of(slot) + at * stride + first + c;
          V piece = {};
          for (int64_t p = 0; p < least(kPositionPiece, plan_.positions - at); ++p)
            piece += load<V>(grad_output + p * stride);
          total += piece;
        }
      store(grad_bias + c, total);
    });
  }
};

}  // namespace dcn::DCN_ISA
