// Where the samples of a bin lie along one axis, and which pixels they weigh: rules R and P of
// docs/semantics.md, beside rule Z in sampling.hpp.
//
// Coordinates are double whatever the arrays are, and every product is rounded before it is added to: then
// every instruction set, the reference among them, decides alike on which side of a border a sample lies.
#pragma once

#include "integers.hpp"
#include "roi_geometry.hpp"

namespace DCN_NAMESPACE {

// A number as it is, kept from being fused with an addition that follows.
DCN_INLINE double rounded(double value) {
#if defined(__CUDACC__)
  return __dmul_rn(value, 1.0);
#elif defined(__x86_64__)
  asm("" : "+x"(value));
#elif defined(__aarch64__)
  asm("" : "+w"(value));
#else
  asm("" : "+m"(value));
#endif
  return value;
}

DCN_INLINE double truncated(double value) {
  const bool has_fraction = value > -4503599627370496.0 && value < 4503599627370496.0;  // 2^52; false for NaN
  return has_fraction ? static_cast<double>(static_cast<int64_t>(value)) : value;
}
DCN_INLINE double floor_of(double value) {
  const double whole = truncated(value);
  return whole > value ? whole - 1 : whole;
}
DCN_INLINE double ceil_of(double value) {
  const double whole = truncated(value);
  return whole < value ? whole + 1 : whole;
}
DCN_INLINE double rounded_half_away(double value) {
  const double whole = truncated(value), rest = value - whole;
  return rest >= 0.5 ? whole + 1 : rest <= -0.5 ? whole - 1 : whole;
}

// One axis of one region: y is axis 0, x is axis 1.
struct RoIAxis {
  int64_t extent;
  double start, size, bin, step;  // of the region, of a bin, from sample to sample; in pixels
  double samples;                 // of a bin; may be larger than any integer
  double centre;                  // where a sample lies in its step
  double margin;                  // how far outside the pixels a sample may lie
  bool counts_all;                // the average is over all samples, or over those inside

  RoIAxis() = default;
  DCN_INLINE RoIAxis(const RoIGeometry& geometry, double low, double high, int axis)
      : extent(geometry.input[axis]), counts_all(!geometry.position_sensitive) {
    const double scale = geometry.spatial_scale;
    if (geometry.position_sensitive) {
      start = rounded(rounded_half_away(low) * scale) - 0.5;
      size = rounded((rounded_half_away(high) + 1) * scale) - 0.5 - start;
      size = size < 0.1 ? 0.1 : size;
    } else {
      start = rounded(low * scale) - 0.5;
      size = rounded(high * scale) - 0.5 - start;
    }
    centre = counts_all ? 0.5 : 0.0;
    margin = counts_all ? 1.0 : 0.5;
    bin = size / static_cast<double>(geometry.output[axis]);
    const double adaptive = ceil_of(bin);
    samples = geometry.samples > 0 ? static_cast<double>(geometry.samples) : adaptive > 0 ? adaptive : 0;
    step = samples > 0 ? bin / samples : 0;
  }
  // Where the samples of a bin begin: an infinite offset is outside, whatever the size.
  DCN_INLINE double base(int64_t index, double offset, double offset_scale) const {
    const bool infinite = offset - offset != 0;
    const double shift = infinite ? offset : rounded(rounded(offset_scale * size) * offset);
    return start + rounded(static_cast<double>(index) * bin) + shift;
  }
  DCN_INLINE double coordinate(double base, double sample) const {
    return base + rounded((sample + centre) * step);
  }
  // False for NaN.
  DCN_INLINE bool between_pixels(double coordinate) const {
    return coordinate >= 0 && coordinate < static_cast<double>(extent - 1);
  }
};

struct RoISample {
  bool inside;
  bool moves;       // between pixels: the derivative is that of the cell [low, low + 1), else 0
  int64_t low;      // the lower pixel; there is an upper one where `fraction` is not 0
  double fraction;  // the weight of the upper pixel
};

DCN_INLINE RoISample roi_sample(const RoIAxis& axis, double coordinate) {
  const double last = static_cast<double>(axis.extent - 1);
  RoISample sample = {};
  // False for NaN: nothing is converted that is not inside.
  sample.inside = axis.extent > 0 && coordinate >= -axis.margin && coordinate <= last + axis.margin;
  if (!sample.inside) return sample;
  const double clamped = coordinate < 0 ? 0 : coordinate > last ? last : coordinate;
  sample.low = static_cast<int64_t>(clamped);
  sample.fraction = clamped - static_cast<double>(sample.low);
  sample.moves = axis.between_pixels(coordinate);
  return sample;
}

constexpr double kFewSamples = 16;  // of a bin: not worth finding out which

// Consecutive samples of a bin.
struct RoISpan {
  double first;
  int64_t count;
};

// Those that can lie between two coordinates, as far as they are inside, and perhaps a few more.
DCN_INLINE RoISpan roi_span(const RoIAxis& axis, double base, double from, double to) {
  const double samples = axis.samples;
  if (samples <= kFewSamples || axis.step == 0) return {0, static_cast<int64_t>(samples)};
  const double a = (from - base) / axis.step, b = (to - base) / axis.step;
  // One more on each side, for the rounding; each sample is looked at again.
  const double low = floor_of((a < b ? a : b) - axis.centre) - 1,
               high = ceil_of((a < b ? b : a) - axis.centre) + 1;
  const double first = low > 0 ? low : 0, end = high < samples - 1 ? high : samples - 1;
  // No more than so many lie there. Where a region is too large for a double to tell them apart, this ends
  // it.
  const double step = axis.step < 0 ? -axis.step : axis.step, most = (to - from) / step + 4;
  double count = end - first + 1;
  count = count < most ? count : most;
  return {first, count > 0 && axis.extent > 0 ? static_cast<int64_t>(count) : 0};
}

// Those that can be inside.
DCN_INLINE RoISpan roi_span(const RoIAxis& axis, double base) {
  return roi_span(axis, base, -axis.margin, static_cast<double>(axis.extent - 1) + axis.margin);
}

// ---- bins and the coarser grids that they belong to: of offsets, and of slices of the channels

// The cell of a grid of rows and columns, numbered row by row, that a bin belongs to.
DCN_INLINE int64_t cell_of_bin(const RoIGeometry& geometry, int64_t row, int64_t column, int64_t rows,
                               int64_t columns) {
  return quotient(row * rows, geometry.output[0]) * columns + quotient(column * columns, geometry.output[1]);
}

struct Range {
  int64_t first, end;
};

// The bins along an axis that `part` of `parts` has, where bin i belongs to part floor(i * parts / bins).
DCN_INLINE Range bins_of_part(int64_t part, int64_t parts, int64_t bins) {
  return {ceiling(part * bins, parts), ceiling((part + 1) * bins, parts)};
}

}  // namespace DCN_NAMESPACE
