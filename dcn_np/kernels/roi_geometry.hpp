// The one description of a pooling over regions that every layer below the public functions reads.
//
// The same bytes are ROI_GEOMETRY_DTYPE in dcn_np/roi_geometry.py. Pairs are in the order of x: height,
// width. Everything but the values of regions and offsets is checked in Python: below that, this is a
// contract.
#pragma once

#include "platform.hpp"

namespace dcn {

struct RoIGeometry {
  int64_t batch;
  int64_t channels;  // of x: outputs * group^2
  int64_t rois;
  int64_t outputs;             // channels of the result
  int64_t position_sensitive;  // 0: rule R, 1: rule P (roi_sampling.hpp)
  int64_t group;               // x holds group^2 channels for each output
  int64_t classes;             // divides the outputs; each class has offsets of its own
  int64_t samples;             // of a bin along an axis; 0: as many as the bin is long
  int64_t input[2];
  int64_t output[2];
  int64_t part[2];  // offsets per region
  double spatial_scale;
  double offset_scale;  // gamma or trans_std
};

}  // namespace dcn
