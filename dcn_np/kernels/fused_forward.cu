// The fused forward pass, in two dimensions: samples go to shared memory and from there to the tensor cores; no
// column exists anywhere else.
//
// DCN_BM x DCN_BN: positions x outputs of a block; DCN_WM x DCN_WN: of a warp; DCN_STAGES: tiles of weights in
// shared memory. The rest is in fused.hpp. None of these but DCN_ROW decides a bit: the channels of one step, then
// taps, then further channels is the order of every sum.
//
// Contract: x is channels-last, all its strides and its address multiples of 16 bytes, and the images of a tile
// lie within 2^27 chunks. weight is (taps, out_channels, channels of a group). The channels of a group and of an
// offset group are multiples of kChannels. Blocks: output tiles of a group, groups, position tiles.
// Shared bytes: see fused.py.
#include "fused.hpp"

namespace dcn {
namespace {

constexpr int kBM = DCN_BM, kBN = DCN_BN, kWM = DCN_WM, kWN = DCN_WN, kStages = DCN_STAGES;
constexpr int kWarpsM = kBM / kWM, kThreads = kBM / kWM * (kBN / kWN) * kWarp;
constexpr int kColumnTile = kBM * kRow, kWeightTile = kBN * kRow;
constexpr int kChunksPerThread = kBM * kChunks / kThreads;
constexpr int kProducts = kRow / (2 * kChunk);  // of tiles, in one step
// The columns of the next step come in so many parts: with large tiles of sums few registers are left for them.
constexpr int kParts = kChunksPerThread < kProducts ? kChunksPerThread : kProducts;
constexpr int kAtOnce = kChunksPerThread / kParts, kProductsPerPart = kProducts / kParts;
constexpr int kStepsPerPiece = 128 / kChannels;
constexpr int kPitch = 65;  // floats in a row of results on their way out, 64 of them used
static_assert(kBM * kChunks % kThreads == 0 && kChunksPerThread % kParts == 0 && kProducts % kParts == 0);

// A step: some channels of one tap.
struct Step {
  int tap = 0, channel = 0;  // the latter within the group

  DCN_INLINE void advance(int taps) {
    if (++tap == taps) tap = 0, channel += kChannels;
  }
};

}  // namespace

extern "C" __global__ void __launch_bounds__(kThreads, 1) fused_forward(const Arguments a) {
  const Geometry& geometry = a.geometry;
  const int taps = static_cast<int>(taps_of(geometry));
  unsigned char* const columns = dynamic_shared();           // 2 tiles
  unsigned char* const weights = columns + 2 * kColumnTile;  // kStages tiles
  const SampleTable table(weights + kStages * kWeightTile, taps * kBM);

  const int channels = static_cast<int>(quotient(geometry.in_channels, geometry.groups));
  const int outputs = static_cast<int>(quotient(geometry.out_channels, geometry.groups));
  const int of_offset_group = static_cast<int>(quotient(geometry.in_channels, geometry.offset_groups));
  int64_t block = blockIdx.x;
  const int first_output = static_cast<int>(take(block, ceiling(outputs, kBN))) * kBN;
  const int64_t group = take(block, geometry.groups);
  const int first_channel = static_cast<int>(group) * channels;
  const int64_t first = a.first + block * kBM;
  const int64_t first_image = quotient(first, output_positions(geometry));
  const int steps = channels / kChannels * taps;
  const int thread = threadIdx.x, warp = thread / kWarp;
  const int row = warp % kWarpsM * kWM, column = warp / kWarpsM * kWN;
  const int row_chunks = static_cast<int>(a.x.axis[0] / kChunk);
  const int column_chunks = static_cast<int>(a.x.axis[1] / kChunk);

  // This thread copies, loads and stores the same chunk of every kThreads / kChunks-th row of a tile.
  const int own_row = thread / kChunks, own_chunk = thread % kChunks;
  const char* const images =
      a.x.data + first_image * a.x.batch + first_channel * int64_t{sizeof(T)} + own_chunk * kChunk;
  const int64_t weight_row = channels * int64_t{sizeof(T)};
  const char* const own_weights = static_cast<const char*>(a.weight) + own_chunk * kChunk +
                                  (group * outputs + first_output + own_row) * weight_row;

  const auto fill_table = [&](int channel) {
    for (int i = thread; i < taps * kBM; i += kThreads)
      table.fill(a, i, first + i % kBM, i / kBM, (first_channel + channel) / of_offset_group, first_image);
  };
  const auto copy_weights = [&](const Step& step, int stage) {
    if (step.channel < channels) {
      const char* from =
          own_weights + step.tap * geometry.out_channels * weight_row + step.channel * int64_t{sizeof(T)};
      unsigned char* const to = weights + stage * kWeightTile;
#pragma unroll 2
      for (int o = own_row; o < kBN; o += kThreads / kChunks) {
        const bool exists = first_output + o < outputs;
        copy16_async(chunk_of(to, o, own_chunk), exists ? from : static_cast<const char*>(a.weight), exists);
        from += kThreads / kChunks * weight_row;
      }
    }
    commit_copies();
  };
  CornerChunks corners[kAtOnce];
  const auto load_columns = [&](const Step& step, int part) {
    const uint4* from = reinterpret_cast<const uint4*>(images + step.channel * int64_t{sizeof(T)});
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      const int p = own_row + (part * kAtOnce + i) * (kThreads / kChunks);
      corners[i].load(from, table.places[step.tap * kBM + p], row_chunks, column_chunks);
    }
  };
  const auto store_columns = [&](const Step& step, int part, unsigned char* tile) {
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      const int p = own_row + (part * kAtOnce + i) * (kThreads / kChunks);
      *reinterpret_cast<uint4*>(chunk_of(tile, p, own_chunk)) =
          corners[i].combined(table.weights[step.tap * kBM + p]);
    }
  };
  WarpSums<kWM, kWN> sums, total;
  Step next, ahead;  // of columns, of weights
  fill_table(0);
  int next_table = of_offset_group - first_channel % of_offset_group;  // the channel that needs another one
  for (int i = 0; i < kStages - 1; ++i) {
    copy_weights(ahead, i);
    ahead.advance(taps);
  }
  barrier();
#pragma unroll
  for (int part = 0; part < kParts; ++part) {
    load_columns(next, part);
    store_columns(next, part, columns);
  }
  int stage = 0, stage_ahead = kStages - 1;
#pragma unroll 1
  for (int number = 0; number < steps; ++number) {
    next.advance(taps);
    const bool more = number + 1 < steps;
    wait_for_copies<kStages - 2>();
    barrier();
    // Everyone has stored the columns of this step, so that nobody reads the table.
    if (more && next.channel == next_table) {
      fill_table(next.channel);
      next_table += of_offset_group;
      barrier();
    }
    copy_weights(ahead, stage_ahead);
    ahead.advance(taps);
    unsigned char* const left = columns + number % 2 * kColumnTile;
    unsigned char* const left_next = columns + (1 - number % 2) * kColumnTile;
    unsigned char* const right = weights + stage * kWeightTile;
#pragma unroll
    for (int i = 0; i < kProducts; ++i) {
      // Loads are under way while the tiles multiply.
      if (more && i % kProductsPerPart == 0) load_columns(next, i / kProductsPerPart);
      sums.add(left, row, right, column, i);
      if (more && (i + 1) % kProductsPerPart == 0) store_columns(next, i / kProductsPerPart, left_next);
    }
    if (kInPieces && number % kStepsPerPiece == kStepsPerPiece - 1) sums.move_to(total);
    stage = stage + 1 == kStages ? 0 : stage + 1;
    stage_ahead = stage_ahead + 1 == kStages ? 0 : stage_ahead + 1;
  }
  if (kInPieces) sums.move_to(total);

  // Through shared memory, 64 outputs at a time, so that neighbouring threads write side by side whichever way y
  // lies. Where each position lies in y comes first.
  float* const results = reinterpret_cast<float*>(dynamic_shared());
  int64_t* const places = reinterpret_cast<int64_t*>(results + kBM * kPitch);
  wait_for_copies<0>();
  barrier();
  for (int p = thread; p < kBM; p += kThreads)
    places[p] = first + p < end_of(a)
                    ? Position<2>(geometry, first + p).template in<char>(a.output, 0) - a.output.data
                    : -1;
  const bool along_outputs = a.output.channel == int64_t{sizeof(T)};
  for (int from = 0; from < kBN; from += 64) {
    (kInPieces ? total : sums).store_columns<64, kPitch>(row, column, from, results);
    barrier();
    for (int i = thread; i < kBM * 64; i += kThreads) {
      const int p = along_outputs ? i / 64 : i % kBM, o = along_outputs ? i % 64 : i / kBM;
      const int64_t output = group * outputs + first_output + from + o;
      if (places[p] < 0 || first_output + from + o >= outputs) continue;
      const float bias = a.bias ? widened(load(static_cast<const T*>(a.bias) + output)) : 0.0f;
      store(reinterpret_cast<T*>(a.output.data + places[p] + output * a.output.channel),
            results[p * kPitch + o] + bias);
    }
    barrier();
  }
}

}  // namespace dcn
