// The one description of a deformable convolution that every layer below the public functions reads.
//
// The same bytes are GEOMETRY_DTYPE in dcn_np/geometry.py, this struct in C++ and in CUDA. Axes are in the
// order of x; axes past `ndim` are 1 (padding 0). Everything is checked in Python: below that, this is a
// contract.
#pragma once

#include "platform.hpp"

namespace dcn {

constexpr int kMaxAxes = 3;

struct Geometry {
  int64_t ndim;
  int64_t batch;
  int64_t in_channels;
  int64_t out_channels;
  int64_t groups;
  int64_t offset_groups;
  int64_t input[kMaxAxes];
  int64_t kernel[kMaxAxes];
  int64_t stride[kMaxAxes];
  int64_t padding[kMaxAxes];  // before the first pixel; the padding at the end only shows in `output`
  int64_t dilation[kMaxAxes];
  int64_t output[kMaxAxes];
};

}  // namespace dcn
