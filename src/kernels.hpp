// What one instruction set provides, and the arguments that cross into it. Nothing here depends on an
// instruction set.
#pragma once

#include "arrays.hpp"
#include "parallel.hpp"
#include "roi_geometry.hpp"

namespace dcn {

// The one list of element types: Python's dtype.name, the C++ type.
#define DCN_FOR_EACH_DTYPE(X) \
  X(float32, float)           \
  X(float64, double)

enum DType : int {
#define DCN_DTYPE(name, type) k_##name,
  DCN_FOR_EACH_DTYPE(DCN_DTYPE)
#undef DCN_DTYPE
      kDTypes
};

// What an array holds: numbers of the kernel's type or, where that is float32, halves. Python's dtype.name.
#define DCN_FOR_EACH_HALF(X) \
  X(float16, kFloat16)       \
  X(bfloat16, kBFloat16)

enum class Storage : int { kSame, kFloat16, kBFloat16 };

// What calls of one geometry keep between them; each part is released by release().
struct PreparedForward {
  void* weights;  // as the kernels read them; calls side by side may share them
  void* space;    // working space of one call at a time, whatever the strides of its arrays
  int threads;    // the most that such a call may have
};

// x, offset, mask: see Geometry for their shapes. weight: (out_channels, in_channels / groups, taps), C
// order. Weights, bias and their gradients are always of the kernel's type.
struct ForwardArguments {
  Geometry geometry;
  Storage images, positions;  // of x and the output; of offset and mask
  Array x;
  Planes offset, mask;
  const void* weight;
  const void* bias;  // (out_channels), or null
  Planes output;
  const PreparedForward* prepared;  // `weight` is then not read; null: the call does all by itself
};

// A gradient whose pointer is null is not computed.
struct BackwardArguments {
  Geometry geometry;
  Storage images, positions;  // of x, grad_x and grad_output; of the other two and their gradients
  Array x;
  Planes offset, mask, grad_output;
  const void* weight;
  Array grad_x;
  Planes grad_offset, grad_mask;
  void* grad_weight;
  void* grad_bias;
};

// Pooling over regions. rois: (rois, 5), contiguous. The indices of the regions ordered by image are `order`,
// and those of image i begin at begins[i]. offset: (rois, 2 * classes, *part), mask: (rois, 1, *output), or
// null.
struct RoIArrays {
  Storage images, positions;  // of x, the output and their gradients; of offset and mask and theirs
  const double* rois;
  const int64_t* order;
  const int64_t* begins;
  Array x;
  Planes offset, mask;
};

struct RoIForwardArguments {
  RoIGeometry geometry;
  RoIArrays arrays;
  Planes output;  // (rois, outputs, *output)
};

// A gradient whose pointer is null is not computed.
struct RoIBackwardArguments {
  RoIGeometry geometry;
  RoIArrays arrays;
  Planes grad_output;
  Array grad_x;
  Planes grad_offset, grad_mask;
};

using Forward = Status (*)(const ForwardArguments&, Team&);
// Fills in what is null of a PreparedForward for its number of threads; of the arguments, geometry, storage and weight
// are read. What was filled in stays, also where the rest failed.
using PrepareForward = Status (*)(const ForwardArguments&, Team&, PreparedForward&);
using Backward = Status (*)(const BackwardArguments&, Team&);
// Writes factor / (1 + exp(-value)) over every value; extents: batch, channels, positions.
using Logistic = void (*)(const Planes&, Storage, const int64_t (&extents)[3], double factor);
using RoIForward = Status (*)(const RoIForwardArguments&, Team&);
using RoIBackward = Status (*)(const RoIBackwardArguments&, Team&);

struct Kernels {
  const char* isa;
  Forward forward[kDTypes][kMaxAxes];  // by rank - 1
  PrepareForward prepare_forward[kDTypes][kMaxAxes];
  Backward backward[kDTypes][kMaxAxes];
  Logistic logistic[kDTypes];
  RoIForward roi_forward[kDTypes];
  RoIBackward roi_backward[kDTypes];
};

}  // namespace dcn
