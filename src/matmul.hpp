// The matrix product: register tiles over packed panels.
//
//     C[row][column] (+)= sum over k of A[row][k] * B[k][column]
//
// A is read where it lies, through strides; B is packed in panels of one or two vectors of columns. A sum is
// taken in pieces, each from zero, and the pieces are then added: a running sum over thousands of positive
// terms would lose ten times as much.
#pragma once

#include "integers.hpp"
#include "vector.hpp"

namespace dcn::DCN_ISA {

// The most terms in one running sum.
constexpr int64_t kPiece = 256;

// The same for an element of y with so many terms in all. Where all have one sign, a piece errs by about the root of its
// length, times its share of the sum, and the pieces' errors average out: by length / sqrt(terms) in all. At 7 that is up
// to 7 units of rounding (benchmarks/accuracy.py), and most shapes come to fewer pieces than with a fixed length.
DCN_INLINE int64_t output_piece(int64_t terms) {
  int64_t pieces = 1;
  while (pieces < 8 && 49 * pieces * pieces < terms) ++pieces;
  return least(ceiling(terms, pieces), kPiece);
}

// One run of k: `outer` stretches of `inner` terms. (taps x channels of a weight group, or one stretch of
// positions.)
struct Terms {
  int64_t outer, outer_stride;
  int64_t inner, inner_stride;
};

// Calls body(terms, distance of the first in A, index of the first) for pieces of at most `most` terms.
// Stretches that follow each other without a gap are one to a piece.
template <class Body>
DCN_INLINE void for_each_piece(Terms all, int64_t most, const Body& body) {
  if (all.outer_stride == all.inner && all.inner_stride == 1) all = {1, 0, all.outer * all.inner, 1};
  const int64_t inner = all.inner < most ? all.inner : most;
  const int64_t outer = inner > 0 && inner == all.inner ? most / inner : 1;
  for (int64_t o = 0; o < all.outer; o += outer)
    for (int64_t i = 0; i < all.inner; i += inner) {
      const int64_t outer_left = all.outer - o, inner_left = all.inner - i;
      const Terms piece = {outer < outer_left ? outer : outer_left, all.outer_stride,
                           inner < inner_left ? inner : inner_left, all.inner_stride};
      body(piece, o * all.outer_stride + i * all.inner_stride);
    }
}

// How far ahead B is asked for, 1024 bytes: from the second-level cache it comes as fast as it is multiplied, but not by
// itself.
template <class T>
constexpr int64_t kAhead = 1024 / sizeof(T);

// How much of the product that follows is asked for with each term, 32 bytes: a quarter of what a term has in B, with
// vectors of 64 bytes. At the pace of the terms it would be more than memory delivers, and the terms then wait for it.
template <class T>
constexpr int64_t kAfter = 32 / sizeof(T);

// How many of a tile's rows are reached from one pointer. The distances of more than these would not fit into the registers
// for numbers; GCC keeps those left over in registers for vectors, and bringing one back takes the place of a
// multiplication.
constexpr int pointer_rows(int rows) { return rows > 6 ? 3 : rows; }

// A tile of M rows and NR vectors of N columns, in registers. `fresh` stores the sums, otherwise they are
// added. From `after` on it asks for kAfter more with each term.
template <class T, int N, int NR, int M>
__attribute__((noinline)) void multiply_tile(const T* __restrict a, int64_t row_stride, Terms terms,
                                             int64_t most, const T* __restrict b, T* __restrict c,
                                             int64_t c_stride, bool fresh, const T* after) {
  using V = Vec<T, N>;
  for_each_piece(terms, most, [&](Terms piece, int64_t distance) __attribute__((always_inline)) {
    V sums[M][NR];
#pragma GCC unroll 16
    for (int i = 0; i < M; ++i)
#pragma GCC unroll 2
      for (int j = 0; j < NR; ++j) sums[i][j] = V{};

    constexpr int kRows = pointer_rows(M), kPointers = M / kRows;
    static_assert(M % kRows == 0);
    const T* from[kPointers];
    const auto add_terms = [&](auto kind, int64_t step) __attribute__((always_inline)) {
      decltype(kind) factors[M];
#pragma GCC unroll 16
      for (int i = 0; i < M; ++i) factors[i].read(from[i / kRows] + i % kRows * row_stride);
#pragma GCC unroll 16
      for (int i = 0; i < kPointers; ++i) from[i] += step;
#pragma GCC unroll 16
      for (int k = 0; k < decltype(kind)::count; ++k, b += NR * N) {
        constexpr int64_t kBytes = NR * N * sizeof(T);
        if (k * kBytes % kLineBytes == 0) prefetch_lines<false>(b + kAhead<T>, kBytes);
        V columns[NR];
#pragma GCC unroll 2
        for (int j = 0; j < NR; ++j) columns[j] = load<V>(b + j * N);
#pragma GCC unroll 16
        for (int i = 0; i < M; ++i) {
          const V value = broadcast<V>(factors[i][k]);
#pragma GCC unroll 2
          for (int j = 0; j < NR; ++j) sums[i][j] += value * columns[j];
        }
      }
      constexpr int64_t kMore = kAfter<T> * decltype(kind)::count;
      prefetch_lines<false>(after, kMore * sizeof(T));
      after += kMore;
    };
    for (int64_t outer = 0; outer < piece.outer; ++outer) {
#pragma GCC unroll 16
      for (int i = 0; i < kPointers; ++i) {
        from[i] = a + distance + outer * piece.outer_stride + i * kRows * row_stride;
        if (kPointers > 1) asm("" : "+r"(from[i]));  // else they become one and many distances again
      }
      int64_t k = 0;
      if (constexpr int count = Factors<T>::count; count > 1 && piece.inner_stride == 1)
        for (; k + count <= piece.inner; k += count) add_terms(Factors<T>{}, count);
      for (; k < piece.inner; ++k) add_terms(Factor<T>{}, piece.inner_stride);
    }

#pragma GCC unroll 16
    for (int i = 0; i < M; ++i)
#pragma GCC unroll 2
      for (int j = 0; j < NR; ++j) {
        T* to = c + i * c_stride + j * N;
        store(to, fresh ? sums[i][j] : load<V>(to) + sums[i][j]);
      }
    fresh = false;
  });
}

template <class T, int N, int NR>
void multiply_rows(int64_t rows, const T* a, int64_t row_stride, Terms terms, int64_t piece, const T* b, T* c,
                   int64_t c_stride, bool fresh, const T* next) {
  int64_t large = rows / kTileRows;
  // Rather two tiles of four rows than one of six and two of one.
  if (large > 0 && kTileRows % 4 == 2 && rows % kTileRows % 4 == 2) --large;
  const int64_t all = terms.outer * terms.inner;
  const T* after = next;  // null once all of it was asked for
  const auto tile = [&](auto count, int64_t i) {
    multiply_tile<T, N, NR, decltype(count)::count>(a + i * row_stride, row_stride, terms, piece, b,
                                                    c + i * c_stride, c_stride, fresh, after ? after : b);
    if (after && (after += kAfter<T> * all) >= next + all * NR * N) after = nullptr;
  };
  int64_t i = 0;
  for (; i < large * kTileRows; i += kTileRows) tile(Lanes<kTileRows>{}, i);
  for (; i + 4 <= rows; i += 4) tile(Lanes<4>{}, i);
  for (; i < rows; ++i) tile(Lanes<1>{}, i);
}

// The columns of B or C, cut into panels: whole ones of two vectors, then at most one of a single vector. The
// lanes of a vector are chosen so that a few columns do not pay for many.
struct Panels {
  int lanes;
  int64_t columns;
  int64_t whole;  // panels of two vectors
  bool half;      // one more, of one vector

  template <class T>
  static Panels of(int64_t columns) {
    constexpr int kMost = kLanes<T>, kLeast = kMost >= 4 ? kMost / 4 : 1;
    int lanes = kMost;
    while (lanes > kLeast && lanes / 2 >= columns) lanes /= 2;
    const int64_t whole = columns / (2 * lanes), rest = columns - whole * 2 * lanes;
    return {lanes, columns, whole + (rest > lanes), rest > 0 && rest <= lanes};
  }
  int64_t count() const { return whole + half; }
  int64_t first(int64_t panel) const { return panel * 2 * lanes; }
  int64_t width(int64_t panel) const { return panel < whole ? 2 * lanes : lanes; }
  int64_t padded() const { return (2 * whole + half) * lanes; }
};

// One panel of the product; `b` is the panel's packed rows for these terms. No terms: nothing is written. `next`, where
// not null, is the `b` of the product that follows, asked for while the first rows are multiplied.
template <class T>
void multiply_panel(const Panels& panels, int64_t panel, int64_t rows, const T* a, int64_t row_stride,
                    Terms terms, int64_t piece, const T* b, T* c, int64_t c_stride, bool fresh,
                    const T* next = nullptr) {
  const auto with = [&](auto lanes) {
    constexpr int n = decltype(lanes)::count;
    if (panel < panels.whole)
      multiply_rows<T, n, 2>(rows, a, row_stride, terms, piece, b, c, c_stride, fresh, next);
    else
      multiply_rows<T, n, 1>(rows, a, row_stride, terms, piece, b, c, c_stride, fresh, next);
  };
  constexpr int kMost = kLanes<T>;
  if (panels.lanes == kMost) return with(Lanes<kMost>{});
  if constexpr (kMost >= 2) {
    if (panels.lanes == kMost / 2) return with(Lanes<kMost / 2>{});
  }
  if constexpr (kMost >= 4) with(Lanes<kMost / 4>{});
}

}  // namespace dcn::DCN_ISA
