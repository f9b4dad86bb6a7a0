// What a GPU kernel of the pooling over regions is given, by value. The same bytes are ROI_ARGUMENTS_DTYPE in
// dcn_np/cuda/launching.py.
#pragma once

#include "arrays.hpp"
#include "roi_geometry.hpp"

namespace dcn {

struct RoIArguments {
  RoIGeometry geometry;
  // (batch, outputs, slices, height, width), the outputs side by side: slice s has the channels s, s + group^2,
  // ... of an image.
  Array x, grad_x;
  // As the caller laid them out. `output` is y or, its channels side by side, grad_output.
  Array offset, mask, output, grad_offset, grad_mask, rois;
  // Between the two kernels that make grad_x.
  void* bins;
  void* boxes;
  // What this launch works on: bins or, for the gradients of offsets and masks, parts, numbered through all
  // regions; for grad_x, regions.
  int64_t first, count;
  // Whether regions, and offsets and masks, are float32; else they are what x is.
  int64_t float_rois, float_positions;
};

}  // namespace dcn
