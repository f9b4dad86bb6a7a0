// What the forward and the backward pass derive from the geometry.
#pragma once

#include "columns.hpp"
#include "integers.hpp"
#include "kernels.hpp"
#include "layout.hpp"
#include "matmul.hpp"
#include "workspace.hpp"

namespace dcn::DCN_ISA {

DCN_INLINE int64_t clamp(int64_t value, int64_t low, int64_t high) {
  return value < low ? low : value > high ? high : value;
}

template <class T, int NDim>
struct Plan {
  const Geometry& geometry;
  int64_t taps = 1, positions = 1;
  int64_t group_inputs, group_outputs;  // channels of a weight group
  int64_t offset_group_channels;
  bool depthwise;  // one channel in, one out: a sum per channel instead of a product of matrices

  explicit Plan(const Geometry& geometry) : geometry(geometry) {
    for (int axis = 0; axis < NDim; ++axis) {
      taps *= geometry.kernel[axis];
      positions *= geometry.output[axis];
    }
    group_inputs = geometry.in_channels / geometry.groups;
    group_outputs = geometry.out_channels / geometry.groups;
    offset_group_channels = geometry.in_channels / geometry.offset_groups;
    depthwise = group_inputs == 1 && group_outputs == 1;
  }
  // Whether weights have left the second-level cache when they are multiplied again.
  bool weights_are_far() const {
    return taps * group_inputs * geometry.out_channels > (1 << 20) / static_cast<int64_t>(sizeof(T));
  }
  Tile<NDim> tile(int64_t index, int64_t size) const {
    const int64_t first = index * size;
    return Tile<NDim>(geometry, first, least(size, positions - first));
  }
};

}  // namespace dcn::DCN_ISA
