// From the number of an output position to the pixels that a tap reads there: locate, for one GPU thread.
#pragma once

#include "arguments.hpp"
#include "scalar.hpp"

namespace dcn {

// 64-bit divisions take several times as long as 32-bit ones, and are rarely needed.
DCN_INLINE int64_t quotient(int64_t dividend, int64_t divisor) {
  if ((static_cast<uint64_t>(dividend | divisor) >> 32) == 0)
    return static_cast<uint32_t>(dividend) / static_cast<uint32_t>(divisor);
  return dividend / divisor;
}

DCN_INLINE int64_t ceiling(int64_t dividend, int64_t divisor) {
  return quotient(dividend + divisor - 1, divisor);
}

DCN_INLINE int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

// Takes the innermost of several axes off the number of a block and returns the index along it.
DCN_INLINE int64_t take(int64_t& block, int64_t extent) {
  const int64_t rest = quotient(block, extent), index = block - rest * extent;
  block = rest;
  return index;
}

DCN_INLINE int64_t output_positions(const Geometry& geometry) {
  return geometry.output[0] * geometry.output[1] * geometry.output[2];
}

DCN_INLINE int64_t taps_of(const Geometry& geometry) {
  return geometry.kernel[0] * geometry.kernel[1] * geometry.kernel[2];
}

template <int NDim>
struct Position {
  int64_t image;
  int64_t at[NDim];

  // number: counted through the output positions of all images.
  DCN_INLINE Position(const Geometry& geometry, int64_t number) {
    image = quotient(number, output_positions(geometry));
    int64_t rest = number - image * output_positions(geometry);
    for (int axis = NDim - 1; axis >= 0; --axis) {
      const int64_t outer = axis > 0 ? quotient(rest, geometry.output[axis]) : 0;
      at[axis] = rest - outer * geometry.output[axis];
      rest = outer;
    }
  }

  template <class T>
  DCN_INLINE T* in(const Array& array, int64_t channel) const {
    char* address = array.data + image * array.batch + channel * array.channel;
    for (int axis = 0; axis < NDim; ++axis) address += at[axis] * array.axis[axis];
    return reinterpret_cast<T*>(address);
  }
};

// The axes of one tap, numbered row by row, of one offset group. P is what offsets are stored in.
template <class Lanes, class P, int NDim>
DCN_INLINE void locate(const Arguments& a, const Position<NDim>& position, int64_t tap, int64_t offset_group,
                       AxisSample<Lanes> (&axes)[NDim]) {
  const Geometry& geometry = a.geometry;
  const int64_t first_channel = (offset_group * taps_of(geometry) + tap) * NDim;
  int64_t rest = tap;
  for (int axis = NDim - 1; axis >= 0; --axis) {
    const int64_t outer = axis > 0 ? quotient(rest, geometry.kernel[axis]) : 0;
    const int64_t reach = (rest - outer * geometry.kernel[axis]) * geometry.dilation[axis];
    rest = outer;
    const int64_t base = position.at[axis] * geometry.stride[axis] - geometry.padding[axis] + reach;
    const typename Lanes::Real offset =
        a.offset.data ? widened(load(position.template in<const P>(a.offset, first_channel + axis)))
                      : Lanes::real(0);
    axes[axis] = locate_axis<Lanes>(offset, base, geometry.input[axis]);
  }
}

template <class Lanes, class P, int NDim>
DCN_INLINE typename Lanes::Real mask_of(const Arguments& a, const Position<NDim>& position, int64_t tap,
                                        int64_t offset_group) {
  if (!a.mask.data) return Lanes::real(1);
  return widened(load(position.template in<const P>(a.mask, offset_group * taps_of(a.geometry) + tap)));
}

// Where the pixel of a corner lies in `images`, in bytes from its beginning.
template <class Lanes, int NDim>
DCN_INLINE int64_t corner_place(const AxisSample<Lanes> (&axes)[NDim], int corner, int64_t image,
                                const Array& images) {
  int64_t place = image * images.batch;
  for (int axis = 0; axis < NDim; ++axis)
    place += (axes[axis].cell + corner_bit<NDim>(corner, axis)) * images.axis[axis];
  return place;
}

}  // namespace dcn
