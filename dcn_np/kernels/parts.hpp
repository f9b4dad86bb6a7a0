// Sums over positions in parts, so that many blocks share them: each part is a sum of its own in `between`, and
// copies.cu adds the parts up in their order.
#pragma once

#include "locating.hpp"

namespace dcn {

// The most products over positions that are added before the sum is put aside.
constexpr int kPartPiece = 256;

// The positions of one part: a multiple of kPartPiece, so that no piece of a sum is cut.
DCN_INLINE int64_t part_length(const Arguments& a) {
  return ceiling(ceiling(a.count, a.parts), kPartPiece) * kPartPiece;
}

// Where a sum of the weights' gradient lies in `between`, (parts, taps, out_channels, channels of a group).
template <class R>
DCN_INLINE R* partial_weight(const Arguments& a, int64_t part, int64_t tap, int64_t output, int64_t channel) {
  const Geometry& geometry = a.geometry;
  const int64_t channels = quotient(geometry.in_channels, geometry.groups);
  const int64_t row = (part * taps_of(geometry) + tap) * geometry.out_channels + output;
  return static_cast<R*>(a.between) + row * channels + channel;
}

}  // namespace dcn
