// What the fused kernels share: tiles in shared memory, the table of samples, products of tiles.
//
// DCN_T: what images and weights are stored in (Float16, BFloat16 or float); DCN_P: offsets and masks;
// DCN_STRICT: with float, 1 keeps every bit of the factors (three products of TF32 numbers for each), 0 rounds
// them to TF32. DCN_ROW: bytes in a row of a tile, 128 or 64: the channels of one step.
//
// A row is cut into chunks of 16 bytes, 8 halves or 4 floats. One product of tiles takes two chunks of every
// row, whatever the type: the matrices that load_matrices() loads are then just the operands.
#pragma once

#include "locating.hpp"

namespace dcn {
namespace {

using T = DCN_T;
using P = DCN_P;
using L = ScalarLanes<float>;
constexpr int kCorners = 4;
constexpr int kWarp = 32;
constexpr int kRow = DCN_ROW;
constexpr int kChunk = 16;
constexpr int kChunks = kRow / kChunk;
constexpr int kChannels = kRow / static_cast<int>(sizeof(T));  // of one step
// Long sums are put together from pieces; rounded factors are far coarser than what that gains.
constexpr bool kInPieces = DCN_STRICT;

// Chunk c of row r of a tile. The order of chunks changes from row to row, so that neither loading matrices nor
// storing chunks meets one bank of shared memory twice.
DCN_INLINE unsigned char* chunk_of(unsigned char* tile, int r, int c) {
  constexpr int kRowsPerLine = 128 / kRow;  // a line of all banks
  return tile + r * kRow + ((c ^ (r / kRowsPerLine % kChunks)) * kChunk);
}

// ---- products of tiles

// What a type's chunks hold and how two tiles are multiplied.
template <class Type>
struct Numbers;

template <class Type>
struct HalfNumbers {
  // Of the left tile four registers are a 16 x 16 part; of the right one two are 16 x 8.
  template <int kCount>
  struct Factors {
    uint32_t bits[kCount];

    DCN_INLINE void set(const uint32_t (&from)[4], int first) {
#pragma unroll
      for (int i = 0; i < kCount; ++i) bits[i] = from[first + i];
    }
  };
  static DCN_INLINE float low(uint32_t two) { return widened(Type{static_cast<uint16_t>(two)}); }
  static DCN_INLINE float high(uint32_t two) { return widened(Type{static_cast<uint16_t>(two >> 16)}); }
  static DCN_INLINE float dot(const uint4& chunk, const float (&by)[8]) {
    return low(chunk.x) * by[0] + high(chunk.x) * by[1] + low(chunk.y) * by[2] + high(chunk.y) * by[3] +
           low(chunk.z) * by[4] + high(chunk.z) * by[5] + low(chunk.w) * by[6] + high(chunk.w) * by[7];
  }
  // sum of weight * corner, for both numbers of one word.
  static DCN_INLINE uint32_t combined(uint32_t a, uint32_t b, uint32_t c, uint32_t d, const float4& w) {
    return Numbers<Type>::packed(low(a) * w.x + low(b) * w.y + low(c) * w.z + low(d) * w.w,
                                 high(a) * w.x + high(b) * w.y + high(c) * w.z + high(d) * w.w);
  }
};

template <>
struct Numbers<Float16> : HalfNumbers<Float16> {
  static DCN_INLINE uint32_t packed(float low, float high) { return f16x2_of(low, high); }
  static DCN_INLINE void multiply_add(float (&d)[4], const Factors<4>& a, const Factors<2>& b) {
    multiply_add_f16(d, a.bits, b.bits[0], b.bits[1]);
  }
};

template <>
struct Numbers<BFloat16> : HalfNumbers<BFloat16> {
  static DCN_INLINE uint32_t packed(float low, float high) { return bf16x2_of(low, high); }
  static DCN_INLINE void multiply_add(float (&d)[4], const Factors<4>& a, const Factors<2>& b) {
    multiply_add_bf16(d, a.bits, b.bits[0], b.bits[1]);
  }
};

template <>
struct Numbers<float> {
  static DCN_INLINE float dot(const uint4& chunk, const float (&by)[4]) {
    return float_of_bits(chunk.x) * by[0] + float_of_bits(chunk.y) * by[1] + float_of_bits(chunk.z) * by[2] +
           float_of_bits(chunk.w) * by[3];
  }
  static DCN_INLINE uint32_t combined(uint32_t a, uint32_t b, uint32_t c, uint32_t d, const float4& w) {
    return bits_of_float(float_of_bits(a) * w.x + float_of_bits(b) * w.y + float_of_bits(c) * w.z +
                         float_of_bits(d) * w.w);
  }
#if DCN_STRICT
  // Numbers as sums of two of TF32; what is lost is below 2^-21 of them. One that is not finite, or within 2^-11
  // of the largest, is an infinity or NaN with nothing to be multiplied crosswise: 0 * Inf would be NaN.
  template <int kCount>
  struct Factors {
    uint32_t high[kCount], low[kCount], finite_high[kCount];

    DCN_INLINE void set(const uint32_t (&bits)[4], int first) {
#pragma unroll
      for (int i = 0; i < kCount; ++i) {
        const float value = float_of_bits(bits[first + i]);
        high[i] = tf32_of(value);
        const float left = value - float_of_bits(high[i]);
        const bool finite = left <= 1e38f && left >= -1e38f;
        low[i] = finite ? tf32_of(left) : 0;
        finite_high[i] = finite ? high[i] : 0;
      }
    }
  };
  static DCN_INLINE void multiply_add(float (&d)[4], const Factors<4>& a, const Factors<2>& b) {
    multiply_add_tf32(d, a.low, b.finite_high[0], b.finite_high[1]);
    multiply_add_tf32(d, a.finite_high, b.low[0], b.low[1]);
    multiply_add_tf32(d, a.high, b.high[0], b.high[1]);
  }
#else
  template <int kCount>
  struct Factors {
    uint32_t rounded[kCount];

    DCN_INLINE void set(const uint32_t (&bits)[4], int first) {
#pragma unroll
      for (int i = 0; i < kCount; ++i) rounded[i] = tf32_of(float_of_bits(bits[first + i]));
    }
  };
  static DCN_INLINE void multiply_add(float (&d)[4], const Factors<4>& a, const Factors<2>& b) {
    multiply_add_tf32(d, a.rounded, b.rounded[0], b.rounded[1]);
  }
#endif
};

// A warp's kRows x kColumns sums of the product of two tiles.
template <int kRows, int kColumns>
struct WarpSums {
  float sum[kRows / 16][kColumns / 8][4] = {};

  // Adds the product of `a`, rows from `row` on, and `b`, whose rows from `column` on are columns here, over the
  // two chunks number `step`.
  DCN_INLINE void add(unsigned char* a, int row, unsigned char* b, int column, int step) {
    const int lane = threadIdx.x % kWarp;
    add_product([&](uint32_t (&bits)[4],
                    int r) { load_matrices(bits, chunk_of(a, row + r + lane % 16, step * 2 + lane / 16)); },
                [&](uint32_t (&bits)[4], int c) {
                  load_matrices(bits,
                                chunk_of(b, column + c + lane % 8 + lane / 16 * 8, step * 2 + lane / 8 % 2));
                });
  }

  // The same with functions that load what lies at 16 rows of this part of `a`, and at 16 columns of `b`.
  template <class LoadRows, class LoadColumns>
  DCN_INLINE void add_product(const LoadRows& load_rows, const LoadColumns& load_columns) {
    typename Numbers<T>::template Factors<4> left[kRows / 16];
    uint32_t bits[4];
#pragma unroll
    for (int i = 0; i < kRows / 16; ++i) {
      load_rows(bits, i * 16);
      left[i].set(bits, 0);
    }
#pragma unroll
    for (int j = 0; j < kColumns / 16; ++j) {
      load_columns(bits, j * 16);
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        typename Numbers<T>::template Factors<2> right;
        right.set(bits, 2 * half);
#pragma unroll
        for (int i = 0; i < kRows / 16; ++i) Numbers<T>::multiply_add(sum[i][2 * j + half], left[i], right);
      }
    }
  }

  // Adds these sums to others and starts again from zero.
  DCN_INLINE void move_to(WarpSums& total) {
#pragma unroll
    for (int i = 0; i < kRows / 16; ++i)
#pragma unroll
      for (int j = 0; j < kColumns / 8; ++j)
#pragma unroll
        for (int k = 0; k < 4; ++k) total.sum[i][j][k] += sum[i][j][k], sum[i][j][k] = 0;
  }

  // Stores those columns that are `from` to from + kWidth of the block's tile, where this warp's part begins at
  // (row, column), to rows of kPitch floats.
  template <int kWidth, int kPitch>
  DCN_INLINE void store_columns(int row, int column, int from, float* to) const {
    if (column + kColumns <= from || from + kWidth <= column) return;
    for_each_pair([&](int r, int c, float first, float second) {
      const int place = column + c - from;
      if (place < 0 || place >= kWidth) return;
      to[(row + r) * kPitch + place] = first;
      to[(row + r) * kPitch + place + 1] = second;
    });
  }

  // Calls body(row, column, two neighbouring sums).
  template <class Body>
  DCN_INLINE void for_each_pair(const Body& body) const {
    const int lane = threadIdx.x % kWarp;
#pragma unroll
    for (int i = 0; i < kRows / 16; ++i)
#pragma unroll
      for (int j = 0; j < kColumns / 8; ++j)
#pragma unroll
        for (int half = 0; half < 2; ++half)
          body(i * 16 + half * 8 + lane / 4, j * 8 + lane % 4 * 2, sum[i][j][2 * half],
               sum[i][j][2 * half + 1]);
  }
};

// ---- the table of samples

constexpr int kCornerBits = 4;

struct SampleTable {
  // Of each sample, by what the kernel numbers them: a place in x, counted in chunks from the tile's first image,
  // above the bits that say which corners are to be read; and the corners' weights with the mask.
  int32_t* places;
  float4* weights;

  DCN_INLINE SampleTable(unsigned char* memory, int samples)
      : places(reinterpret_cast<int32_t*>(memory + samples * sizeof(float4))),
        weights(reinterpret_cast<float4*>(memory)) {}

  // Fills in sample `index` of an offset group; positions past the end read nothing.
  DCN_INLINE void fill(const Arguments& a, int index, int64_t number, int64_t tap, int64_t offset_group,
                       int64_t first_image) const {
    int32_t place = 0, corners = 0;
    float weight[kCorners] = {};
    if (number < end_of(a)) {
      const Position<2> position(a.geometry, number);
      AxisSample<L> axes[2];
      locate<L, P>(a, position, tap, offset_group, axes);
      const float mask = mask_of<L, P>(a, position, tap, offset_group);
#pragma unroll
      for (int corner = 0; corner < kCorners; ++corner) {
        bool used;
        weight[corner] = masked_weight<L, 2>(axes, corner, mask, used);
        corners |= used << corner;
      }
      place = static_cast<int32_t>(corner_place<L>(axes, 0, position.image - first_image, a.x) / kChunk);
    }
    places[index] = place * (1 << kCornerBits) | corners;
    weights[index] = make_float4(weight[0], weight[1], weight[2], weight[3]);
  }
};

// The pixels of a sample's corners, one chunk of channels each.
struct CornerChunks {
  uint4 pixel[kCorners];

  // images: the tile's first image, at the chunk of channels to read.
  DCN_INLINE void load(const uint4* images, int32_t place_and_corners, int32_t row, int32_t column) {
    const uint4* corner = images + (place_and_corners >> kCornerBits);
#pragma unroll
    for (int i = 0; i < kCorners; ++i) {
      pixel[i] = make_uint4(0, 0, 0, 0);
      if (place_and_corners >> i & 1) pixel[i] = load_readonly(corner + (i / 2 * row + i % 2 * column));
    }
  }

  DCN_INLINE uint4 combined(const float4& weight) const {
    using N = Numbers<T>;
    return make_uint4(N::combined(pixel[0].x, pixel[1].x, pixel[2].x, pixel[3].x, weight),
                      N::combined(pixel[0].y, pixel[1].y, pixel[2].y, pixel[3].y, weight),
                      N::combined(pixel[0].z, pixel[1].z, pixel[2].z, pixel[3].z, weight),
                      N::combined(pixel[0].w, pixel[1].w, pixel[2].w, pixel[3].w, weight));
  }
};

}  // namespace
}  // namespace dcn
