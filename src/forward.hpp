// The forward pass: tiles of positions go through locate, gather and contract while they are in cache.
//
// A tile also sees to the channels-last copies of what it samples, unless a tile before it did: they are then read while
// they are in cache too. Small images are copied before, not to let threads wait for each other.
#pragma once

#include "forward_plan.hpp"

namespace dcn::DCN_ISA {

// weight (out, in, tap) -> [group][panel][term][lane]: one panel of one group.
template <class T, int NDim>
void pack_weights(const ForwardPlan<T, NDim>& plan, const T* weight, int64_t group, int64_t panel,
                  T* packed) {
  const int64_t width = plan.panels.width(panel), first = plan.panels.first(panel);
  const int64_t columns = least(width, plan.group_outputs - first);
  const T* from = weight + (group * plan.group_outputs + first) * plan.terms;
  // Each row is a stream, and only of a long run does the processor foresee what comes.
  constexpr int64_t kRun = 256;
  T block[kRun * 2 * kLanes<T>];
  for (int64_t start = 0, input = 0, tap = 0; start < plan.terms; start += kRun) {
    const int64_t run = least(kRun, plan.terms - start);
    transpose_matrix<T>(columns, run, from + start, plan.terms, block, width);
    for (int64_t i = 0; i < run; ++i) {
      T* to = packed + plan.term(tap, input, plan.group_inputs) * width;
      for (int64_t lane = columns; lane < width; ++lane) block[i * width + lane] = 0;
      with_channels<T>(width, [&](int64_t width) __attribute__((always_inline)) {
        for_each_vector<T>(width, [&](auto lanes, int64_t lane) {
          using V = Vec<T, decltype(lanes)::count>;
          store(to + lane, load<V>(block + i * width + lane));
        });
      });
      if (++tap == plan.taps) tap = 0, ++input;
    }
  }
}

// All weights, in items. Per channel: [tap][channel].
template <class T, int NDim>
struct Packing {
  const ForwardPlan<T, NDim>& plan;
  const T* weight;
  T* packed;

  int64_t items() const { return plan.depthwise ? 1 : plan.geometry.groups * plan.panels.count(); }
  void pack(int64_t item) const {
    const int64_t panels = plan.panels.count(), group = item / panels, panel = item % panels;
    if (plan.depthwise)
      transpose_matrix<T>(plan.geometry.in_channels, plan.taps, weight, plan.taps, packed,
                          plan.geometry.in_channels);
    else
      pack_weights(plan, weight, group, panel, plan.packed(packed, group, panel));
  }
};

template <class T, int NDim>
class ForwardRun {
 public:
  ForwardRun(const ForwardArguments& arguments, const ForwardPlan<T, NDim>& plan,
             const ForwardBuffers<T, NDim>& buffers, Team& team)
      : arguments_(arguments), plan_(plan), buffers_(buffers), team_(team) {}

  bool run() {
    for (int64_t first = 0; first < geometry().batch; first += plan_.round_images) {
      const int64_t images = least(plan_.round_images, geometry().batch - first);
      if (!prepare(first, images) || !tiles(first, images)) return false;
    }
    return true;
  }

 private:
  using Thread = typename ForwardBuffers<T, NDim>::PerThread;
  const Geometry& geometry() const { return plan_.geometry; }
  T* image_buffer(int64_t slot) const { return buffers_.x + slot * plan_.x.buffer_elements(); }

  // What a round needs before its tiles: the packed weights, if they are not there, and copies.
  bool prepare(int64_t first, int64_t images) {
    const Packing<T, NDim> packing = {plan_, static_cast<const T*>(arguments_.weight), buffers_.weights};
    const int64_t packs = first > 0 || plan_.prepared ? 0 : packing.items(), copies = plan_.copies;
    const bool later = plan_.copied_by_tiles();
    if (later) __builtin_memset(buffers_.copied, 0, copies * images);
    return team_.run(packs + (later ? 0 : copies * images), [&](int64_t item, int) {
      if (item < packs) return packing.pack(item);
      item -= packs;
      copy(first + item / copies, item / copies, item % copies);
    });
  }

  void copy(int64_t image, int64_t slot, int64_t item) {
    const int64_t channels = plan_.offset_group_channels;
    for (int64_t group = 0; group < geometry().offset_groups; ++group)
      plan_.x.copy_in(image, item, image_buffer(slot), group * channels, channels);
  }

  // Sees to the copies of a slab of an image. False: interrupted.
  DCN_INLINE bool provide(int64_t image, int64_t slot, Slab slab, int thread) {
    Thread& mine = buffers_.thread[thread];
    if (!plan_.copied_by_tiles() || slab.empty()) return true;
    if (mine.image != image) mine.image = image, mine.provided = {slab.begin, slab.begin};
    if (mine.provided.contains(slab)) return true;
    if (!copy_slab(image, slot, slab, thread)) return false;
    mine.provided = mine.provided.joined(slab);
    return true;
  }
  __attribute__((noinline)) bool copy_slab(int64_t image, int64_t slot, Slab slab, int thread) {
    const int64_t pixels = plan_.x.pixels / geometry().input[0];
    const int64_t begin = plan_.x.copy_item(slab.begin * pixels);
    const int64_t end = plan_.x.copy_item(slab.end * pixels - 1) + 1;
    unsigned char* marks = buffers_.copied + slot * plan_.copies;
    for (int64_t item = begin; item < end; ++item) {
      if (!Team::claim(marks[item])) continue;
      copy(image, slot, item);
      Team::finish(marks[item]);
      if (!team_.keep_going(thread)) return false;
    }
    for (int64_t item = begin; item < end; ++item) Team::wait_for(marks[item]);
    return true;
  }

  bool tiles(int64_t first, int64_t images) {
    return team_.run(plan_.tiles * images, [&](int64_t item, int thread) {
      const int64_t slot = item / plan_.tiles, image = first + slot;
      const Tile<NDim> tile = plan_.tile(item % plan_.tiles, plan_.tile_positions);
      const bool finished =
          plan_.depthwise ? sum_per_channel(image, slot, tile, thread) : multiply(image, slot, tile, thread);
      if (finished) write(image, tile, buffers_.thread[thread].sums);
    });
  }

  // Locates taps [begin, end) of every offset group, some at a time, and hands their samples to body(first tap, taps,
  // first channel, channels). The taps of a group find the same pixels in the cache, so they follow each other. False:
  // interrupted.
  template <class Body>
  bool for_each_run_of_taps(int64_t image, int64_t slot, const Tile<NDim>& tile, int64_t begin, int64_t end,
                            int thread, const Body& body) {
    Samples<T, NDim>* samples = buffers_.thread[thread].samples;
    const int64_t channels = plan_.offset_group_channels;
    for (int64_t group = 0; group < geometry().offset_groups; ++group) {
      const Displacement<T, NDim> moved(arguments_.offset, arguments_.mask, arguments_.positions, plan_.taps,
                                        image, group, geometry().offset_groups);
      const Pixels<NDim> pixels = plan_.x.view(image, image_buffer(slot), group * channels, channels);
      for (int64_t first = begin; first < end; first += plan_.taps_at_once) {
        const int64_t taps = least(plan_.taps_at_once, end - first);
        for (int64_t i = 0; i < taps; ++i) {
          const Slab slab = locate_values(geometry(), tile, Tap<NDim>(geometry(), first + i), moved, pixels,
                                          buffers_.zeros, samples[i]);
          if (!provide(image, slot, slab, thread)) return false;
        }
        body(first, taps, group * channels, channels);
      }
    }
    return true;
  }

  bool multiply(int64_t image, int64_t slot, const Tile<NDim>& tile, int thread) {
    Thread& mine = buffers_.thread[thread];
    if (plan_.terms == 0) __builtin_memset(mine.sums, 0, plan_.sums_stride * tile.count * sizeof(T));
    for (int64_t first = 0; first < plan_.taps; first += plan_.chunk_taps) {
      const int64_t end = least(first + plan_.chunk_taps, plan_.taps);
      const bool gathered =
          for_each_run_of_taps(image, slot, tile, first, end, thread,
                               [&](int64_t tap, int64_t taps, int64_t channel, int64_t channels) {
                                 const int64_t inputs = geometry().in_channels;
                                 gather_taps<T, NDim>(mine.samples, taps, tile.count, channels,
                                                      mine.columns + plan_.term(tap - first, channel, inputs),
                                                      plan_.columns_stride, plan_.tap_stride(inputs));
                               });
      if (!gathered) return false;
      for (int64_t group = 0; group < geometry().groups; ++group)
        for (int64_t panel = 0; panel < plan_.panels.count(); ++panel) {
          if (!team_.keep_going(thread)) return false;
          if (end == plan_.taps) expect_output(image, tile, group, panel);
          multiply_chunk(tile.count, group, panel, first, end - first, mine);
        }
    }
    return true;
  }

  const T* weights_of(int64_t group, int64_t panel, int64_t tap) const {
    return plan_.packed(buffers_.weights, group, panel) +
           tap * plan_.group_inputs * plan_.panels.width(panel);
  }

  // Those that are multiplied after the ones of a group, panel and run of taps; null where they are near anyway.
  const T* weights_after(int64_t group, int64_t panel, int64_t first_tap, int64_t taps) const {
    if (!plan_.weights_are_far()) return nullptr;
    if (panel + 1 < plan_.panels.count()) return weights_of(group, panel + 1, first_tap);
    if (group + 1 < geometry().groups) return weights_of(group + 1, 0, first_tap);
    return weights_of(0, 0, (first_tap + taps) % plan_.taps);
  }

  void multiply_chunk(int64_t positions, int64_t group, int64_t panel, int64_t first_tap, int64_t taps,
                      Thread& mine) {
    const Panels& panels = plan_.panels;
    const int64_t inputs = plan_.group_inputs;
    const T* columns = mine.columns + group * inputs;
    T* sums = mine.sums + group * panels.padded() + panels.first(panel);
    multiply_panel<T>(panels, panel, positions, columns, plan_.columns_stride,
                      Terms{taps, geometry().in_channels, inputs, 1}, plan_.piece,
                      weights_of(group, panel, first_tap), sums, plan_.sums_stride, first_tap == 0,
                      weights_after(group, panel, first_tap, taps));
  }

  // Fetches the lines of the output that write() fills soon. The planes of the channels lie far apart, so without it
  // each line is waited for: a tenth of the time where the output is larger than the caches near to the core.
  DCN_INLINE void expect_output(int64_t image, const Tile<NDim>& tile, int64_t group, int64_t panel) {
    const Planes& output = arguments_.output;
    if (output.position > static_cast<int64_t>(sizeof(T))) return;
    const int64_t first = plan_.panels.first(panel);
    const int64_t columns = least(plan_.panels.width(panel), plan_.group_outputs - first);
    const char* to = output_at(image, group * plan_.group_outputs + first, tile);
    for (int64_t column = 0; column < columns; ++column)
      prefetch_lines<true>(to + column * output.channel, tile.count * output.position);
  }

  char* output_at(int64_t image, int64_t channel, const Tile<NDim>& tile) const {
    const Planes& output = arguments_.output;
    return output.data + image * output.batch + channel * output.channel + tile.first * output.position;
  }

  // Taps past the first piece are summed on the side, and the piece is then added.
  bool sum_per_channel(int64_t image, int64_t slot, const Tile<NDim>& tile, int thread) {
    Thread& mine = buffers_.thread[thread];
    const int64_t stride = plan_.sums_stride;
    return for_each_run_of_taps(
        image, slot, tile, 0, plan_.taps, thread,
        [&](int64_t first, int64_t taps, int64_t channel, int64_t channels) {
          for (int64_t tap = first; tap < first + taps; ++tap) {
            const bool fresh = tap % plan_.piece == 0,
                       last = (tap + 1) % plan_.piece == 0 || tap + 1 == plan_.taps;
            const T* weights = buffers_.weights + tap * geometry().in_channels + channel;
            T* total = mine.sums + channel;
            T* sums = tap < plan_.piece ? total : total + plan_.tile_positions * stride;
            gather<T, NDim>(mine.samples[tap - first], tile.count, channels,
                            [&](auto, int64_t p, int64_t c, auto sample) {
                              using V = decltype(sample);
                              T* sum = sums + p * stride + c;
                              const V product = sample * load<V>(weights + c);
                              const V value = fresh ? product : load<V>(sum) + product;
                              store(sum, value);
                              if (last && sums != total)
                                store(total + p * stride + c, load<V>(total + p * stride + c) + value);
                            });
          }
        });
  }

  void write(int64_t image, const Tile<NDim>& tile, const T* sums) {
    const Planes& output = arguments_.output;
    const int64_t outputs = plan_.group_outputs;
    for (int64_t group = 0; group < (plan_.depthwise ? 1 : geometry().groups); ++group) {
      const int64_t channel = group * outputs;
      const T* bias = static_cast<const T*>(arguments_.bias);
      const StoredMatrix<T> stored = {output_at(image, channel, tile), output.position, output.channel,
                                      arguments_.images};
      stored.copy_from(tile.count, plan_.depthwise ? geometry().out_channels : outputs,
                       {sums + group * plan_.panels.padded(), plan_.sums_stride, 1},
                       bias ? bias + channel : nullptr);
    }
  }

  const ForwardArguments& arguments_;
  const ForwardPlan<T, NDim>& plan_;
  const ForwardBuffers<T, NDim>& buffers_;
  Team& team_;
};

template <class T, int NDim>
Status forward(const ForwardArguments& arguments, Team& team) {
  using Buffers = ForwardBuffers<T, NDim>;
  const PreparedForward* prepared = arguments.prepared;
  const ForwardPlan<T, NDim> plan(arguments, prepared ? prepared->threads : team.threads());
  const auto run = [&](const Buffers& buffers) {
    return ForwardRun<T, NDim>(arguments, plan, buffers, team).run();
  };
  return prepared ? on_block<Buffers>(plan, prepared->space, run) : with_workspace<Buffers>(plan, run);
}

// An x without strides is one that is not used in place: the space is then enough for any.
template <class T, int NDim>
Status prepare_forward(const ForwardArguments& arguments, Team& team, PreparedForward& prepared) {
  ForwardArguments unplaced = arguments;
  unplaced.x = {};
  unplaced.prepared = &prepared;
  const ForwardPlan<T, NDim> plan(unplaced, prepared.threads);
  if (!prepared.weights) {
    prepared.weights = take_block<PackedWeights<T, NDim>>(plan);
    if (!prepared.weights) return Status::kOutOfMemory;
    const Packing<T, NDim> packing = {plan, static_cast<const T*>(arguments.weight),
                                      static_cast<T*>(prepared.weights)};
    if (!team.run(packing.items(), [&](int64_t item, int) { packing.pack(item); }))
      return Status::kInterrupted;
  }
  if (!prepared.space) prepared.space = take_block<ForwardBuffers<T, NDim>>(plan);
  return prepared.space ? Status::kOk : Status::kOutOfMemory;
}

}  // namespace dcn::DCN_ISA
