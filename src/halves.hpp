// float16 and bfloat16 in memory, float in the kernels: the copies between an image's layout and channels-last
// widen and narrow on their way, and so do reads of offsets and masks. What a sum rounds is float; a result is
// rounded once, to nearest even.
//
// The conversions are integer arithmetic, so that compilers make vectors of them on every instruction set.
#pragma once

#include "kernels.hpp"
#include "platform.hpp"

namespace dcn::DCN_ISA {

DCN_INLINE float float_of(uint32_t bits) {
  float value;
  __builtin_memcpy(&value, &bits, sizeof value);
  return value;
}
DCN_INLINE uint32_t bits_of(float value) {
  uint32_t bits;
  __builtin_memcpy(&bits, &value, sizeof bits);
  return bits;
}

struct Float16 {
  static DCN_INLINE float widen(uint16_t half) {
    const uint32_t magnitude = (half & 0x7fffu) << 13, sign = (half & 0x8000u) << 16;
    // 112 is the difference of the exponents' biases. Below a normal number the exponent is one too many, and
    // the subtraction takes the leading one off again.
    const uint32_t normal = magnitude + (112u << 23), special = magnitude + (224u << 23);
    const uint32_t tiny = bits_of(float_of(magnitude + (113u << 23)) - float_of(113u << 23));
    const uint32_t finite = magnitude < 0x00800000u ? tiny : normal;
    return float_of((magnitude >= 0x0f800000u ? special : finite) | sign);
  }
  static DCN_INLINE uint16_t narrow(float value) {
    const uint32_t bits = bits_of(value), magnitude = bits & 0x7fffffffu;
    const uint32_t normal = (magnitude + 0xfffu + (magnitude >> 13 & 1) - (112u << 23)) >> 13;
    // The addition leaves as many bits as a number below the normal ones has.
    const uint32_t tiny = bits_of(float_of(magnitude < 0x38800000u ? magnitude : 0) + 0.5f) - 0x3f000000u;
    const uint32_t finite = magnitude < 0x38800000u ? tiny : normal;
    const uint32_t special = magnitude > 0x7f800000u ? 0x7e00u : 0x7c00u;  // from 65520 on infinite
    return static_cast<uint16_t>((magnitude >= 0x477ff000u ? special : finite) | (bits >> 16 & 0x8000u));
  }
};

struct BFloat16 {
  static DCN_INLINE float widen(uint16_t half) { return float_of(static_cast<uint32_t>(half) << 16); }
  static DCN_INLINE uint16_t narrow(float value) {
    const uint32_t bits = bits_of(value), rounded = bits + 0x7fffu + (bits >> 16 & 1);
    const bool nan = (bits & 0x7fffffffu) > 0x7f800000u;
    return static_cast<uint16_t>((nan ? bits | 0x00400000u : rounded) >> 16);
  }
};

// Calls body(half) for a storage that is one.
template <class Body>
DCN_INLINE void with_half(Storage storage, const Body& body) {
  if (storage == Storage::kFloat16)
    body(Float16{});
  else
    body(BFloat16{});
}

constexpr int64_t kHalfBytes = 2;

// `count` numbers at a distance in bytes, to or from floats side by side.
template <class Half>
DCN_INLINE void widen_line(const char* from, int64_t stride, int64_t count, float* to) {
  if (stride == kHalfBytes) {
    const uint16_t* halves = reinterpret_cast<const uint16_t*>(from);
    for (int64_t i = 0; i < count; ++i) to[i] = Half::widen(halves[i]);
  } else {
    for (int64_t i = 0; i < count; ++i)
      to[i] = Half::widen(*reinterpret_cast<const uint16_t*>(from + i * stride));
  }
}
template <class Half>
DCN_INLINE void narrow_line(const float* from, int64_t count, char* to, int64_t stride) {
  if (stride == kHalfBytes) {
    uint16_t* halves = reinterpret_cast<uint16_t*>(to);
    for (int64_t i = 0; i < count; ++i) halves[i] = Half::narrow(from[i]);
  } else {
    for (int64_t i = 0; i < count; ++i) *reinterpret_cast<uint16_t*>(to + i * stride) = Half::narrow(from[i]);
  }
}

// The same for a few numbers, where the code around is used often: not copied into it.
[[gnu::noinline]] inline void widen_some(Storage storage, const char* from, int64_t stride, int64_t count,
                                         float* to) {
  with_half(storage, [&](auto half) { widen_line<decltype(half)>(from, stride, count, to); });
}
[[gnu::noinline]] inline void narrow_some(Storage storage, const float* from, int64_t count, char* to,
                                          int64_t stride) {
  with_half(storage, [&](auto half) { narrow_line<decltype(half)>(from, count, to, stride); });
}

}  // namespace dcn::DCN_ISA
