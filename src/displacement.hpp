// The offsets and masks of a tap: read some positions at a time, whatever they are stored as, written, and asked for ahead.
#pragma once

#include "arrays.hpp"
#include "halves.hpp"
#include "vector.hpp"

namespace dcn::DCN_ISA {

constexpr int kMostLanes =
    NarrowLanes::count > WideLanes<float>::count ? NarrowLanes::count : WideLanes<float>::count;

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

}  // namespace dcn::DCN_ISA
