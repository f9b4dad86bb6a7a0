// Locate: where every tap of a tile of positions samples, vectorised along positions.
//
// What follows is vectorised along channels (columns.hpp). Between them stands Samples: for each position the place and the
// weight of every corner. A corner that must not be read has the place of a row of zeros, so that the loops over channels
// have no branches.
#pragma once

#include "displacement.hpp"
#include "integers.hpp"

namespace dcn::DCN_ISA {

constexpr int kTilePositions = 144;  // the most positions in one tile
constexpr int kScatterPositions =
    96;  // the same where grad_x is scattered: its tables take more of the nearest cache
constexpr int kGatherPositions = 64;  // the same for the columns of grad_weight: divides a piece of the sum

template <int NDim>
constexpr int kCorners = 1 << NDim;

static_assert(kTilePositions % kMostLanes == 0);

// A run of positions of one image, in the flat order of the output.
template <int NDim>
struct Tile {
  int64_t first, count;
  int64_t origin[NDim][kTilePositions];  // position * stride - padding, in pixels

  Tile(const Geometry& geometry, int64_t first, int64_t count) : first(first), count(count) {
    int64_t at[NDim];
    for (int64_t axis = NDim - 1, rest = first; axis >= 0; --axis) {
      at[axis] = rest % geometry.output[axis];
      rest /= geometry.output[axis];
    }
    for (int64_t p = 0; p < count; ++p) {
      for (int axis = 0; axis < NDim; ++axis)
        origin[axis][p] = at[axis] * geometry.stride[axis] - geometry.padding[axis];
      for (int axis = NDim - 1; axis >= 0 && ++at[axis] == geometry.output[axis] && axis > 0; --axis)
        at[axis] = 0;
    }
    // A vector of positions may reach past the last: as if that were there once more.
    for (int64_t p = count; p < kTilePositions && p % kMostLanes; ++p)
      for (int axis = 0; axis < NDim; ++axis) origin[axis][p] = origin[axis][count - 1];
  }
};

template <int NDim>
struct Tap {
  int64_t index;
  int64_t reach[NDim];  // index * dilation along each axis

  Tap(const Geometry& geometry, int64_t index) : index(index) {
    for (int axis = NDim - 1; axis >= 0; --axis) {
      reach[axis] = index % geometry.kernel[axis] * geometry.dilation[axis];
      index /= geometry.kernel[axis];
    }
  }
};

// Pixels of some channels of one image: where a pixel's first channel lies; its channels follow without a
// gap.
template <int NDim>
struct Pixels {
  char* data;
  int64_t axis[NDim];

  DCN_INLINE int64_t distance_to(const void* address) const {
    return reinterpret_cast<int64_t>(address) - reinterpret_cast<int64_t>(data);
  }
  bool is_near(const void* address) const {
    const int64_t distance = distance_to(address);
    return distance >= INT32_MIN && distance <= INT32_MAX;
  }
};

// Where the pixel of each corner lies, in bytes from where Pixels begin. In 32 bits where they do: that is half as much to
// store, and no vector is widened.
template <int NDim>
struct Distances {
  union {
    int32_t narrow[kCorners<NDim>][kTilePositions];
    int64_t wide[kCorners<NDim>][kTilePositions];
  };

  template <class Distance>
  DCN_INLINE Distance* of(int corner) {
    return const_cast<Distance*>(static_cast<const Distances*>(this)->of<Distance>(corner));
  }
  template <class Distance>
  DCN_INLINE const Distance* of(int corner) const {
    if constexpr (sizeof(Distance) == sizeof(int32_t))
      return narrow[corner];
    else
      return wide[corner];
  }
};

// What gather() reads, corner by corner. Whole cache lines first, here and below.
template <class T, int NDim>
struct Samples {
  Distances<NDim> read;
  T weight[kCorners<NDim>][kTilePositions];
  const char* x;
  bool near;  // distances have 32 bits
};

// The axes of L::count positions of a tile, from `p` on.
template <class L, class T, int NDim>
DCN_INLINE void locate(const Geometry& geometry, const Tile<NDim>& tile, const Tap<NDim>& tap,
                       const TapNumbers<T, NDim>& numbers, int64_t p, AxisSample<L> (&axes)[NDim]) {
#pragma GCC unroll 8
  for (int axis = 0; axis < NDim; ++axis) {
    const auto origin = load<Vec<int64_t, L::count>>(&tile.origin[axis][p]);
    const auto base = convert<typename L::Index>(origin) + L::index(tap.reach[axis]);
    const auto offset = numbers.template offsets<L>(axis, p, tile.count - p);
    axes[axis] = locate_axis<L>(offset, base, geometry.input[axis]);
  }
  numbers.expect_next(p);
}

// The pixels of the corners of cells, and what stands in for a pixel that must not be touched. Holds copies, for a
// compiler must take it that distances which are stored may be what it was given.
template <class L, int NDim>
struct CornerPixels {
  using Index = typename L::Index;
  Index cell = {};  // distance of the first corner
  Pixels<NDim> pixels;
  int64_t nothing;  // its distance

  DCN_INLINE CornerPixels(const AxisSample<L> (&axes)[NDim], const Pixels<NDim>& pixels, const void* nothing)
      : pixels(pixels), nothing(pixels.distance_to(nothing)) {
    for (int axis = 0; axis < NDim; ++axis) cell += axes[axis].cell * L::index(pixels.axis[axis]);
  }
  // Writes where a corner's pixel lies; where it is not `usable`, where `nothing` does.
  template <class Distance>
  DCN_INLINE void store_distances(int corner, typename L::Mask usable, Distance* to) const {
    int64_t from_cell = 0;
    for (int axis = 0; axis < NDim; ++axis)
      if (corner_bit<NDim>(corner, axis)) from_cell += pixels.axis[axis];
    const Index distance = cell + L::index(from_cell);
    if constexpr (sizeof distance == L::count * sizeof(Distance))
      store(to, L::select(usable, distance, L::index(nothing)));
    else
      store_widened<L::count>(distance, usable, nothing, to);
  }
};

// Whether 32-bit indices hold every position on the rigid grid and, with `pixels`, reach every pixel.
template <int NDim>
bool fits_narrow_lanes(const Geometry& geometry, const Pixels<NDim>& pixels = {}) {
  constexpr double kMost = 536870912.0;  // 2^29
  double span = 0;
  for (int axis = 0; axis < NDim; ++axis) {
    const double base =
        static_cast<double>(geometry.output[axis]) * static_cast<double>(geometry.stride[axis]) +
        static_cast<double>(geometry.kernel[axis]) * static_cast<double>(geometry.dilation[axis]) +
        static_cast<double>(geometry.padding[axis]);
    const double step = static_cast<double>(pixels.axis[axis]);
    span += (static_cast<double>(geometry.input[axis]) + 2) * (step < 0 ? -step : step);
    if (base >= kMost || static_cast<double>(geometry.input[axis]) >= kMost) return false;
  }
  return span < 2 * kMost;
}

template <class T>
constexpr bool kHasNarrowLanes = sizeof(T) == sizeof(float);

// Calls body(lanes) with the lanes to locate with.
template <class T, class Body>
DCN_INLINE auto with_lanes(bool narrow, const Body& body) {
  if constexpr (kHasNarrowLanes<T>) {
    if (narrow) return body(NarrowLanes{});
  }
  return body(WideLanes<T>{});
}

// Calls body(distance) with a number of the type of distances.
template <bool kMayBeNear, class Body>
DCN_INLINE auto with_distance(bool near, const Body& body) {
  if constexpr (kMayBeNear) {
    if (near) return body(int32_t{});
  }
  return body(int64_t{});
}

// Calls body(lanes, distance) with both; distances of 32 bits come from narrow lanes only.
template <class T, class Body>
DCN_INLINE auto with_lanes_and_distance(bool narrow, bool near, const Body& body) {
  return with_lanes<T>(narrow, [&](auto lanes) {
    return with_distance<decltype(lanes)::kNarrow>(near,
                                                   [&](auto distance) { return body(lanes, distance); });
  });
}

// Pixels whose first coordinate is in [begin, end); none where that is empty.
struct Slab {
  int64_t begin, end;

  bool empty() const { return begin >= end; }
  bool contains(const Slab& other) const { return begin <= other.begin && other.end <= end; }
  // Both, or where a gap lies between them the other one alone.
  Slab joined(const Slab& other) const {
    if (other.begin > end || begin > other.end) return other;
    return {begin < other.begin ? begin : other.begin, end > other.end ? end : other.end};
  }
};

// The slab that cells meet.
template <class L>
struct SlabFinder {
  int64_t extent;
  typename L::Index low, high;  // of the cells

  DCN_INLINE explicit SlabFinder(int64_t extent)
      : extent(extent), low(L::index(extent)), high(L::index(-2)) {}
  DCN_INLINE void add(const AxisSample<L>& axis) {
    const auto first = L::select(axis.supported, axis.cell, L::index(extent)),
               last = L::select(axis.supported, axis.cell, L::index(-2));
    low = first < low ? first : low;
    high = last > high ? last : high;
  }
  Slab found() const {
    Slab slab = {low[0], high[0]};
    for (int i = 1; i < L::count; ++i) {
      if (low[i] < slab.begin) slab.begin = low[i];
      if (high[i] > slab.end) slab.end = high[i];
    }
    return {slab.begin > 0 ? slab.begin : 0, slab.end + 2 < extent ? slab.end + 2 : extent};
  }
};

// Corners to be read with their weights, for every position of the tile: all that a sample's value needs. Returns what
// of the image they lie in.
template <class T, int NDim>
Slab locate_values(const Geometry& geometry, const Tile<NDim>& tile, const Tap<NDim>& tap,
                   const Displacement<T, NDim>& moved, const Pixels<NDim>& pixels, const void* zeros,
                   Samples<T, NDim>& samples) {
  const bool narrow = fits_narrow_lanes(geometry, pixels);
  samples.near = narrow && pixels.is_near(zeros);
  samples.x = pixels.data;
  return with_lanes_and_distance<T>(narrow, samples.near, [&](auto lanes, auto distance) {
    using L = decltype(lanes);
    using Distance = decltype(distance);
    const TapNumbers<T, NDim> numbers(moved, tap.index, tile.first);
    SlabFinder<L> slab(geometry.input[0]);
    for (int64_t p = 0; p < tile.count; p += L::count) {
      AxisSample<L> axes[NDim];
      locate<L>(geometry, tile, tap, numbers, p, axes);
      slab.add(axes[0]);
      const auto mask = numbers.template masks<L>(p, tile.count - p);
      const CornerPixels<L, NDim> corners(axes, pixels, zeros);
#pragma GCC unroll 8
      for (int corner = 0; corner < kCorners<NDim>; ++corner) {
        typename L::Mask used;
        store(&samples.weight[corner][p], masked_weight<L, NDim>(axes, corner, mask, used));
        corners.store_distances(corner, used, samples.read.template of<Distance>(corner) + p);
      }
    }
    return slab.found();
  });
}

// What the backward pass needs of a corner: the pixel to read for its dot product, which is the real pixel of
// every corner inside the image also where its weight is 0 (the derivative sees it), and the pixel of grad_x
// that receives weight x grad_columns, which a corner of weight 0 never does: it then goes to a row nobody
// reads.
template <class T, int NDim>
struct BackwardSamples {
  Distances<NDim> read, scatter;
  T weight[kCorners<NDim>][kTilePositions];
  const char* x;
  char* grad_x;
  bool near;  // distances have 32 bits
};

template <class T, int NDim>
void locate_corners(const Geometry& geometry, const Tile<NDim>& tile, const Tap<NDim>& tap,
                    const Displacement<T, NDim>& moved, const Pixels<NDim>& x, const void* zeros,
                    const Pixels<NDim>& grad_x, const void* nowhere, BackwardSamples<T, NDim>& samples) {
  const bool narrow = fits_narrow_lanes(geometry, x) && fits_narrow_lanes(geometry, grad_x);
  samples.near = narrow && x.is_near(zeros) && grad_x.is_near(nowhere);
  samples.x = x.data;
  samples.grad_x = grad_x.data;
  with_lanes_and_distance<T>(narrow, samples.near, [&](auto lanes, auto distance) {
    using L = decltype(lanes);
    using Distance = decltype(distance);
    const TapNumbers<T, NDim> numbers(moved, tap.index, tile.first);
    for (int64_t p = 0; p < tile.count; p += L::count) {
      AxisSample<L> axes[NDim];
      locate<L>(geometry, tile, tap, numbers, p, axes);
      const auto mask = numbers.template masks<L>(p, tile.count - p);
      const CornerPixels<L, NDim> of_x(axes, x, zeros), of_grad_x(axes, grad_x, nowhere);
#pragma GCC unroll 8
      for (int corner = 0; corner < kCorners<NDim>; ++corner) {
        typename L::Mask used;
        store(&samples.weight[corner][p], masked_weight<L, NDim>(axes, corner, mask, used));
        const auto readable = corner_inside<L, NDim>(axes, corner);
        of_x.store_distances(corner, readable, samples.read.template of<Distance>(corner) + p);
        of_grad_x.store_distances(corner, used, samples.scatter.template of<Distance>(corner) + p);
      }
    }
  });
}

}  // namespace dcn::DCN_ISA
