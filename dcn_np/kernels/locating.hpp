// From the number of an output position to the pixels that a tap reads there: locate, for one GPU thread.
#pragma once

#include "arguments.hpp"
#include "integers.hpp"
#include "scalar.hpp"

namespace dcn {

DCN_INLINE int64_t output_positions(const Geometry& geometry) {
  return geometry.output[0] * geometry.output[1] * geometry.output[2];
}

DCN_INLINE int64_t end_of(const Arguments& a) { return a.first + a.count; }

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

// The corners of a sample as its gradients see them.
template <class Lanes, class P, int NDim>
struct CornersOf {
  static constexpr int kCorners = 1 << NDim;
  int64_t place[kCorners];                // of the pixel in x, in bytes; -1: outside the image
  int64_t target[kCorners];               // of the pixel in grad_x; -1: gets nothing
  typename Lanes::Real weight[kCorners];  // with the mask

  CornersOf() = default;
  // Past the last position all are outside.
  DCN_INLINE CornersOf(const Arguments& a, int64_t number, int64_t tap, int64_t offset_group) {
    for (int corner = 0; corner < kCorners; ++corner) place[corner] = target[corner] = -1;
    if (number >= end_of(a)) return;
    const Position<NDim> position(a.geometry, number);
    AxisSample<Lanes> axes[NDim];
    locate<Lanes, P>(a, position, tap, offset_group, axes);
    const bool nan = any_nan<Lanes, NDim>(axes);
    const auto mask = mask_of<Lanes, P>(a, position, tap, offset_group);
#pragma unroll
    for (int corner = 0; corner < kCorners; ++corner) {
      bool used;
      weight[corner] = masked_weight<Lanes, NDim>(axes, corner, mask, used);
      if (nan || !corner_inside<Lanes, NDim>(axes, corner)) continue;
      place[corner] = corner_place<Lanes>(axes, corner, position.image, a.x);
      if (used) target[corner] = corner_place<Lanes>(axes, corner, position.image, a.grad_x);
    }
  }
};

// Stores grad_offset and grad_mask of one sample, as far as they are wanted, from the dots of its corners.
template <class Lanes, class P, int NDim>
DCN_INLINE void store_position_gradients(const Arguments& a, int64_t number, int64_t tap,
                                         int64_t offset_group,
                                         const typename Lanes::Real (&dots)[1 << NDim]) {
  const Position<NDim> position(a.geometry, number);
  AxisSample<Lanes> axes[NDim];
  locate<Lanes, P>(a, position, tap, offset_group, axes);
  const auto gradients =
      position_gradients<Lanes, NDim>(axes, mask_of<Lanes, P>(a, position, tap, offset_group), dots);
  const int64_t plane = offset_group * taps_of(a.geometry) + tap;
  if (a.grad_mask.data) store(position.template in<P>(a.grad_mask, plane), gradients.mask);
  if (a.grad_offset.data)
#pragma unroll
    for (int axis = 0; axis < NDim; ++axis)
      store(position.template in<P>(a.grad_offset, plane * NDim + axis), gradients.offset[axis]);
}

}  // namespace dcn
