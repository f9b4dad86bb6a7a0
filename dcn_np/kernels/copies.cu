// Between memory orders and storage types, and from partial sums to results. DCN_T: what is stored.
//
// The shape of an array is geometry's (batch, in_channels, *input) here, whatever the array is: `copy` also
// packs weights, whose batch are the output channels and whose axes the taps. The grid has one axis.
#include "locating.hpp"

namespace dcn {
namespace {

using T = DCN_T;
using R = Sum<T>;

constexpr int kTile = 32;
constexpr int kThreads = 256;
constexpr int kRows = kThreads / kTile;
constexpr int kPiece = 256;  // the most terms that are added before the sum is put aside

DCN_INLINE char* element(const Geometry& geometry, const Array& array, int64_t image, int64_t channel,
                         int64_t position) {
  char* address = array.data + image * array.batch + channel * array.channel;
#pragma unroll
  for (int axis = kMaxAxes - 1; axis > 0; --axis) {
    const int64_t outer = quotient(position, geometry.input[axis]);
    address += (position - outer * geometry.input[axis]) * array.axis[axis];
    position = outer;
  }
  return address + position * array.axis[0];
}

DCN_INLINE int64_t size(int64_t stride) { return stride < 0 ? -stride : stride; }

// Whether neighbouring channels, rather than neighbouring positions, lie side by side.
DCN_INLINE bool channels_last(const Geometry& geometry, const Array& array) {
  return geometry.input[2] > 1 ? size(array.channel) < size(array.axis[2])
                               : size(array.channel) < size(array.axis[geometry.input[1] > 1 ? 1 : 0]);
}

// From x to output through a square in shared memory, so that both sides are read and written side by side.
// Blocks: channel tiles, position tiles, images.
template <class From>
DCN_INLINE void copy_tile(const Arguments& a) {
  __shared__ From tile[kTile][kTile + 1];
  const Geometry& geometry = a.geometry;
  const int64_t positions = geometry.input[0] * geometry.input[1] * geometry.input[2];
  int64_t block = blockIdx.x;
  const int64_t first_channel = take(block, ceiling(geometry.in_channels, kTile)) * kTile;
  const int64_t first_position = take(block, ceiling(positions, kTile)) * kTile, image = block;
  const int lane = threadIdx.x % kTile, row = threadIdx.x / kTile;
  const auto walk = [&](const Array& array, const auto& body) {
    const bool along_channels = channels_last(geometry, array);
    for (int i = row; i < kTile; i += kRows) {
      const int c = along_channels ? lane : i, p = along_channels ? i : lane;
      if (first_channel + c < geometry.in_channels && first_position + p < positions)
        body(element(geometry, array, image, first_channel + c, first_position + p), tile[c][p]);
    }
  };
  walk(a.x, [](char* from, From& to) { to = load(reinterpret_cast<const From*>(from)); });
  barrier();
  walk(a.output, [](char* to, From& from) {
    if constexpr (sizeof(From) == sizeof(T)) {
      *reinterpret_cast<From*>(to) = from;
    } else {
      store(reinterpret_cast<T*>(to), from);
    }
  });
}

}  // namespace

extern "C" __global__ void __launch_bounds__(kThreads) copy(const Arguments a) { copy_tile<T>(a); }

// The same from sums.
extern "C" __global__ void __launch_bounds__(kThreads) copy_sums(const Arguments a) { copy_tile<R>(a); }

// Adds `parts` arrays of sums in order: `between` is (parts, taps, batch, in_channels), the result `output`.
// Blocks: tiles of kThreads numbers of one tap, taps.
extern "C" __global__ void __launch_bounds__(kThreads) add_parts(const Arguments a) {
  const Geometry& geometry = a.geometry;
  const int64_t taps = geometry.input[0] * geometry.input[1] * geometry.input[2];
  const int64_t numbers = geometry.batch * geometry.in_channels;
  int64_t block = blockIdx.x;
  const int64_t index = take(block, ceiling(numbers, kThreads)) * kThreads + threadIdx.x, tap = block;
  if (index >= numbers) return;
  const R* from = static_cast<const R*>(a.between) + tap * numbers + index;
  R sum = 0;
  for (int64_t part = 0; part < a.parts; ++part) sum += from[part * taps * numbers];
  const int64_t image = quotient(index, geometry.in_channels);
  store(reinterpret_cast<T*>(element(geometry, a.output, image, index - image * geometry.in_channels, tap)),
        sum);
}

// Sums over positions and images of grad_output, channels-last in x: `between` is (parts, channels).
// Blocks: tiles of kTile channels, parts.
extern "C" __global__ void __launch_bounds__(kThreads) add_positions(const Arguments a) {
  __shared__ R sums[kRows][kTile];
  const Geometry& geometry = a.geometry;
  const int64_t positions = geometry.input[0] * geometry.input[1] * geometry.input[2];
  const int64_t count = geometry.batch * positions;
  const int64_t length = ceiling(ceiling(count, a.parts), kRows) * kRows;
  int64_t block = blockIdx.x;
  const int lane = threadIdx.x % kTile, row = threadIdx.x / kTile;
  const int64_t channel = take(block, ceiling(geometry.in_channels, kTile)) * kTile + lane, part = block;
  const int64_t end = (part + 1) * length < count ? (part + 1) * length : count;
  R total = 0, piece = 0;
  int terms = 0;
  if (channel < geometry.in_channels)
    for (int64_t number = part * length + row; number < end; number += kRows) {
      const int64_t image = quotient(number, positions);
      const char* from = element(geometry, a.x, image, channel, number - image * positions);
      piece += widened(load(reinterpret_cast<const T*>(from)));
      if (++terms == kPiece) total += piece, piece = 0, terms = 0;
    }
  sums[row][lane] = total + piece;
  barrier();
  if (row > 0 || channel >= geometry.in_channels) return;
  for (int i = 1; i < kRows; ++i) sums[0][lane] += sums[i][lane];
  static_cast<R*>(a.between)[part * geometry.in_channels + channel] = sums[0][lane];
}

}  // namespace dcn
