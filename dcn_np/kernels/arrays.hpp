// Arrays as the kernels see them: a pointer and strides in bytes. No ownership, no checks.
#pragma once

#include "geometry.hpp"

namespace dcn {

// (batch, channels, *axes). `data` is null where the argument was None.
struct Array {
  char* data;
  int64_t batch;
  int64_t channel;
  int64_t axis[kMaxAxes];
};

// An array whose axes are one flat axis of positions at a constant distance: planar (distance one element),
// channels-last (distance channels), or anything between that Python arranged so.
struct Planes {
  char* data;
  int64_t batch;
  int64_t channel;
  int64_t position;
};

}  // namespace dcn
