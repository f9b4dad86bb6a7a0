// Locate: where every tap of a tile of positions samples, vectorised along positions.
//
// What follows is vectorised along channels (columns.hpp). Between them stands Samples: for each position the place and the
// weight of every corner. A corner that must not be read has the place of a row of zeros, so that the loops over channels
// have no branches.
#pragma once

#include "arrays.hpp"
#include "halves.hpp"
#include "integers.hpp"
#include "sampling.hpp"
#include "vector.hpp"

namespace dcn::DCN_ISA {

constexpr int kTilePositions = 144;  // the most positions in one tile
constexpr int kScatterPositions =
    96;  // the same where grad_x is scattered: its tables take more of the nearest cache
constexpr int kGatherPositions = 64;  // the same for the columns of grad_weight: divides a piece of the sum

template <int NDim>
constexpr int kCorners = 1 << NDim;

constexpr int kMostLanes =
    NarrowLanes::count > WideLanes<float>::count ? NarrowLanes::count : WideLanes<float>::count;
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

// The offsets and masks of one image and one offset group.
template <class T, int NDim>
struct Displacement {
  Planes offset, mask;
  Storage storage;
  int64_t taps_ahead;  // those of this group and of all after it

  Displacement(Planes offset, Planes mask, Storage storage, int64_t taps, int64_t image, int64_t group,
               int64_t groups)
      : offset(offset), mask(mask), storage(storage), taps_ahead((groups - group) * taps) {
    if (offset.data) this->offset.data += image * offset.batch + group * taps * NDim * offset.channel;
    if (mask.data) this->mask.data += image * mask.batch + group * taps * mask.channel;
  }

  static DCN_INLINE char* at(const Planes& planes, int64_t channel, int64_t position) {
    return planes.data + channel * planes.channel + position * planes.position;
  }
  // Asks for a tap's numbers, to be written soon; past the last tap of all groups it does nothing.
  DCN_INLINE void expect_writes(int64_t tap, int64_t position, int64_t count) const {
    if (tap >= taps_ahead) return;
    for (int axis = 0; axis < NDim; ++axis) expect_writes(offset, tap * NDim + axis, position, count);
    expect_writes(mask, tap, position, count);
  }
  template <class L>
  void write_offsets(int64_t tap, int axis, int64_t position, int64_t count, typename L::Real values) const {
    write<L>(offset, tap * NDim + axis, position, count, values);
  }
  template <class L>
  void write_masks(int64_t tap, int64_t position, int64_t count, typename L::Real values) const {
    write<L>(mask, tap, position, count, values);
  }

 private:
  static DCN_INLINE void expect_writes(const Planes& planes, int64_t channel, int64_t position,
                                       int64_t count) {
    if (planes.data && planes.position <= static_cast<int64_t>(sizeof(T)))
      prefetch_lines<true>(at(planes, channel, position), count * planes.position);
  }
  template <class L>
  DCN_INLINE void write(const Planes& planes, int64_t channel, int64_t position, int64_t count,
                        typename L::Real values) const {
    if (!planes.data) return;
    char* to = at(planes, channel, position);
    if constexpr (sizeof(T) == sizeof(float)) {
      if (storage != Storage::kSame) {
        T all[L::count];
        store(all, values);
        return narrow_some(storage, all, count < L::count ? count : L::count, to, planes.position);
      }
    }
    if (planes.position == sizeof(T) && count >= L::count) return store(reinterpret_cast<T*>(to), values);
    for (int64_t i = 0; i < count && i < L::count; ++i)
      *reinterpret_cast<T*>(to + i * planes.position) = values[i];
  }
};

// What is read where there are no offsets, or no mask.
template <class T>
constexpr T kNone[16] = {};
template <class T>
constexpr T kOnes[16] = {1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1};
static_assert(kMostLanes <= 16);

// The offsets, axis by axis, and the mask of one tap, from one position on. Meant for a variable of the loop that reads
// them: what is stored there cannot be what it holds, which a compiler must take of what it was given.
template <class T, int NDim>
class TapNumbers {
 public:
  DCN_INLINE TapNumbers(const Displacement<T, NDim>& moved, int64_t tap, int64_t position) {
    for (int i = 0; i <= NDim; ++i) {
      const bool is_mask = i == NDim;
      const Planes& planes = is_mask ? moved.mask : moved.offset;
      const int64_t channel = is_mask ? tap : tap * NDim + i, ahead = is_mask ? 1 : NDim;
      step_[i] = planes.data ? planes.position : 0;
      from_[i] = planes.data ? moved.at(planes, channel, position)
                             : reinterpret_cast<const char*>(is_mask ? kOnes<T> : kNone<T>);
      storage_[i] = planes.data ? moved.storage : Storage::kSame;
      // After the last tap of the group comes the next group's first. The planes of different taps lie far apart, too
      // many streams for the processor to foresee.
      const bool foreseen =
          planes.data && planes.position <= static_cast<int64_t>(sizeof(T)) && tap + 1 < moved.taps_ahead;
      next_[i] = foreseen ? from_[i] + ahead * planes.channel : from_[i];
      whole_ = whole_ && (!planes.data || (planes.position == sizeof(T) && moved.storage == Storage::kSame));
    }
  }
  // Numbers of L::count positions from the p-th on, of which the first `count` exist.
  template <class L>
  DCN_INLINE typename L::Real offsets(int axis, int64_t p, int64_t count) const {
    return read<L>(axis, p, count);
  }
  template <class L>
  DCN_INLINE typename L::Real masks(int64_t p, int64_t count) const {
    return read<L>(NDim, p, count);
  }
  // Asks for the same of the next tap: a few lines at a time, for a processor waits once it has asked for more than it
  // can keep track of.
  DCN_INLINE void expect_next(int64_t p) const {
#pragma GCC unroll 4
    for (int i = 0; i <= NDim; ++i) __builtin_prefetch(next_[i] + p * step_[i]);
  }

 private:
  template <class L>
  DCN_INLINE typename L::Real read(int i, int64_t p, int64_t count) const {
    const char* from = from_[i] + p * step_[i];
    if (whole_ && count >= L::count) return load<typename L::Real>(reinterpret_cast<const T*>(from));
    T values[L::count] = {};
    read_some(storage_[i], from, step_[i], count < L::count ? count : L::count, values);
    return load<typename L::Real>(values);
  }
  [[gnu::noinline]] static void read_some(Storage storage, const char* from, int64_t step, int64_t count,
                                          T* values) {
    if constexpr (sizeof(T) == sizeof(float)) {
      if (storage != Storage::kSame) return widen_some(storage, from, step, count, values);
    }
    for (int64_t i = 0; i < count; ++i) values[i] = *reinterpret_cast<const T*>(from + i * step);
  }

  const char *from_[NDim + 1], *next_[NDim + 1];
  int64_t step_[NDim + 1];  // bytes from position to position
  Storage storage_[NDim + 1];
  bool whole_ = true;  // vectors of them lie in memory
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

// Calls body(lanes) with the lanes to locate with.
template <class T, class Body>
DCN_INLINE auto with_lanes(bool narrow, const Body& body) {
  if constexpr (sizeof(T) == sizeof(float)) {
    if (narrow) return body(NarrowLanes{});
  }
  return body(WideLanes<T>{});
}

// Calls body(distance) with a number of the type of distances.
template <class T, class Body>
DCN_INLINE auto with_distance(bool near, const Body& body) {
  if constexpr (sizeof(T) == sizeof(float)) {
    if (near) return body(int32_t{});
  }
  return body(int64_t{});
}

// Calls body(lanes, distance) with both; distances of 32 bits come from narrow lanes only.
template <class T, class Body>
DCN_INLINE auto with_lanes_and_distance(bool narrow, bool near, const Body& body) {
  return with_lanes<T>(narrow, [&](auto lanes) {
    if constexpr (decltype(lanes)::kNarrow) {
      if (near) return body(lanes, int32_t{});
    }
    return body(lanes, int64_t{});
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
