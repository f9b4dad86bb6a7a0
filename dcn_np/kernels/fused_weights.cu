// The weights' gradient, fused, in two dimensions: a product of grad_output and samples over positions. Both lie
// in shared memory as they come, positions apart, and are turned on their way to the tensor cores.
//
// DCN_BM x DCN_BN: outputs x channels of a block; DCN_WM x DCN_WN: of a warp; DCN_STAGES: tiles of grad_output in
// shared memory. The rest is in fused.hpp, with DCN_ROW the bytes of the positions of one step if they lay side
// by side. None of these decides a bit: the order of every sum is that of positions, in the parts of parts.hpp.
//
// Contract: x and grad_output (`output`) as for fused_positions.cu; `between` gets the parts. A tile lies within
// one group and one offset group: a run of channels.
// Blocks: channel tiles of a run, runs, output tiles of a group, taps, parts. Shared bytes: see fused.py.
#include "fused.hpp"
#include "parts.hpp"

namespace dcn {
namespace {

constexpr int kBM = DCN_BM, kBN = DCN_BN, kWM = DCN_WM, kWN = DCN_WN, kStages = DCN_STAGES;
constexpr int kWarps = kBM / kWM * (kBN / kWN), kWarpsM = kBM / kWM, kThreads = kWarps * kWarp;
constexpr int kPositions = kChannels;  // of one step
constexpr int kPerChunk = kChunk / static_cast<int>(sizeof(T));
constexpr int kProducts = kRow / (2 * kChunk);  // of tiles, in one step

constexpr int kStepsPerPiece = kPartPiece / kPositions;

// Samples are looked up kTable positions at a time, half the warps' worth of steps ahead.
constexpr int kTable = kThreads, kStepsPerTable = kTable / kPositions;
constexpr int kFilling = kStepsPerTable / 2;  // steps that fill the next table
static_assert(kStepsPerTable > 1 && kWarps % kFilling == 0 && kPartPiece % kPositions == 0);

// Tiles with kColumns numbers at each of kPositions positions: blocks of kRow bytes a position.
template <int kColumns>
struct TurnedTile {
  static constexpr int kChunksPerPosition = kColumns / kPerChunk;
  static constexpr int kBytes = kPositions * kColumns * static_cast<int>(sizeof(T));
  static constexpr int kPerThread = kPositions * kChunksPerPosition / kThreads;
  static_assert(kColumns % kChannels == 0 && kPositions * kChunksPerPosition % kThreads == 0);

  // Chunk c of position p. Their order changes with p, so that neither a row nor a column of chunks meets one
  // bank twice; single numbers are read from a column of eight, matrices from a column of one.
  static DCN_INLINE unsigned char* chunk(unsigned char* tile, int p, int c) {
    constexpr int kTurn = sizeof(T) == sizeof(float) ? 2 : 1, kRowsPerLine = 128 / kRow;
    return tile + (c / kChunks * kPositions + p) * kRow +
           ((c % kChunks) ^ (p / kRowsPerLine * kTurn % kChunks)) * kChunk;
  }
  // The chunks of one thread, a row of kRow bytes by neighbouring threads.
  static DCN_INLINE int own_position(int number) {
    return (threadIdx.x + number * kThreads) / kChunks % kPositions;
  }
  static DCN_INLINE int own_chunk(int number) {
    return (threadIdx.x + number * kThreads) / (kChunks * kPositions) * kChunks + threadIdx.x % kChunks;
  }
};
using GradTile = TurnedTile<kBM>;
using ColumnTile = TurnedTile<kBN>;

// 16 columns, from `column` on, over the positions of product `step`, each a row of the matrix: two operands
// side by side (kRight: the right one of a product) or one.
template <class Tile, bool kRight>
DCN_INLINE void load_turned(uint32_t (&bits)[4], unsigned char* tile, int column, int step) {
  const int lane = threadIdx.x % kWarp;
  if constexpr (sizeof(T) == sizeof(float)) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int p = step * 8 + lane % 4 + (kRight ? i % 2 : i / 2) * 4;
      const int c = column + lane / 4 + (kRight ? i / 2 : i % 2) * 8;
      bits[i] = reinterpret_cast<const uint32_t*>(Tile::chunk(tile, p, c / kPerChunk))[c % kPerChunk];
    }
  } else {
    const int second = lane / 8 % 2, fourth = lane / 16;
    load_matrices_transposed(bits, Tile::chunk(tile, step * 16 + lane % 8 + (kRight ? second : fourth) * 8,
                                               column / kPerChunk + (kRight ? fourth : second)));
  }
}

}  // namespace

extern "C" __global__ void __launch_bounds__(kThreads, 1) fused_weights(const Arguments a) {
  const Geometry& geometry = a.geometry;
  unsigned char* const columns = dynamic_shared();                // 2 tiles
  unsigned char* const grads = columns + 2 * ColumnTile::kBytes;  // kStages tiles
  unsigned char* const tables = grads + kStages * GradTile::kBytes;
  const SampleTable table(tables, 2 * kTable);

  const int64_t channels = quotient(geometry.in_channels, geometry.groups);
  const int64_t outputs = quotient(geometry.out_channels, geometry.groups);
  const int64_t of_offset_group = quotient(geometry.in_channels, geometry.offset_groups);
  const int64_t run = common_divisor(channels, of_offset_group);
  int64_t block = blockIdx.x;
  const int64_t in_run = take(block, ceiling(run, kBN)) * kBN;
  const int64_t first_channel = take(block, quotient(geometry.in_channels, run)) * run + in_run;
  const int64_t group = quotient(first_channel, channels),
                offset_group = quotient(first_channel, of_offset_group);
  const int64_t first_output = take(block, ceiling(outputs, kBM)) * kBM;
  const int64_t tap = take(block, taps_of(geometry)), part = block;
  const int64_t begin = a.first + part * part_length(a), end = least(begin + part_length(a), end_of(a));
  const int steps = begin < end ? static_cast<int>(ceiling(end - begin, kPositions)) : 0;
  const int thread = threadIdx.x, warp = thread / kWarp;
  const int row = warp % kWarpsM * kWM, column = warp / kWarpsM * kWN;
  const int row_chunks = static_cast<int>(a.x.axis[0] / kChunk);
  const int column_chunks = static_cast<int>(a.x.axis[1] / kChunk);
  const int last_chunk = static_cast<int>(least(run - in_run, kBN)) / kPerChunk;  // and one
  const int last_grad = static_cast<int>(least(outputs - first_output, kBM)) / kPerChunk;
  const int64_t pixel = geometry.out_channels * int64_t{sizeof(T)};
  const char* const own_grads = a.output.data + (group * outputs + first_output) * int64_t{sizeof(T)};

  // The image that places in a table count from.
  const auto base_of = [&](int number) {
    return quotient(begin + int64_t{number} * kTable, output_positions(geometry));
  };
  const auto fill_sample = [&](int number, int index) {
    table.fill(a, number % 2 * kTable + index, begin + int64_t{number} * kTable + index, tap, offset_group,
               base_of(number));
  };
  const auto copy_grads = [&](int step, int stage) {
    if (step < steps) {
      const int64_t number = begin + int64_t{step} * kPositions;
      const int left = static_cast<int>(least(end - number, kPositions));
#pragma unroll 2
      for (int i = 0; i < GradTile::kPerThread; ++i) {
        const int p = GradTile::own_position(i), c = GradTile::own_chunk(i);
        const bool exists = p < left && c < last_grad;
        copy16_async(GradTile::chunk(grads + stage * GradTile::kBytes, p, c),
                     exists ? own_grads + (number + p) * pixel + c * kChunk : a.output.data, exists);
      }
    }
    commit_copies();
  };
  // The columns of the next step come in so many parts: with large tiles of sums few registers are left.
  constexpr int kParts = ColumnTile::kPerThread < kProducts ? ColumnTile::kPerThread : kProducts;
  constexpr int kAtOnce = ColumnTile::kPerThread / kParts, kProductsPerPart = kProducts / kParts;
  static_assert(ColumnTile::kPerThread % kParts == 0 && kProducts % kParts == 0);
  CornerChunks corners[kAtOnce];
  const auto sample_of = [&](int step, int p) { return step % (2 * kStepsPerTable) * kPositions + p; };
  const auto load_columns = [&](int step, int part, const uint4* images) {
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      const int number = part * kAtOnce + i, c = ColumnTile::own_chunk(number);
      const int sample = table.places[sample_of(step, ColumnTile::own_position(number))];
      corners[i].load(images + c, c < last_chunk ? sample : 0, row_chunks, column_chunks);
    }
  };
  const auto store_columns = [&](int step, int part, unsigned char* tile) {
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      const int number = part * kAtOnce + i, p = ColumnTile::own_position(number);
      *reinterpret_cast<uint4*>(ColumnTile::chunk(tile, p, ColumnTile::own_chunk(number))) =
          corners[i].combined(table.weights[sample_of(step, p)]);
    }
  };
  const auto images_of = [&](int step) {
    const char* const image = a.x.data + base_of(step / kStepsPerTable) * a.x.batch;
    return reinterpret_cast<const uint4*>(image + first_channel * int64_t{sizeof(T)});
  };

  WarpSums<kWM, kWN> sums, total;
  fill_sample(0, thread);
  for (int i = 0; i < kStages - 1; ++i) copy_grads(i, i);
  barrier();
  const uint4* images = images_of(0);
#pragma unroll
  for (int part = 0; part < kParts; ++part) {
    load_columns(0, part, images);
    store_columns(0, part, columns);
  }
  int stage = 0, stage_ahead = kStages - 1;
#pragma unroll 1
  for (int step = 0; step < steps; ++step) {
    const int next = step + 1, in_table = step % kStepsPerTable;
    const bool more = next < steps;
    wait_for_copies<kStages - 2>();
    barrier();
    copy_grads(step + kStages - 1, stage_ahead);
    // Some of the warps at a time, while the others multiply; done before the step whose next one reads it.
    if (in_table < kFilling && warp / (kWarps / kFilling) == in_table)
      fill_sample(step / kStepsPerTable + 1, thread);
    if (next % kStepsPerTable == 0) images = images_of(next);
    unsigned char* const left = grads + stage * GradTile::kBytes;
    unsigned char* const right = columns + step % 2 * ColumnTile::kBytes;
    unsigned char* const right_next = columns + next % 2 * ColumnTile::kBytes;
#pragma unroll
    for (int i = 0; i < kProducts; ++i) {
      // Loads are under way while the tiles multiply.
      if (more && i % kProductsPerPart == 0) load_columns(next, i / kProductsPerPart, images);
      sums.add_product(
          [&](uint32_t (&bits)[4], int o) { load_turned<GradTile, false>(bits, left, row + o, i); },
          [&](uint32_t (&bits)[4], int c) { load_turned<ColumnTile, true>(bits, right, column + c, i); });
      if (more && (i + 1) % kProductsPerPart == 0) store_columns(next, i / kProductsPerPart, right_next);
    }
    if (kInPieces && step % kStepsPerPiece == kStepsPerPiece - 1) sums.move_to(total);
    stage = stage + 1 == kStages ? 0 : stage + 1;
    stage_ahead = stage_ahead + 1 == kStages ? 0 : stage_ahead + 1;
  }
  wait_for_copies<0>();
  if (kInPieces) sums.move_to(total);
  (kInPieces ? total : sums).for_each_pair([&](int o, int c, float first, float second) {
    o += row, c += column;
    if (o >= last_grad * kPerChunk || c >= last_chunk * kPerChunk) return;
    float* const to = partial_weight<float>(a, part, tap, group * outputs + first_output + o,
                                            first_channel + c - group * channels);
    to[0] = first, to[1] = second;
  });
}

}  // namespace dcn
