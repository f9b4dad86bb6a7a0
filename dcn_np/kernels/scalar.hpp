// Numbers as one GPU thread sees them: what is stored, what it computes in, and the Lanes of sampling.hpp.
#pragma once

#include "device.hpp"
#include "sampling.hpp"

namespace dcn {

// The half types are bits; device.hpp converts them. No CUDA header is needed for that.
struct Float16 {
  uint16_t bits;
};
struct BFloat16 {
  uint16_t bits;
};

// The type that a stored type is computed and summed in.
template <class T>
struct SumOf {
  using type = T;
};
template <>
struct SumOf<Float16> {
  using type = float;
};
template <>
struct SumOf<BFloat16> {
  using type = float;
};
template <class T>
using Sum = typename SumOf<T>::type;

DCN_INLINE float widened(Float16 value) { return float_of_f16(value.bits); }
DCN_INLINE float widened(BFloat16 value) { return float_of_bf16(value.bits); }
DCN_INLINE float widened(float value) { return value; }
DCN_INLINE double widened(double value) { return value; }

// Memory that nothing writes during the kernel.
template <class T>
DCN_INLINE T load(const T* from) {
  return load_readonly(from);
}
DCN_INLINE Float16 load(const Float16* from) { return {load_readonly(&from->bits)}; }
DCN_INLINE BFloat16 load(const BFloat16* from) { return {load_readonly(&from->bits)}; }

DCN_INLINE void store(Float16* to, float value) { to->bits = f16_of(value); }
DCN_INLINE void store(BFloat16* to, float value) { to->bits = bf16_of(value); }
DCN_INLINE void store(float* to, float value) { *to = value; }
DCN_INLINE void store(double* to, double value) { *to = value; }

// All threads of the warp take part, and all get the sum.
template <class R>
DCN_INLINE R sum_of_warp(R value) {
#pragma unroll
  for (int lanes = 16; lanes > 0; lanes /= 2) value += shuffle_xor(value, lanes);
  return value;
}

// One position at a time.
template <class T>
struct ScalarLanes {
  static constexpr int count = 1;
  using Element = T;
  using Real = T;
  using Index = int64_t;
  using Mask = bool;
  using RealMask = bool;
  static constexpr double kLimit = 2147483648.0;
  static DCN_INLINE Real real(double value) { return static_cast<T>(value); }
  static DCN_INLINE Index index(int64_t value) { return value; }
  static DCN_INLINE Real truncate(Real value) { return static_cast<T>(static_cast<int32_t>(value)); }
  static DCN_INLINE Real floor(Real value) { return floor_by_conversion<ScalarLanes>(value); }
  static DCN_INLINE Mask within(Index value, int64_t count) { return value >= 0 && value < count; }
  static DCN_INLINE Index index_of(Real value) { return static_cast<int32_t>(value); }
  static DCN_INLINE Mask widen(RealMask mask) { return mask; }
  static DCN_INLINE RealMask narrow(Mask mask) { return mask; }
  template <class V>
  static DCN_INLINE V select(bool mask, V yes, V no) {
    return mask ? yes : no;
  }
};

}  // namespace dcn
