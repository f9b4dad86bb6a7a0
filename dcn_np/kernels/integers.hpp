// Arithmetic of indices and of the numbers of blocks; nothing is negative.
#pragma once

#include "platform.hpp"

namespace DCN_NAMESPACE {

// 64-bit divisions take several times as long as 32-bit ones, and are rarely needed.
DCN_INLINE int64_t quotient(int64_t dividend, int64_t divisor) {
  if ((static_cast<uint64_t>(dividend | divisor) >> 32) == 0)
    return static_cast<uint32_t>(dividend) / static_cast<uint32_t>(divisor);
  return dividend / divisor;
}

DCN_INLINE int64_t ceiling(int64_t dividend, int64_t divisor) {
  return quotient(dividend + divisor - 1, divisor);
}

DCN_INLINE int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

DCN_INLINE int64_t common_divisor(int64_t a, int64_t b) {
  while (b) {
    const int64_t rest = a - quotient(a, b) * b;
    a = b, b = rest;
  }
  return a;
}

// Takes the innermost of several axes off the number of a block and returns the index along it.
DCN_INLINE int64_t take(int64_t& block, int64_t extent) {
  const int64_t rest = quotient(block, extent), index = block - rest * extent;
  block = rest;
  return index;
}

}  // namespace DCN_NAMESPACE
