// The plain kernels: every dtype, rank and group layout, on every architecture.
//
// DCN_T: what images, weights and results are stored in; DCN_P: offsets and masks; DCN_NDIM: the rank.
//
// `tiled` kernels make a product of tiles in shared memory; `direct` ones, for few outputs or channels per
// group, leave every product to the thread that needs it. Both exist of each step:
//
//     forward    y                      weight is (taps, channels of a group, out_channels)
//     positions  grad_offset, grad_mask, and grad_x or, with `between`, the columns' gradients
//                                       weight is (taps, out_channels, channels of a group)
//     weights    `between`: (parts, taps, out_channels, channels of a group), to be added up
//
// x, and the gradient of the output in `output`, are channels-last; y is as the caller wants it. An array
// whose data is null is not wanted. The grid has one axis; the numbers below count its blocks.
#include "locating.hpp"
#include "parts.hpp"

namespace dcn {
namespace {

using T = DCN_T;
using P = DCN_P;
using R = Sum<T>;
using L = ScalarLanes<R>;
constexpr int kDims = DCN_NDIM;
constexpr int kCorners = 1 << kDims;

constexpr int kThreads = 256;
constexpr int kTile = 64;           // positions, outputs or channels on one side of a tile
constexpr int kStep = 16;           // terms that are added per step
constexpr int kPart = 4;            // a thread has kPart x kPart sums of a tile
constexpr int kOutputPiece = 128;   // the most products that are added before the sum is put aside, in y
constexpr int kPiece = kPartPiece;  // the same in gradients
constexpr int kWarp = 32;
static_assert(kThreads == (kTile / kPart) * (kTile / kPart), "one square of sums per thread");

// The corners that give a sample its value.
struct Reads {
  int64_t place[kCorners];  // bytes from the beginning of x; -1: not read
  R weight[kCorners];       // with the mask

  Reads() = default;
  DCN_INLINE Reads(const Arguments& a, int64_t number, int64_t tap, int64_t offset_group) {
    if (number >= end_of(a)) {
      for (int corner = 0; corner < kCorners; ++corner) place[corner] = -1, weight[corner] = 0;
      return;
    }
    const Position<kDims> position(a.geometry, number);
    AxisSample<L> axes[kDims];
    locate<L, P>(a, position, tap, offset_group, axes);
    const R mask = mask_of<L, P>(a, position, tap, offset_group);
#pragma unroll
    for (int corner = 0; corner < kCorners; ++corner) {
      bool used;
      weight[corner] = masked_weight<L, kDims>(axes, corner, mask, used);
      place[corner] = used ? corner_place<L>(axes, corner, position.image, a.x) : -1;
    }
  }

  DCN_INLINE R sample(const Arguments& a, int64_t channel) const {
    R value = 0;
#pragma unroll
    for (int corner = 0; corner < kCorners; ++corner)
      value += weight[corner] * pixel(a, place[corner], channel);
    return value;
  }

  static DCN_INLINE R pixel(const Arguments& a, int64_t place, int64_t channel) {
    return place < 0 ? R(0) : R(widened(load(reinterpret_cast<const T*>(a.x.data + place) + channel)));
  }
};

// A square of sums, each in pieces: a piece starts from zero and is then added to the total.
struct Sums {
  R piece[kPart][kPart] = {}, total[kPart][kPart] = {};
  int terms = 0;

  // rows[k][i] * columns[k][j]; this thread's rows are kTile / kPart apart, its columns side by side.
  DCN_INLINE void add(const R (&rows)[kStep][kTile], const R (&columns)[kStep][kTile], int count, int most) {
    const int row = threadIdx.x % (kTile / kPart), column = threadIdx.x / (kTile / kPart) * kPart;
    for (int k = 0; k < count; ++k)
#pragma unroll
      for (int i = 0; i < kPart; ++i)
#pragma unroll
        for (int j = 0; j < kPart; ++j)
          piece[i][j] += rows[k][row + i * (kTile / kPart)] * columns[k][column + j];
    terms += count;
    if (terms + kStep > most) put_aside();
  }

  DCN_INLINE void put_aside() {
#pragma unroll
    for (int i = 0; i < kPart; ++i)
#pragma unroll
      for (int j = 0; j < kPart; ++j) total[i][j] += piece[i][j], piece[i][j] = 0;
    terms = 0;
  }

  // Calls body(row, column, sum).
  template <class Body>
  DCN_INLINE void for_each(const Body& body) {
    put_aside();
    const int row = threadIdx.x % (kTile / kPart), column = threadIdx.x / (kTile / kPart) * kPart;
#pragma unroll
    for (int i = 0; i < kPart; ++i)
#pragma unroll
      for (int j = 0; j < kPart; ++j) body(row + i * (kTile / kPart), column + j, total[i][j]);
  }
};

// One running sum in pieces.
struct LongSum {
  R piece = 0, total = 0;
  int terms = 0, most;

  DCN_INLINE explicit LongSum(int most) : most(most) {}
  DCN_INLINE void add(R a, R b) {
    piece += a * b;
    if (++terms == most) total += piece, piece = 0, terms = 0;
  }
  DCN_INLINE R sum() const { return total + piece; }
};

DCN_INLINE R bias_of(const Arguments& a, int64_t output) {
  return a.bias ? R(widened(load(static_cast<const T*>(a.bias) + output))) : R(0);
}

// The channels of one weight group that lie in one offset group, from `begin` on.
struct Segment {
  int64_t offset_group, begin, end;

  DCN_INLINE Segment(const Geometry& geometry, int64_t begin, int64_t group_end) : begin(begin) {
    const int64_t channels = quotient(geometry.in_channels, geometry.offset_groups);
    offset_group = quotient(begin, channels);
    end = least((offset_group + 1) * channels, group_end);
  }
};

}  // namespace

// Blocks: output tiles of a group, groups, position tiles.
extern "C" __global__ void __launch_bounds__(kThreads, 1) tiled_forward(const Arguments a) {
  __shared__ Reads reads[kTile];
  __shared__ R columns[kStep][kTile], weights[kStep][kTile];
  const Geometry& geometry = a.geometry;
  const int64_t channels = quotient(geometry.in_channels, geometry.groups);
  const int64_t outputs = quotient(geometry.out_channels, geometry.groups), taps = taps_of(geometry);
  int64_t block = blockIdx.x;
  const int64_t first_output = take(block, ceiling(outputs, kTile)) * kTile;
  const int64_t group = take(block, geometry.groups), first = a.first + block * kTile;
  const int thread = threadIdx.x;
  const T* packed = static_cast<const T*>(a.weight) + group * outputs + first_output;

  Sums sums;
  for (int64_t c = group * channels, end = c + channels; c < end;) {
    const Segment segment(geometry, c, end);
    for (int64_t tap = 0; tap < taps; ++tap) {
      // Whoever still multiplies has read its samples.
      if (thread < kTile) reads[thread] = Reads(a, first + thread, tap, segment.offset_group);
      for (int64_t from = segment.begin; from < segment.end; from += kStep) {
        const int count = static_cast<int>(least(kStep, segment.end - from));
        barrier();
        for (int i = thread; i < kStep * kTile; i += kThreads) {
          const int k = i % kStep, p = i / kStep;
          if (k < count) columns[k][p] = reads[p].sample(a, from + k);
        }
        for (int i = thread; i < kStep * kTile; i += kThreads) {
          const int k = i / kTile, o = i % kTile;
          const int64_t row = tap * channels + (from + k - group * channels);
          if (k < count)
            weights[k][o] = first_output + o < outputs
                                ? R(widened(load(packed + row * geometry.out_channels + o)))
                                : R(0);
        }
        barrier();
        sums.add(columns, weights, count, kOutputPiece);
      }
    }
    c = segment.end;
  }
  sums.for_each([&](int p, int o, R sum) {
    if (first + p >= end_of(a) || first_output + o >= outputs) return;
    const int64_t output = group * outputs + first_output + o;
    store(Position<kDims>(geometry, first + p).template in<T>(a.output, output), sum + bias_of(a, output));
  });
}

// Blocks: tiles of kWarp outputs, tiles of kThreads / kWarp positions.
extern "C" __global__ void __launch_bounds__(kThreads, 1) direct_forward(const Arguments a) {
  const Geometry& geometry = a.geometry;
  const int64_t channels = quotient(geometry.in_channels, geometry.groups);
  const int64_t outputs = quotient(geometry.out_channels, geometry.groups), taps = taps_of(geometry);
  int64_t block = blockIdx.x;
  const int64_t output = take(block, ceiling(geometry.out_channels, kWarp)) * kWarp + threadIdx.x % kWarp;
  const int64_t number = a.first + block * (kThreads / kWarp) + threadIdx.x / kWarp;
  if (output >= geometry.out_channels || number >= end_of(a)) return;
  const int64_t group = quotient(output, outputs);
  const T* packed = static_cast<const T*>(a.weight) + output;

  LongSum sum(kOutputPiece);
  for (int64_t c = group * channels, end = c + channels; c < end;) {
    const Segment segment(geometry, c, end);
    for (int64_t tap = 0; tap < taps; ++tap) {
      const Reads reads(a, number, tap, segment.offset_group);
      for (int64_t channel = segment.begin; channel < segment.end; ++channel) {
        const int64_t row = tap * channels + (channel - group * channels);
        sum.add(reads.sample(a, channel), widened(load(packed + row * geometry.out_channels)));
      }
    }
    c = segment.end;
  }
  store(Position<kDims>(geometry, number).template in<T>(a.output, output), sum.sum() + bias_of(a, output));
}

namespace {

using Corners = CornersOf<L, P, kDims>;

// (positions, channels): the gradients of a tile of columns.
using Columns = R[kTile][kWarp + 1];

// columns[p][c] = sum over the outputs of a group of grad_output[p][o] * weight[tap][o][c], for `count`
// channels of the group from its channel `from` on.
DCN_INLINE void multiply_columns(const Arguments& a, int64_t first, int64_t tap, int64_t group, int64_t from,
                                 int count, Columns& columns) {
  __shared__ R grads[kStep][kTile], weights[kStep][kWarp];
  const Geometry& geometry = a.geometry;
  const int64_t channels = quotient(geometry.in_channels, geometry.groups);
  const int64_t outputs = quotient(geometry.out_channels, geometry.groups);
  constexpr int kRows = kTile * kWarp / kThreads;
  const int thread = threadIdx.x, lane = thread % kWarp, row = thread / kWarp * kRows;
  R piece[kRows] = {}, total[kRows] = {};
  int terms = 0;
  for (int64_t o = 0; o < outputs; o += kStep) {
    const int steps = static_cast<int>(least(kStep, outputs - o));
    barrier();
    for (int i = thread; i < kStep * kTile; i += kThreads) {
      const int k = i % kStep, p = i / kStep;
      if (k >= steps) continue;
      const bool exists = first + p < end_of(a);
      grads[k][p] = exists ? R(widened(load(Position<kDims>(geometry, first + p)
                                                .template in<const T>(a.output, group * outputs + o + k))))
                           : R(0);
    }
    for (int i = thread; i < kStep * kWarp; i += kThreads) {
      const int k = i / kWarp, c = i % kWarp;
      if (k >= steps) continue;
      const int64_t packed = (tap * geometry.out_channels + group * outputs + o + k) * channels + from + c;
      weights[k][c] = c < count ? R(widened(load(static_cast<const T*>(a.weight) + packed))) : R(0);
    }
    barrier();
    for (int k = 0; k < steps; ++k)
#pragma unroll
      for (int i = 0; i < kRows; ++i) piece[i] += grads[k][row + i] * weights[k][lane];
    terms += steps;
    if (terms + kStep > kPiece || o + kStep >= outputs) {
#pragma unroll
      for (int i = 0; i < kRows; ++i) total[i] += piece[i], piece[i] = 0;
      terms = 0;
    }
  }
#pragma unroll
  for (int i = 0; i < kRows; ++i) columns[row + i][lane] = total[i];
}

// The same for any run of channels of x, in whatever groups they lie.
DCN_INLINE void add_columns(const Arguments& a, int64_t first, int64_t tap, int64_t from, int count,
                            Columns& columns) {
  const Geometry& geometry = a.geometry;
  const int64_t channels = quotient(geometry.in_channels, geometry.groups);
  const int64_t outputs = quotient(geometry.out_channels, geometry.groups);
  const int lane = threadIdx.x % kWarp;
  if (lane >= count) return;
  const int64_t group = quotient(from + lane, channels);
  const int64_t channel = from + lane - group * channels;
  for (int p = threadIdx.x / kWarp; p < kTile && first + p < end_of(a); p += kThreads / kWarp) {
    const Position<kDims> position(geometry, first + p);
    LongSum sum(kPiece);
    for (int64_t o = group * outputs; o < (group + 1) * outputs; ++o) {
      const int64_t packed = (tap * geometry.out_channels + o) * channels + channel;
      sum.add(widened(load(position.template in<const T>(a.output, o))),
              widened(load(static_cast<const T*>(a.weight) + packed)));
    }
    columns[p][lane] = sum.sum();
  }
}

// Blocks: offset groups, taps, position tiles.
template <bool kTiled>
DCN_INLINE void walk_positions(const Arguments& a) {
  __shared__ Corners corners[kTile];
  __shared__ Columns columns;
  __shared__ R dots[kTile][kCorners];
  const Geometry& geometry = a.geometry;
  const int64_t channels = quotient(geometry.in_channels, geometry.groups), taps = taps_of(geometry);
  const int64_t of_offset_group = quotient(geometry.in_channels, geometry.offset_groups);
  int64_t block = blockIdx.x;
  const int64_t offset_group = take(block, geometry.offset_groups), tap = take(block, taps);
  const int64_t first = a.first + block * kTile;
  const int thread = threadIdx.x, lane = thread % kWarp;
  const bool dots_wanted = a.grad_offset.data || a.grad_mask.data;

  if (thread < kTile) {
    corners[thread] = Corners(a, first + thread, tap, offset_group);
    for (int corner = 0; corner < kCorners; ++corner) dots[thread][corner] = 0;
  }
  for (int64_t from = offset_group * of_offset_group, end = from + of_offset_group; from < end;) {
    const int64_t group = quotient(from, channels);
    const int64_t border = kTiled ? least(end, (group + 1) * channels) : end;
    const int count = static_cast<int>(least(kWarp, border - from));
    barrier();
    if constexpr (kTiled) {
      multiply_columns(a, first, tap, group, from - group * channels, count, columns);
    } else {
      add_columns(a, first, tap, from, count, columns);
    }
    barrier();
    const int64_t channel = from + lane;
    for (int p = thread / kWarp; p < kTile && first + p < end_of(a); p += kThreads / kWarp) {
      const R grad = lane < count ? columns[p][lane] : R(0);
#pragma unroll
      for (int corner = 0; corner < kCorners; ++corner) {
        const int64_t place = corners[p].place[corner], target = corners[p].target[corner];
        if (dots_wanted && place >= 0) {
          const R dot = sum_of_warp(lane < count ? grad * Reads::pixel(a, place, channel) : R(0));
          if (lane == 0) dots[p][corner] += dot;
        }
        if (a.grad_x.data && !a.between && target >= 0 && lane < count)
          add_in_memory(reinterpret_cast<R*>(a.grad_x.data + target) + channel,
                        corners[p].weight[corner] * grad);
      }
      if (a.between && lane < count)
        static_cast<R*>(a.between)[((first + p - a.first) * taps + tap) * geometry.in_channels + channel] =
            grad;
    }
    from += count;
  }
  barrier();
  if (thread >= kTile || first + thread >= end_of(a) || !dots_wanted) return;
  store_position_gradients<L, P, kDims>(a, first + thread, tap, offset_group, dots[thread]);
}

}  // namespace

extern "C" __global__ void __launch_bounds__(kThreads, 1) tiled_positions(const Arguments a) {
  walk_positions<true>(a);
}

extern "C" __global__ void __launch_bounds__(kThreads, 1) direct_positions(const Arguments a) {
  walk_positions<false>(a);
}

// Adds the columns' gradients in `between`, (count, taps, in_channels), to grad_x in the order of positions
// and taps. One thread owns a channel of an image, and a thread's additions to one address keep their order:
// hence the same bits in every run.
//
// Blocks: tiles of kThreads channels, images that have positions here.
extern "C" __global__ void __launch_bounds__(kThreads, 1) add_in_order(const Arguments a) {
  constexpr int kAhead = 8;  // loads under way while others are added
  const Geometry& geometry = a.geometry;
  const int64_t positions = output_positions(geometry), taps = taps_of(geometry);
  int64_t block = blockIdx.x;
  const int64_t channel = take(block, ceiling(geometry.in_channels, kThreads)) * kThreads + threadIdx.x;
  const int64_t image = quotient(a.first, positions) + block;
  if (channel >= geometry.in_channels) return;
  const int64_t offset_group = quotient(channel, quotient(geometry.in_channels, geometry.offset_groups));
  const int64_t begin = image * positions > a.first ? image * positions : a.first;
  const int64_t end = least((image + 1) * positions, end_of(a));
  const R* grads =
      static_cast<const R*>(a.between) + (begin - a.first) * taps * geometry.in_channels + channel;
  for (int64_t record = 0, records = (end - begin) * taps; record < records; record += kAhead) {
    R ahead[kAhead];
#pragma unroll
    for (int i = 0; i < kAhead; ++i)
      ahead[i] = record + i < records ? grads[(record + i) * geometry.in_channels] : R(0);
#pragma unroll 1
    for (int i = 0; i < kAhead && record + i < records; ++i) {
      const int64_t number = quotient(record + i, taps), tap = record + i - number * taps;
      const Corners corners(a, begin + number, tap, offset_group);
      R grad = ahead[0];
#pragma unroll
      for (int j = 1; j < kAhead; ++j) grad = i == j ? ahead[j] : grad;
#pragma unroll
      for (int corner = 0; corner < kCorners; ++corner)
        if (corners.target[corner] >= 0)
          add_in_memory(reinterpret_cast<R*>(a.grad_x.data + corners.target[corner]) + channel,
                        corners.weight[corner] * grad);
    }
  }
}

// Blocks: channel tiles of a group, output tiles of a group, groups, taps, parts.
extern "C" __global__ void __launch_bounds__(kThreads, 1) tiled_weights(const Arguments a) {
  __shared__ R columns[kStep][kTile], grads[kStep][kTile];
  const Geometry& geometry = a.geometry;
  const int64_t channels = quotient(geometry.in_channels, geometry.groups);
  const int64_t outputs = quotient(geometry.out_channels, geometry.groups);
  const int64_t of_offset_group = quotient(geometry.in_channels, geometry.offset_groups);
  int64_t block = blockIdx.x;
  const int64_t first_channel = take(block, ceiling(channels, kTile)) * kTile;
  const int64_t first_output = take(block, ceiling(outputs, kTile)) * kTile;
  const int64_t group = take(block, geometry.groups), tap = take(block, taps_of(geometry)), part = block;
  const int64_t begin = a.first + part * part_length(a);
  const int64_t end = least(begin + part_length(a), end_of(a));
  const int thread = threadIdx.x;

  Sums sums;
  for (int64_t number = begin; number < end; number += kStep) {
    const int count = static_cast<int>(least(kStep, end - number));
    barrier();
    for (int i = thread; i < kStep * kTile; i += kThreads) {
      const int k = i / kTile, c = i % kTile;
      const int64_t channel = group * channels + first_channel + c;
      columns[k][c] = k < count && first_channel + c < channels
                          ? Reads(a, number + k, tap, quotient(channel, of_offset_group)).sample(a, channel)
                          : R(0);
    }
    for (int i = thread; i < kStep * kTile; i += kThreads) {
      const int k = i / kTile, o = i % kTile;
      const int64_t output = group * outputs + first_output + o;
      grads[k][o] =
          k < count && first_output + o < outputs
              ? R(widened(load(Position<kDims>(geometry, number + k).template in<const T>(a.output, output))))
              : R(0);
    }
    barrier();
    sums.add(columns, grads, count, kPiece);
  }
  sums.for_each([&](int c, int o, R sum) {
    if (first_channel + c < channels && first_output + o < outputs)
      *partial_weight<R>(a, part, tap, group * outputs + first_output + o, first_channel + c) = sum;
  });
}

// Blocks: tiles of kThreads numbers of one tap's weights, taps, parts.
extern "C" __global__ void __launch_bounds__(kThreads, 1) direct_weights(const Arguments a) {
  const Geometry& geometry = a.geometry;
  const int64_t channels = quotient(geometry.in_channels, geometry.groups);
  const int64_t outputs = quotient(geometry.out_channels, geometry.groups);
  const int64_t of_offset_group = quotient(geometry.in_channels, geometry.offset_groups);
  int64_t block = blockIdx.x;
  const int64_t index =
      take(block, ceiling(geometry.out_channels * channels, kThreads)) * kThreads + threadIdx.x;
  const int64_t tap = take(block, taps_of(geometry)), part = block;
  if (index >= geometry.out_channels * channels) return;
  const int64_t output = quotient(index, channels), in_group = index - output * channels;
  const int64_t channel = quotient(output, outputs) * channels + in_group;
  const int64_t begin = a.first + part * part_length(a);
  const int64_t end = least(begin + part_length(a), end_of(a));

  LongSum sum(kPiece);
  for (int64_t number = begin; number < end; ++number)
    sum.add(Reads(a, number, tap, quotient(channel, of_offset_group)).sample(a, channel),
            widened(load(Position<kDims>(geometry, number).template in<const T>(a.output, output))));
  *partial_weight<R>(a, part, tap, output, in_group) = sum.sum();
}

}  // namespace dcn
