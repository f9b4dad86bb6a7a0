// The gradients of positions, fused, in two dimensions: the columns' gradients are a product of grad_output and
// the weights on the tensor cores. They go to shared memory, and from there straight into grad_offset and
// grad_mask, by their dot products with the corners, and grad_x or, with `between`, to where add_in_order wants
// them.
//
// DCN_BM x DCN_BN: positions x channels of a tile; DCN_WM x DCN_WN: of a warp; DCN_STAGES: pairs of tiles of
// factors in shared memory. The rest is in fused.hpp. None of these but DCN_ROW decides a bit.
//
// Contract: x, grad_x and grad_output (`output`) are channels-last, their strides and addresses multiples of 16
// bytes, grad_output without gaps. weight is (taps, channels of a group, out_channels). The channels of a group
// and of an offset group are multiples of kChannels, the outputs of a group of a chunk.
// Blocks: taps, position tiles. Shared bytes: see fused.py.
#include "fused.hpp"

namespace dcn {
namespace {

constexpr int kBM = DCN_BM, kBN = DCN_BN, kWM = DCN_WM, kWN = DCN_WN, kStages = DCN_STAGES;
constexpr int kWarpsM = kBM / kWM, kThreads = kBM / kWM * (kBN / kWN) * kWarp;
constexpr int kGradTile = kBM * kRow, kWeightTile = kBN * kRow;
constexpr int kOutputs = kChannels;  // of one step
constexpr int kRowsAtOnce = kThreads / kChunks;
constexpr int kProducts = kRow / (2 * kChunk);  // of tiles, in one step

constexpr int kPiece = 256;            // the most products in one piece of a sum
constexpr int kPitch = kChannels + 8;  // floats in a row of columns' gradients
static_assert(kBN % kChannels == 0 && kBM % kRowsAtOnce == 0 && kBN % kRowsAtOnce == 0);

using Corners = CornersOf<L, P, 2>;

// A step: some outputs of a group, for a tile of the channels of that group.
struct Step {
  int output = 0, channel = 0;  // within the group
  int64_t group = 0;

  DCN_INLINE bool last_of_tile(int outputs) const { return output + kOutputs >= outputs; }
  DCN_INLINE void advance(int channels, int outputs) {
    output += kOutputs;
    if (output < outputs) return;
    output = 0, channel += kBN;
    if (channel < channels) return;
    channel = 0, ++group;
  }
};

}  // namespace

extern "C" __global__ void __launch_bounds__(kThreads, 1) fused_positions(const Arguments a) {
  const Geometry& geometry = a.geometry;
  unsigned char* const factors = dynamic_shared();  // kStages times a tile of grad_output and one of weights
  float* const columns = reinterpret_cast<float*>(factors + kStages * (kGradTile + kWeightTile));
  Corners* const corners = reinterpret_cast<Corners*>(columns + kBM * kPitch);
  float (*const dots)[kCorners] = reinterpret_cast<float (*)[kCorners]>(corners + kBM);

  const int channels = static_cast<int>(quotient(geometry.in_channels, geometry.groups));
  const int outputs = static_cast<int>(quotient(geometry.out_channels, geometry.groups));
  const int64_t of_offset_group = quotient(geometry.in_channels, geometry.offset_groups);
  const int64_t taps = taps_of(geometry);
  int64_t block = blockIdx.x;
  const int64_t tap = take(block, taps), first = a.first + block * kBM;
  const int positions = static_cast<int>(least(kBM, end_of(a) - first));
  const int thread = threadIdx.x, warp = thread / kWarp;
  const int row = warp % kWarpsM * kWM, column = warp / kWarpsM * kWN;
  const bool dots_wanted = a.grad_offset.data || a.grad_mask.data;

  // This thread copies and reads the same chunk of every kRowsAtOnce-th row of a tile.
  const int own_row = thread / kChunks, own_chunk = thread % kChunks;
  constexpr int kPerChunk = kChunk / static_cast<int>(sizeof(T));
  const int64_t pixel = geometry.out_channels * int64_t{sizeof(T)};  // bytes, and those of a row of weights
  const char* const own_grads = a.output.data + (first + own_row) * pixel + own_chunk * kChunk;
  const char* const own_weights =
      static_cast<const char*>(a.weight) + (tap * channels + own_row) * pixel + own_chunk * kChunk;

  const auto copy_factors = [&](const Step& step, int stage) {
    if (step.group < geometry.groups) {
      unsigned char* const grads = factors + stage * (kGradTile + kWeightTile);
      const int64_t skipped = (step.group * outputs + step.output) * int64_t{sizeof(T)};
      const bool chunk_exists = step.output + own_chunk * kPerChunk < outputs;
#pragma unroll 2
      for (int p = 0; p < kBM; p += kRowsAtOnce) {
        const bool exists = chunk_exists && p + own_row < positions;
        copy16_async(chunk_of(grads, p + own_row, own_chunk),
                     exists ? own_grads + p * pixel + skipped : a.output.data, exists);
      }
      const char* const from = own_weights + step.channel * pixel + skipped;
#pragma unroll 2
      for (int c = 0; c < kBN; c += kRowsAtOnce) {
        const bool exists = chunk_exists && step.channel + c + own_row < channels;
        copy16_async(chunk_of(grads + kGradTile, c + own_row, own_chunk),
                     exists ? from + c * pixel : static_cast<const char*>(a.weight), exists);
      }
    }
    commit_copies();
  };
  // Every position's corners and dots belong to one thread, but for a barrier between uses.
  const auto begin_offset_group = [&](int64_t offset_group) {
    for (int p = thread; p < kBM; p += kThreads) {
      corners[p] = Corners(a, first + p, tap, offset_group);
      for (int corner = 0; corner < kCorners; ++corner) dots[p][corner] = 0;
    }
  };
  const auto end_offset_group = [&](int64_t offset_group) {
    if (!dots_wanted) return;
    for (int p = thread; p < positions; p += kThreads)
      store_position_gradients<L, P, 2>(a, first + p, tap, offset_group, dots[p]);
  };
  // A slice of kChannels channels, from `channel` of x on, at one position.
  const auto use_columns = [&](int64_t channel, int p) {
    float grads[kPerChunk];
#pragma unroll
    for (int i = 0; i < kPerChunk; ++i) grads[i] = columns[p * kPitch + own_chunk * kPerChunk + i];
    const int64_t own_channel = channel + own_chunk * kPerChunk;
    if (dots_wanted) {
      float dot[kCorners];
#pragma unroll
      for (int corner = 0; corner < kCorners; ++corner) {
        const int64_t place = corners[p].place[corner];
        dot[corner] = 0;
        if (place >= 0)
          dot[corner] = Numbers<T>::dot(load_readonly(reinterpret_cast<const uint4*>(
                                            a.x.data + place + own_channel * int64_t{sizeof(T)})),
                                        grads);
      }
#pragma unroll
      for (int corner = 0; corner < kCorners; ++corner) {
#pragma unroll
        for (int lanes = kChunks / 2; lanes > 0; lanes /= 2) dot[corner] += shuffle_xor(dot[corner], lanes);
        if (own_chunk == 0) dots[p][corner] += dot[corner];
      }
    }
    if (a.between) {
      float* const to = static_cast<float*>(a.between) +
                        ((first + p - a.first) * taps + tap) * geometry.in_channels + own_channel;
#pragma unroll
      for (int i = 0; i < kPerChunk; i += 4)
        if (p < positions)
          *reinterpret_cast<float4*>(to + i) =
              make_float4(grads[i], grads[i + 1], grads[i + 2], grads[i + 3]);
    } else if (a.grad_x.data) {
#pragma unroll
      for (int corner = 0; corner < kCorners; ++corner) {
        const int64_t target = corners[p].target[corner];
        if (target < 0) continue;
        const float weight = corners[p].weight[corner];
        float* const to = reinterpret_cast<float*>(a.grad_x.data + target) + own_channel;
#pragma unroll
        for (int i = 0; i < kPerChunk; i += 4)
          add_in_memory4(to + i, weight * grads[i], weight * grads[i + 1], weight * grads[i + 2],
                         weight * grads[i + 3]);
      }
    }
  };

  WarpSums<kWM, kWN> sums, total;
  Step step, ahead;
  for (int i = 0; i < kStages - 1; ++i) {
    copy_factors(ahead, i);
    ahead.advance(channels, outputs);
  }
  int stage = 0, stage_ahead = kStages - 1, terms = 0;
#pragma unroll 1
  for (; step.group < geometry.groups; step.advance(channels, outputs)) {
    wait_for_copies<kStages - 2>();
    barrier();
    copy_factors(ahead, stage_ahead);
    ahead.advance(channels, outputs);
    unsigned char* const grads = factors + stage * (kGradTile + kWeightTile);
#pragma unroll 1
    for (int i = 0; i < kProducts; ++i) sums.add(grads, row, grads + kGradTile, column, i);
    stage = stage + 1 == kStages ? 0 : stage + 1;
    stage_ahead = stage_ahead + 1 == kStages ? 0 : stage_ahead + 1;
    const bool last = step.last_of_tile(outputs);
    terms += kOutputs;
    if (kInPieces && (last || terms + kOutputs > kPiece)) sums.move_to(total), terms = 0;
    if (!last) continue;

    WarpSums<kWM, kWN>& finished = kInPieces ? total : sums;
#pragma unroll 1
    for (int from = 0; from < kBN && step.channel + from < channels; from += kChannels) {
      const int64_t channel = step.group * channels + step.channel + from;
      const int64_t offset_group = quotient(channel, of_offset_group);
      if (channel == offset_group * of_offset_group) {
        if (channel > 0) end_offset_group(offset_group - 1);
        begin_offset_group(offset_group);
      }
      finished.template store_columns<kChannels, kPitch>(row, column, from, columns);
      barrier();
#pragma unroll 1
      for (int p = own_row; p < kBM; p += kRowsAtOnce) use_columns(channel, p);
      barrier();
    }
    finished = {};
  }
  wait_for_copies<0>();
  end_offset_group(geometry.offset_groups - 1);
}

}  // namespace dcn
