// What every GPU kernel is given, by value. The same bytes are ARGUMENTS_DTYPE in dcn_np/cuda/launching.py.
#pragma once

#include "arrays.hpp"

namespace dcn {

struct Arguments {
  Geometry geometry;
  // Images channels-last: `channel` is the size of an element.
  Array x, grad_x;
  // As the caller laid them out. `output` is y or, channels-last, grad_output.
  Array offset, mask, output, grad_offset, grad_mask;
  const void* bias;
  // (taps, first, second): which of the two channel axes is the inner one, each kernel says.
  const void* weight;
  // What lies between two kernels of one call: columns, or partial sums.
  void* between;
  // The positions that this launch works on, numbered through all images.
  int64_t first, count;
  // Into how many parts a sum over positions is cut.
  int64_t parts;
};

}  // namespace dcn
