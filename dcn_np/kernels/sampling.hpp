// Where a tap samples: coordinate -> cell, fraction, corner weights. One text for the CPU (vectors of
// positions) and the GPU.
//
// `Lanes` says what a number is: Lanes::Real, ::Index and the masks that their comparisons give
// (::RealMask, ::Mask), vectors on a CPU and scalars on a GPU, with Lanes::select(), floor(), widen() and so on
// beside them.
//
// The rule (docs/semantics.md): linear interpolation with zeros outside; support is the open box (-1,
// extent). The integer part of a coordinate is an integer and the fraction comes from the offset alone, so
// the error of a sample does not grow with the size of the image. The cell is [floor, floor + 1): derivatives
// are from the right.
#pragma once

#include "platform.hpp"

namespace DCN_NAMESPACE {

template <class Lanes>
struct AxisSample {
  typename Lanes::Index cell;      // the lower neighbour, 0 where the coordinate is outside
  typename Lanes::Real weight[2];  // of the lower and the upper neighbour, 0 where that is outside the image
  typename Lanes::Mask inside[2];  // whether each neighbour is in the image, for a coordinate in the support
  typename Lanes::Mask
      supported;  // whether the coordinate is; not from inside[], for GCC unites masks bit by bit
  typename Lanes::RealMask is_nan;
};

// The floor, for lanes that have no instruction for it. What is too large to convert comes back as it is.
template <class Lanes>
DCN_INLINE typename Lanes::Real floor_by_conversion(typename Lanes::Real value) {
  using Real = typename Lanes::Real;
  const Real limit = Lanes::real(Lanes::kLimit), zero = {};
  const auto small = (value > -limit) & (value < limit);
  const Real truncated = Lanes::truncate(Lanes::select(small, value, zero));
  const Real floor = Lanes::select(truncated > value, truncated - Lanes::real(1), truncated);
  return Lanes::select(small, floor, value);
}

// base: the tap's position on the rigid grid. No value of `offset` can make `cell` leave [-1, extent).
template <class Lanes>
DCN_INLINE AxisSample<Lanes> locate_axis(typename Lanes::Real offset, typename Lanes::Index base,
                                         int64_t extent) {
  using Real = typename Lanes::Real;
  using Index = typename Lanes::Index;
  const Real zero = {};
  const Real limit = Lanes::real(Lanes::kLimit);

  // Refused in floating point, before any conversion: NaN, infinities and what is too large to convert.
  Real floor = Lanes::floor(offset);
  const auto in_range = (floor > -limit) & (floor < limit);
  floor = Lanes::select(in_range, floor, zero);
  Real fraction = offset - floor;
  // A tiny negative offset: the fraction was rounded up to the next cell.
  const auto carry = fraction >= Lanes::real(1);
  fraction = Lanes::select(carry, zero, fraction);
  floor = Lanes::select(carry, floor + Lanes::real(1), floor);

  AxisSample<Lanes> sample;
  const Index cell = base + Lanes::index_of(floor);
  const auto valid = Lanes::widen(in_range);
  const Index upper = cell + Lanes::index(1);
  sample.inside[0] = valid & Lanes::within(cell, extent);
  sample.inside[1] = valid & Lanes::within(upper, extent);
  sample.supported = valid & Lanes::within(upper, extent + 1);
  sample.cell = Lanes::select(sample.supported, cell, Index{});
  sample.weight[0] = Lanes::select(Lanes::narrow(sample.inside[0]), Lanes::real(1) - fraction, zero);
  sample.weight[1] = Lanes::select(Lanes::narrow(sample.inside[1]), fraction, zero);
  sample.is_nan = offset != offset;
  return sample;
}

// Corner j of the cell takes the upper neighbour on the axes whose bit is set; the last axis is bit 0.
template <int NDim>
DCN_INLINE constexpr int corner_bit(int corner, int axis) {
  return (corner >> (NDim - 1 - axis)) & 1;
}

// The product of the axis weights of a corner; with `skip` >= 0 that axis is left out, as its derivative
// needs.
template <class Lanes, int NDim>
DCN_INLINE typename Lanes::Real corner_weight(const AxisSample<Lanes> (&axes)[NDim], int corner,
                                              int skip = -1) {
  typename Lanes::Real weight = Lanes::real(1);
  for (int axis = 0; axis < NDim; ++axis)
    if (axis != skip) weight = weight * axes[axis].weight[corner_bit<NDim>(corner, axis)];
  return weight;
}

template <class Lanes, int NDim>
DCN_INLINE typename Lanes::Mask corner_inside(const AxisSample<Lanes> (&axes)[NDim], int corner) {
  auto inside = axes[0].inside[corner_bit<NDim>(corner, 0)];
  for (int axis = 1; axis < NDim; ++axis) inside = inside & axes[axis].inside[corner_bit<NDim>(corner, axis)];
  return inside;
}

template <class Lanes, int NDim>
DCN_INLINE typename Lanes::RealMask any_nan(const AxisSample<Lanes> (&axes)[NDim]) {
  auto nan = axes[0].is_nan;
  for (int axis = 1; axis < NDim; ++axis) nan = nan | axes[axis].is_nan;
  return nan;
}

// The weight of a corner with the mask folded in. A corner whose interpolation weight is exactly 0 keeps
// exactly 0 whatever the mask, and is not `used`. At a NaN coordinate no corner is, and the first is NaN:
// enough for the sample.
template <class Lanes, int NDim>
DCN_INLINE typename Lanes::Real masked_weight(const AxisSample<Lanes> (&axes)[NDim], int corner,
                                              typename Lanes::Real mask, typename Lanes::Mask& used) {
  const typename Lanes::Real weight = corner_weight<Lanes, NDim>(axes, corner), zero = {};
  const auto counts = weight != zero;
  used = Lanes::widen(counts);
  const typename Lanes::Real folded = Lanes::select(counts, weight * mask, zero);
  return corner > 0 ? folded : Lanes::select(any_nan<Lanes, NDim>(axes), Lanes::real(DCN_NAN), folded);
}

template <class Lanes, int NDim>
struct PositionGradients {
  typename Lanes::Real offset[NDim];
  typename Lanes::Real mask;
};

// grad_offset and grad_mask of a tap from dots[corner] = <grad_columns, pixel of the corner>.
//
// A term whose factor is exactly 0 is left out, not multiplied: 0 * Inf would be NaN. Along an axis the
// corners whose weight on the other axes is not 0 take part, so at integer positions the derivative is the
// one from the right.
template <class Lanes, int NDim>
DCN_INLINE PositionGradients<Lanes, NDim> position_gradients(const AxisSample<Lanes> (&axes)[NDim],
                                                             typename Lanes::Real mask,
                                                             const typename Lanes::Real (&dots)[1 << NDim]) {
  using Real = typename Lanes::Real;
  const Real zero = {};
  const auto nan = any_nan<Lanes, NDim>(axes);
  auto supported = axes[0].supported;
  for (int axis = 1; axis < NDim; ++axis) supported = supported & axes[axis].supported;

  // sum over corners of weight x dot, where the weight is not 0 and the corner is in the image
  const auto weighted = [&](int corner, Real weight) {
    const auto counts = (weight != zero) & Lanes::narrow(corner_inside<Lanes, NDim>(axes, corner));
    return Lanes::select(counts, weight * dots[corner], zero);
  };
  const auto finish = [&](Real value) {
    const Real defined = Lanes::select(Lanes::narrow(supported), value, zero);
    return Lanes::select(nan, Lanes::real(DCN_NAN), defined);
  };

  PositionGradients<Lanes, NDim> gradients;
  Real value = zero;
  for (int corner = 0; corner < 1 << NDim; ++corner)
    value = value + weighted(corner, corner_weight<Lanes, NDim>(axes, corner));
  gradients.mask = finish(value);
  for (int axis = 0; axis < NDim; ++axis) {
    Real slope = zero;
    for (int corner = 0; corner < 1 << NDim; ++corner) {
      const Real term = weighted(corner, corner_weight<Lanes, NDim>(axes, corner, axis));
      slope = corner_bit<NDim>(corner, axis) ? slope + term : slope - term;
    }
    gradients.offset[axis] = finish(mask * slope);
  }
  return gradients;
}

}  // namespace DCN_NAMESPACE
