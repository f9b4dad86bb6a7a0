// Vec<T, N>, load, store, select, convert, transpose: the only file that mentions SIMD.
//
// GCC/Clang vector extensions, so one text serves every instruction set. Vec<T, 1> is T itself, which lets
// the last channels of a row go through the same code as full vectors.
#pragma once

#include "sampling.hpp"

namespace dcn::DCN_ISA {

#if defined(__AVX512F__)
constexpr int kVectorBytes = 64;
constexpr int kTileRows = 12;  // 12 x 2 accumulators of 32 registers
#elif defined(__AVX__)
constexpr int kVectorBytes = 32;
constexpr int kTileRows = 6;  // 6 x 2 accumulators of 16 registers
#elif defined(__aarch64__)
constexpr int kVectorBytes = 16;
constexpr int kTileRows = 6;  // 6 x 2 accumulators and 12 of factors, of 32 registers
#else
constexpr int kVectorBytes = 16;
constexpr int kTileRows = 6;
#endif

template <class T>
constexpr int kLanes = kVectorBytes / static_cast<int>(sizeof(T));

template <class T, int N>
struct VecOf {
  typedef T type __attribute__((vector_size(N * sizeof(T))));
};
template <class T>
struct VecOf<T, 1> {
  using type = T;
};
template <class T, int N>
using Vec = typename VecOf<T, N>::type;

template <class V, class T>
DCN_INLINE V load(const T* from) {
  V vector;
  __builtin_memcpy(&vector, from, sizeof vector);
  return vector;
}

template <class V, class T>
DCN_INLINE void store(T* to, V vector) {
  __builtin_memcpy(to, &vector, sizeof vector);
}

// Asks for `bytes` from an address on, to be read or written soon; it need not be anyone's. Whatever does nothing but call
// this must be DCN_INLINE: GCC takes a function that only prefetches for one without effect, and deletes its calls.
constexpr int64_t kLineBytes = 64;
template <bool kWrite>
DCN_INLINE void prefetch_lines(const void* from, int64_t bytes) {
  for (int64_t byte = 0; byte < bytes; byte += kLineBytes)
    __builtin_prefetch(static_cast<const char*>(from) + byte, kWrite);
}

// Subtracting zero keeps every bit, the sign of -0 too; adding it would not.
template <class V, class T>
DCN_INLINE V broadcast(T value) {
  return value - V{};
}

// a * b + c, rounded once where the processor can. Compilers see to that for vectors, but may first put two single
// numbers into a vector, as the code around lets them.
template <class V>
DCN_INLINE V multiply_add(V a, V b, V c) {
  return a * b + c;
}
#if defined(__FMA__) || defined(__aarch64__)
DCN_INLINE float multiply_add(float a, float b, float c) { return __builtin_fmaf(a, b, c); }
DCN_INLINE double multiply_add(double a, double b, double c) { return __builtin_fma(a, b, c); }
#endif

// Numbers that follow each other, each a factor of vectors: one of them, or as many as are best loaded together.
template <class T>
struct Factor {
  static constexpr int count = 1;
  T value;

  DCN_INLINE void read(const T* from) { value = *from; }
  DCN_INLINE T operator[](int) const { return value; }
};
#if defined(__aarch64__)
// A multiply-add takes a lane of a register for a factor, and a load for every factor would be half as many instructions
// again. One instruction loads two registers; written out, because compilers take a load whose lanes are used one by one
// apart.
template <class T>
struct Factors {
  static constexpr int count = 2 * kLanes<T>;
  Vec<T, kLanes<T>> low, high;

  DCN_INLINE void read(const T* from) {
    const auto& memory = *reinterpret_cast<const char (*)[2 * kVectorBytes]>(from);
    asm("ldp %q0, %q1, [%2]" : "=w"(low), "=w"(high) : "r"(from), "m"(memory));
  }
  DCN_INLINE T operator[](int index) const {
    return index < kLanes<T> ? low[index % kLanes<T>] : high[index % kLanes<T>];
  }
};
#else
template <class T>
using Factors = Factor<T>;
#endif

template <class To, class From>
DCN_INLINE To convert(From value) {
  return __builtin_convertvector(value, To);
}

template <class I>
struct UnsignedOf;
template <>
struct UnsignedOf<int32_t> {
  using type = uint32_t;
};
template <>
struct UnsignedOf<int64_t> {
  using type = uint64_t;
};

DCN_INLINE float rounded_down(float value) { return __builtin_floorf(value); }
DCN_INLINE double rounded_down(double value) { return __builtin_floor(value); }

// The number types of sampling.hpp for N positions at once. Comparing reals gives masks as wide as the reals,
// comparing indices masks as wide as the indices: widen and narrow go between the two.
template <class T, class I, int N>
struct LanesOf {
  static constexpr int count = N;
  static constexpr bool kNarrow = sizeof(I) == 4;
  using Element = T;
  using Real = Vec<T, N>;
  using Index = Vec<I, N>;
  using Mask = Index;
  using RealMask = decltype(Real{} < Real{});
  // With 32 bits, images and bases stay below 2^29: then base + floor cannot leave 31 bits.
  static constexpr double kLimit = kNarrow ? 1073741824.0 : 2147483648.0;
  static DCN_INLINE Real real(double value) { return broadcast<Real>(static_cast<T>(value)); }
  static DCN_INLINE Index index(int64_t value) { return static_cast<I>(value) - Index{}; }
  static DCN_INLINE Real truncate(Real value) { return convert<Real>(convert<Vec<int32_t, N>>(value)); }
  static DCN_INLINE Real floor(Real value) {
#if defined(__SSE4_1__) || defined(__aarch64__)
    T numbers[N];
    store(numbers, value);
    for (int i = 0; i < N; ++i) numbers[i] = rounded_down(numbers[i]);
    return load<Real>(numbers);
#else
    return floor_by_conversion<LanesOf>(value);
#endif
  }
  // Whether 0 <= value < count. Without a sign that is one comparison.
  static DCN_INLINE Mask within(Index value, int64_t count) {
    using Unsigned = Vec<typename UnsignedOf<I>::type, N>;
    return reinterpret_cast<Unsigned>(value) < reinterpret_cast<Unsigned>(index(count));
  }
  static DCN_INLINE Index index_of(Real value) { return convert<Index>(convert<Vec<int32_t, N>>(value)); }
  static DCN_INLINE Mask widen(RealMask mask) { return convert<Mask>(mask); }
  static DCN_INLINE RealMask narrow(Mask mask) { return convert<RealMask>(mask); }
  template <class M, class V>
  static DCN_INLINE V select(M mask, V yes, V no) {
    return mask ? yes : no;
  }
};

// 32-bit indices let twice as many float positions go at once.
template <class T>
using WideLanes = LanesOf<T, int64_t, (kVectorBytes >= 64 ? 8 : 4)>;
using NarrowLanes = LanesOf<float, int32_t, kLanes<float>>;

template <int N>
struct Lanes {
  static constexpr int count = N;
};

// Cuts n channels into whole vectors and then halves, quarters, ... down to one: every element is read and
// written exactly once, so no neighbouring pixel can leak into the last lanes and no padding is needed.
template <class T, int N = kLanes<T>, class Body>
DCN_INLINE void for_each_vector(int64_t n, Body&& body) {
  int64_t c = 0;
  for (; c + N <= n; c += N) body(Lanes<N>{}, c);
  if constexpr (N > 1) {
    if (c == n) return;
    if constexpr (N >= 16) {
      if (n - c >= 8) body(Lanes<8>{}, c), c += 8;
    }
    if constexpr (N >= 8) {
      if (n - c >= 4) body(Lanes<4>{}, c), c += 4;
    }
    if constexpr (N >= 4) {
      if (n - c >= 2) body(Lanes<2>{}, c), c += 2;
    }
    if (n - c >= 1) body(Lanes<1>{}, c);
  }
}

template <int... I>
struct Indices {};
template <int N, int... I>
struct CountTo : CountTo<N - 1, N - 1, I...> {};
template <int... I>
struct CountTo<0, I...> {
  using type = Indices<I...>;
};

// Each number beside its sign, which makes it twice as wide: the half of the lanes from `first` on.
template <int N, int... I>
DCN_INLINE Vec<int64_t, N / 2> widened_half(Vec<int32_t, N> values, int first, Indices<I...>) {
  static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__);
  const auto signs = values >> 31;
  const auto half = first ? __builtin_shufflevector(values, signs, (I % 2 * N + N / 2 + I / 2)...)
                          : __builtin_shufflevector(values, signs, (I % 2 * N + I / 2)...);
  return load<Vec<int64_t, N / 2>>(&half);
}
template <int N>
DCN_INLINE Vec<int64_t, N / 2> widened_half(Vec<int32_t, N> values, int first) {
  return widened_half<N>(values, first, typename CountTo<N>::type{});
}

// Writes values[i] where the mask is set, else `otherwise`. In vectors as wide as a register: GCC takes conversions into
// wider ones apart, lane by lane.
template <int N>
DCN_INLINE void store_widened(Vec<int32_t, N> values, Vec<int32_t, N> mask, int64_t otherwise, int64_t* to) {
  const auto rest = broadcast<Vec<int64_t, N / 2>>(otherwise);
#pragma GCC unroll 2
  for (int first = 0; first < N; first += N / 2)
    store(to + first, ((widened_half<N>(values, first) - rest) & widened_half<N>(mask, first)) + rest);
}

// One step of a transposition by blocks: swaps the upper right and lower left blocks of size D in the pair of
// rows.
template <int D, class V, int... I>
DCN_INLINE void swap_blocks(V& a, V& b, Indices<I...>) {
  constexpr int n = sizeof...(I);
  const V first = __builtin_shufflevector(a, b, ((I & D) ? n + I - D : I)...);
  b = __builtin_shufflevector(a, b, ((I & D) ? n + I : I + D)...);
  a = first;
}

template <int D, class V, int N>
DCN_INLINE void transpose(V (&rows)[N]) {
  if constexpr (D < N) {
#pragma GCC unroll 16
    for (int i = 0; i < N; ++i)
      if (!(i & D)) swap_blocks<D>(rows[i], rows[i + D], typename CountTo<N>::type{});
    transpose<2 * D>(rows);
  }
}

template <class V, int... I>
DCN_INLINE V every_second(V a, V b, int first, Indices<I...>) {
  return first ? __builtin_shufflevector(a, b, (2 * I + 1)...) : __builtin_shufflevector(a, b, (2 * I)...);
}

// Count vectors that hold records of Count numbers one after the other -> one vector for each number of a record.
template <class V, int Count>
DCN_INLINE void deinterleave(V (&vectors)[Count]) {
  if constexpr (Count > 1) {
    constexpr int lanes = sizeof(V) / sizeof(vectors[0][0]);
    V halves[2][Count / 2];
    for (int i = 0; i < Count / 2; ++i)
      for (int odd = 0; odd < 2; ++odd)
        halves[odd][i] =
            every_second(vectors[2 * i], vectors[2 * i + 1], odd, typename CountTo<lanes>::type{});
    for (int odd = 0; odd < 2; ++odd) {
      deinterleave(halves[odd]);
      for (int i = 0; i < Count / 2; ++i) vectors[2 * i + odd] = halves[odd][i];
    }
  }
}

// Adds the halves of every block of B lanes of a, then of b: blocks of B / 2 lanes, those of a first.
template <int B, class V, int... I>
DCN_INLINE V fold_pair(V a, V b, Indices<I...>) {
  constexpr int n = sizeof...(I), half = B / 2;
  static_assert(n % B == 0);
  return __builtin_shufflevector(a, b, (I / half * B + I % half)...) +
         __builtin_shufflevector(a, b, (I / half * B + I % half + half)...);
}

// Folds `count` vectors in place until one is left that holds a block of lanes for each.
template <int B, int Count, class V>
DCN_INLINE void fold(V* vectors) {
  if constexpr (Count > 1) {
    constexpr int lanes = sizeof(V) / sizeof(vectors[0][0]);
    for (int i = 0; i < Count / 2; ++i)
      vectors[i] = fold_pair<B>(vectors[2 * i], vectors[2 * i + 1], typename CountTo<lanes>::type{});
    fold<B / 2, Count / 2>(vectors);
  }
}

// Adds up the lanes within each of Count equal blocks.
template <class T, int N, int Count, int... I>
DCN_INLINE Vec<T, N / 2> halve_blocks(Vec<T, N> v, Indices<I...>) {
  constexpr int block = N / Count, half = block / 2;
  return __builtin_shufflevector(v, v, (I / half * block + I % half)...) +
         __builtin_shufflevector(v, v, (I / half * block + I % half + half)...);
}

template <class T, int N, int Count>
DCN_INLINE Vec<T, Count> sum_blocks(Vec<T, N> v) {
  if constexpr (N == Count)
    return v;
  else
    return sum_blocks<T, N / 2, Count>(halve_blocks<T, N, Count>(v, typename CountTo<N / 2>::type{}));
}

// The sum of the lanes of each of Count vectors, as one vector. Folding them together takes a third of the
// shuffles.
template <class T, int N, int Count>
DCN_INLINE Vec<T, Count> sums(Vec<T, N> (&vectors)[Count]) {
  if constexpr (N >= Count) {
    fold<N, Count>(vectors);
    return sum_blocks<T, N, Count>(vectors[0]);
  } else {
    T lanes[Count][N], total[Count];
    __builtin_memcpy(lanes, vectors, sizeof lanes);
    for (int i = 0; i < Count; ++i) {
      total[i] = lanes[i][0];
      for (int lane = 1; lane < N; ++lane) total[i] += lanes[i][lane];
    }
    return load<Vec<T, Count>>(total);
  }
}

}  // namespace dcn::DCN_ISA
