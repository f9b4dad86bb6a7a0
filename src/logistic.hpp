// The logistic function, of which masks are made.
#pragma once

#include "displacement.hpp"

namespace dcn::DCN_ISA {

// As many numbers as a register holds, with whole numbers as wide.
template <class T>
struct RegisterLanes {
  using type = LanesOf<T, int64_t, kLanes<T>>;
};
template <>
struct RegisterLanes<float> {
  using type = NarrowLanes;
};

template <class T>
struct Exponential {
  static constexpr bool kSingle = sizeof(T) == sizeof(float);
  static constexpr int kMantissa = kSingle ? 23 : 52, kBias = kSingle ? 127 : 1023;
  static constexpr T kLeast = kSingle ? T(-104) : T(-746);  // half the smallest number and less: rounded to 0
  static constexpr int kTerms = kSingle ? 7 : 13;  // the next is below a tenth of a unit in the last place
  static constexpr T kRound = static_cast<T>(3LL << (kMantissa - 1));  // added, it leaves whole numbers
  // ln 2 in two parts, the first so short that its products with exponents are exact.
  static constexpr long double kLn2 = 0.693147180559945309417232121458L;
  static constexpr int64_t kCut = kSingle ? 1 << 10 : int64_t{1} << 32;
  static constexpr T kHigh = static_cast<T>(static_cast<int64_t>(kLn2 * kCut)) / kCut;
  static constexpr T kLow = static_cast<T>(kLn2 - kHigh);
};

// exp(x) for x <= 0: 2^n times the series of exp at x - n ln 2, which is at most ln 2 / 2 away from 0. The power of two
// is multiplied in two steps, since one number cannot hold it where the result is below the normal ones.
template <class L>
DCN_INLINE typename L::Real exponential(typename L::Real x) {
  using T = typename L::Element;
  using E = Exponential<T>;
  using Real = typename L::Real;
  using Bits = typename L::Index;
  x = L::select(x < E::kLeast, L::real(E::kLeast), x);
  const Real shifted = x * static_cast<T>(1 / E::kLn2) + E::kRound, n = shifted - E::kRound;
  const Real r = (x - n * E::kHigh) - n * E::kLow;
  Real sum = L::real(1);
#pragma GCC unroll 16
  for (int k = E::kTerms; k > 0; --k) sum = sum * (r * (T(1) / static_cast<T>(k))) + T(1);
  const Bits power = reinterpret_cast<Bits>(shifted) - reinterpret_cast<Bits>(L::real(E::kRound));
  const Bits first = power >> 1, second = power - first;
  const auto power_of_two = [](Bits exponent) __attribute__((always_inline)) {
    return reinterpret_cast<Real>((exponent + E::kBias) << E::kMantissa);
  };
  return sum * power_of_two(first) * power_of_two(second);
}

// factor / (1 + exp(-v)), without a power that overflows. A NaN stays one.
template <class L>
DCN_INLINE typename L::Real logistic_of(typename L::Real v, typename L::Real factor) {
  using T = typename L::Element;
  const auto power = exponential<L>(L::select(v < T(0), v, -v));
  const auto above = factor / (power + T(1));
  return L::select(v >= T(0), above, power * above);
}

// Writes it over the values: (batch, channels, positions).
template <class T>
void logistic(const Planes& values, Storage storage, const int64_t (&extents)[3], double factor) {
  using L = typename RegisterLanes<T>::type;
  const auto [batch, channels, positions] = extents;
  for (int64_t image = 0; image < batch; ++image) {
    const Displacement<T, 1> lines({}, values, storage, channels, image, 0, 1);
    for (int64_t channel = 0; channel < channels; ++channel) {
      const TapNumbers<T, 1> line(lines, channel, 0);
      for (int64_t p = 0; p < positions; p += L::count) {
        const auto found = logistic_of<L>(line.template masks<L>(p, positions - p), L::real(factor));
        lines.template write_masks<L>(channel, p, positions - p, found);
      }
    }
  }
}

}  // namespace dcn::DCN_ISA
