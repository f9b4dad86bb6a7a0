// Gather and scatter: the samples of the taps that were located, channels-last, and their gradients.
#pragma once

#include "locate.hpp"

namespace dcn::DCN_ISA {

// Calls body(Lanes, channel, sample) for every vector of channels of a position.
template <class Distance, class T, int NDim, class Body>
DCN_INLINE void gather_position(const Samples<T, NDim>& samples, int64_t p, int64_t channels,
                                const Body& body) {
  constexpr int n = kCorners<NDim>;
  const T* corner[n];
  T weight[n];
#pragma GCC unroll 8
  for (int j = 0; j < n; ++j) {
    corner[j] = reinterpret_cast<const T*>(samples.x + samples.read.template of<Distance>(j)[p]);
    weight[j] = samples.weight[j][p];
  }
  for_each_vector<T>(channels, [&](auto lanes, int64_t c) {
    using V = Vec<T, decltype(lanes)::count>;
    V sample = load<V>(corner[0] + c) * broadcast<V>(weight[0]);
#pragma GCC unroll 8
    for (int j = 1; j < n; ++j) sample += load<V>(corner[j] + c) * broadcast<V>(weight[j]);
    body(lanes, c, sample);
  });
}

// Calls body(Lanes, position, channel, sample) for every vector of channels of every position of the tile.
template <class T, int NDim, class Body>
DCN_INLINE void gather(const Samples<T, NDim>& samples, int64_t positions, int64_t channels,
                       const Body& body) {
  with_distance<kHasNarrowLanes<T>>(samples.near, [&](auto distance) __attribute__((always_inline)) {
    for (int64_t p = 0; p < positions; ++p)
      gather_position<decltype(distance)>(
          samples, p, channels, [&](auto lanes, int64_t c, auto sample) { body(lanes, p, c, sample); });
  });
}

// The most channels that the backward pass takes at once. What it finds about positions serves a whole block, whatever
// the vectors.
template <class T>
constexpr int64_t kBlockChannels = 128 / sizeof(T);

// Calls body(channels), with a constant for the counts that matter most: it is then compiled without loops
// and tails.
template <class T, class Body>
DCN_INLINE void with_channels(int64_t channels, const Body& body) {
  constexpr int64_t kBlock = kBlockChannels<T>, kPanel = 2 * kLanes<T>;
  if (channels == kBlock) return body(kBlock);
  if (channels == kPanel) return body(kPanel);
  if (channels == 4) return body(int64_t{4});
  body(channels);
}

// The columns of one tap; place(position, channel) is where a vector of them goes.
template <class T, int NDim, class Place>
void gather_columns(const Samples<T, NDim>& samples, int64_t positions, int64_t channels, Place place) {
  with_channels<T>(channels, [&](int64_t channels) __attribute__((always_inline)) {
    gather<T, NDim>(samples, positions, channels,
                    [&](auto, int64_t p, int64_t c, auto sample) { store(place(p, c), sample); });
  });
}

// The columns of some taps, position by position: the taps of a position sample near to each other, and what one of them
// brought into the nearest cache serves the next. To [position][tap][channel].
template <class T, int NDim>
void gather_taps(const Samples<T, NDim>* samples, int64_t taps, int64_t positions, int64_t channels, T* to,
                 int64_t position_stride, int64_t tap_stride) {
  with_channels<T>(channels, [&](int64_t channels) __attribute__((always_inline)) {
    with_distance<kHasNarrowLanes<T>>(samples[0].near, [&](auto distance) __attribute__((always_inline)) {
      for (int64_t p = 0; p < positions; ++p)
        for (int64_t tap = 0; tap < taps; ++tap) {
          T* column = to + p * position_stride + tap * tap_stride;
          gather_position<decltype(distance)>(
              samples[tap], p, channels, [&](auto, int64_t c, auto sample) { store(column + c, sample); });
        }
    });
  });
}

// For every position: dots[corner] = <grad_columns, corner of x> and grad_x[corner] += weight * grad_columns,
// in one pass over the channels. gradient(Lanes, position, channel) is a vector of grad_columns.
template <class Distance, bool kDots, bool kScatter, class T, int NDim, class Gradient>
DCN_INLINE void scatter_and_dot(const BackwardSamples<T, NDim>& samples, int64_t positions, int64_t channels,
                                const Gradient& gradient, T* dots) {
  constexpr int n = kCorners<NDim>, whole = kLanes<T>;
  for (int64_t p = 0; p < positions; ++p) {
    const T* read[n];
    T* scatter[n];
    T weight[n];
#pragma GCC unroll 8
    for (int j = 0; j < n; ++j) {
      read[j] = reinterpret_cast<const T*>(samples.x + samples.read.template of<Distance>(j)[p]);
      scatter[j] = reinterpret_cast<T*>(samples.grad_x + samples.scatter.template of<Distance>(j)[p]);
      weight[j] = samples.weight[j][p];
    }
    const auto step = [&](auto lanes, int64_t c, auto(&products)[n]) {
      using V = Vec<T, decltype(lanes)::count>;
      const V g = gradient(lanes, p, c);
#pragma GCC unroll 8
      for (int j = 0; j < n; ++j) {
        if constexpr (kDots) products[j] += load<V>(read[j] + c) * g;
        if constexpr (kScatter) store(scatter[j] + c, load<V>(scatter[j] + c) + g * broadcast<V>(weight[j]));
      }
    };
    Vec<T, n> total = {};
    int64_t done = 0;
    if (channels >= whole) {
      Vec<T, whole> products[n] = {};
      for (; done + whole <= channels; done += whole) step(Lanes<whole>{}, done, products);
      if constexpr (kDots) total = sums<T, whole, n>(products);
    }
    for_each_vector<T, (whole > 1 ? whole / 2 : 1)>(channels - done, [&](auto lanes, int64_t c) {
      constexpr int some = decltype(lanes)::count;
      Vec<T, some> products[n] = {};
      step(lanes, done + c, products);
      if constexpr (kDots) total += sums<T, some, n>(products);
    });
    if constexpr (kDots) store(dots + p * n, total);
  }
}

}  // namespace dcn::DCN_ISA
