// The backward pass: the forward's three steps walked back, without atomics.
//
// Input channels are cut into blocks; a block belongs to one thread at a time, so its part of grad_x needs no
// synchronisation and is summed in a fixed order. Per image:
//
//     contract', dots, scatter   per block:   grad_columns = grad_output x weights, tap by tap and tile by tile; the
//                                             dots of the four corners; grad_x
//     combine                    per tile:    dots of all blocks, in order -> grad_offset, grad_mask
//     weights                    per block and tap:  the columns again x grad_output -> grad_weight
//
// The dots of all blocks are kept for a strip of positions at a time. Gathering the columns a second time costs a few
// percent and lets grad_weight be shared among threads by tap as well.
#pragma once

#include "plan.hpp"

namespace dcn::DCN_ISA {

// Channels of one weight group and one offset group.
struct Block {
  int64_t first, count;
  int64_t group, offset_group;
};

template <class T, int NDim>
struct BackwardPlan : Plan<T, NDim> {
  using Plan<T, NDim>::geometry;
  using Plan<T, NDim>::taps;
  using Plan<T, NDim>::positions;

  const BackwardArguments& arguments;
  Images<T, NDim> x, grad_x;
  int threads;
  bool grads_at_x, grads_at_positions, grads_at_weight;  // which of the three parts are asked for
  bool grad_output_in_place;
  int64_t grad_output_stride;    // from position to position, in elements
  int64_t block_channels, blocks;
  int64_t strip, strips;         // positions
  int64_t terms;                 // taps x inputs of a weight group
  int64_t round_images;

  BackwardPlan(const BackwardArguments& arguments, int threads)
      : Plan<T, NDim>(arguments.geometry),
        arguments(arguments),
        x(arguments.x, geometry.in_channels, geometry.input),
        grad_x(arguments.grad_x, geometry.in_channels, geometry.input),
        threads(threads) {
    const Planes& grad_output = arguments.grad_output;
    constexpr int64_t kVector = kLanes<T>, kLine = 64 / sizeof(T);
    grads_at_x = arguments.grad_x.data;
    grads_at_positions = arguments.grad_offset.data || arguments.grad_mask.data;
    grads_at_weight = arguments.grad_weight;
    grad_output_in_place = geometry.out_channels <= 1 || grad_output.channel == sizeof(T);
    grad_output_stride = grad_output_in_place ? grad_output.position / static_cast<int64_t>(sizeof(T))
                         : geometry.out_channels % (16 * kLine) ? geometry.out_channels
                                                                : geometry.out_channels + kLine;
    terms = taps * this->group_inputs;

    // Narrower blocks where there would be too few to share among threads; the choice fixes the order of sums, so it
    // depends on the shape alone.
    block_channels = geometry.in_channels >= 4 * kVector ? 2 * kVector : kVector;
    blocks = 0;
    for_each_block([&](const Block&) { ++blocks; });

    constexpr int64_t kDotsBytes = 6 << 20;
    const int64_t per_position = blocks * taps * kCorners<NDim> * static_cast<int64_t>(sizeof(T));
    const int64_t fitting = per_position > 0 ? kDotsBytes / per_position / kTilePositions * kTilePositions : positions;
    strip = !grads_at_positions ? positions : fitting > 4 * kTilePositions ? fitting : 4 * kTilePositions;
    strip = least(strip, positions) > 0 ? least(strip, positions) : 1;
    strips = ceil_div(positions, strip);

    constexpr size_t kRoundBytes = 2 << 20;
    const size_t image_bytes = (x.buffer_elements() + grad_x_elements() + grad_output_elements()) * sizeof(T) +
                               static_cast<size_t>(dots_elements()) * sizeof(T) + 1;
    const int64_t images = static_cast<int64_t>(kRoundBytes * threads / image_bytes);
    round_images = least(images > 1 ? images : 1, geometry.batch);
  }

  template <class Body>
  void for_each_block(const Body& body) const {
    const int64_t outer = this->depthwise ? geometry.in_channels : this->group_inputs;
    for (int64_t first = 0; first < geometry.in_channels;) {
      const int64_t to_group = outer - first % outer;
      const int64_t to_offset_group = this->offset_group_channels - first % this->offset_group_channels;
      const int64_t count = least(block_channels, least(to_group, to_offset_group));
      body(Block{first, count, first / outer, first / this->offset_group_channels});
      first += count;
    }
  }

  size_t grad_x_elements() const { return grads_at_x ? grad_x.buffer_elements() : 0; }
  size_t grad_output_elements() const { return grad_output_in_place ? 0 : positions * grad_output_stride; }
  int64_t dots_elements() const { return grads_at_positions ? blocks * taps * strip * kCorners<NDim> : 0; }

  // Taps are taken so many at a time that their columns fill a panel: one, unless a block has few channels.
  int64_t chunk_taps(const Block& block) const {
    const int64_t fitting = 2 * kLanes<T> / block.count;
    return least(fitting > 1 ? fitting : 1, taps);
  }
  int64_t chunks(const Block& block) const { return ceil_div(taps, chunk_taps(block)); }
  Panels panels(const Block& block, int64_t chunk) const {
    const int64_t first = chunk * chunk_taps(block);
    return Panels::of<T>(least(chunk_taps(block), taps - first) * block.count);
  }
  // Elements that one block takes when its weights are packed: a chunk is (outputs of the group, padded columns).
  int64_t packed_elements(const Block& block) const {
    if (this->depthwise) return taps * block.count;
    int64_t columns = 0;
    for (int64_t chunk = 0; chunk < chunks(block); ++chunk) columns += panels(block, chunk).padded();
    return columns * this->group_outputs;
  }
};

template <class T, int NDim>
struct BackwardBuffers {
  struct PackedBlock : Block {
    T* weights;
    T* grad_weight;
  };
  T* x;
  T* grad_x;
  T* grad_output;
  T* dots;
  T* zeros;
  PackedBlock* blocks;
  struct PerThread {
    BackwardSamples<T, NDim>* corners;
    Samples<T, NDim>* samples;
    T* columns;  // kPiece positions of one chunk
    T* nowhere;  // where grad_x of corners without weight goes
  };
  PerThread* thread;

  BackwardBuffers(const BackwardPlan<T, NDim>& plan, Workspace& space) {
    const size_t images = plan.round_images;
    x = space.take<T>(images * plan.x.buffer_elements());
    grad_x = space.take<T>(images * plan.grad_x_elements());
    grad_output = space.take<T>(images * plan.grad_output_elements());
    dots = space.take<T>(images * plan.dots_elements());
    zeros = space.take<T>(plan.block_channels);
    blocks = space.take<PackedBlock>(plan.blocks);
    int64_t index = 0;
    plan.for_each_block([&](const Block& block) {
      const size_t elements = plan.packed_elements(block);
      const PackedBlock packed = {block, space.take<T>(elements),
                                  space.take<T>(plan.grads_at_weight ? elements : 0)};
      if (blocks) blocks[index++] = packed;
    });
    thread = space.take<PerThread>(plan.threads);
    const size_t columns = kPiece * 2 * kLanes<T>;
    for (int i = 0; i < plan.threads; ++i) {
      const PerThread mine = {space.take<BackwardSamples<T, NDim>>(1), space.take<Samples<T, NDim>>(1),
                              space.take<T>(columns), space.take<T>(plan.block_channels)};
      if (!thread) continue;
      thread[i] = mine;
      // Lanes past the last column are multiplied too; their results are dropped, but they must hold numbers.
      __builtin_memset(mine.columns, 0, columns * sizeof(T));
      __builtin_memset(mine.nowhere, 0, plan.block_channels * sizeof(T));
    }
    if (zeros) __builtin_memset(zeros, 0, plan.block_channels * sizeof(T));
  }
};

template <class T, int NDim>
class BackwardRun {
 public:
  BackwardRun(const BackwardPlan<T, NDim>& plan, const BackwardBuffers<T, NDim>& buffers, Team& team)
      : arguments_(plan.arguments), plan_(plan), buffers_(buffers), team_(team) {}

  bool run() {
    if (!pack()) return false;
    if (arguments_.grad_bias) __builtin_memset(arguments_.grad_bias, 0, geometry().out_channels * sizeof(T));
    for (int64_t first = 0; first < geometry().batch; first += plan_.round_images) {
      images_ = least(plan_.round_images, geometry().batch - first);
      first_image_ = first;
      if (!copy_in() || !positions() || !weights() || !copy_out()) return false;
    }
    return unpack();
  }

 private:
  using Buffers = BackwardBuffers<T, NDim>;
  using Thread = typename Buffers::PerThread;
  using PackedBlock = typename Buffers::PackedBlock;
  static constexpr int kDotsEach = kCorners<NDim>;

  const Geometry& geometry() const { return plan_.geometry; }
  bool any_at_columns() const { return plan_.grads_at_x || plan_.grads_at_positions; }

  // ---- images of this round

  Pixels<NDim> x_of(int64_t slot) const {
    return plan_.x.view(first_image_ + slot, buffers_.x + slot * plan_.x.buffer_elements());
  }
  Pixels<NDim> grad_x_of(int64_t slot) const {
    if (!plan_.grads_at_x) return x_of(slot);
    return plan_.grad_x.view(first_image_ + slot, buffers_.grad_x + slot * plan_.grad_x_elements());
  }
  T* grad_output_of(int64_t slot) const {
    if (!plan_.grad_output_in_place) return buffers_.grad_output + slot * plan_.grad_output_elements();
    const Planes& grad_output = arguments_.grad_output;
    return reinterpret_cast<T*>(grad_output.data + (first_image_ + slot) * grad_output.batch);
  }
  T* dots_of(int64_t slot, int64_t block, int64_t tap, int64_t position) const {
    return buffers_.dots + slot * plan_.dots_elements() +
           ((block * plan_.taps + tap) * plan_.strip + position) * kDotsEach;
  }
  Displacement<T, NDim> moved(int64_t slot, int64_t offset_group) const {
    return {arguments_.offset, arguments_.mask, plan_.taps, first_image_ + slot, offset_group};
  }
  static Pixels<NDim> channels_from(Pixels<NDim> pixels, int64_t channel) {
    pixels.data += channel * sizeof(T);
    return pixels;
  }

  bool copy_in() {
    const int64_t x_items = plan_.x.copy_items();
    const int64_t y_items = plan_.grad_output_in_place ? 0 : ceil_div(plan_.positions, kCopyPixels);
    const int64_t zero_items = plan_.grads_at_x ? ceil_div(plan_.grad_x.pixels, kCopyPixels) : 0;
    const int64_t items = x_items + y_items + zero_items;
    return team_.run(items * images_, [&](int64_t item, int) {
      const int64_t slot = item / items;
      item %= items;
      if (item < x_items)
        plan_.x.copy_in(first_image_ + slot, item, buffers_.x + slot * plan_.x.buffer_elements());
      else if (item < x_items + y_items)
        copy_grad_output(slot, item - x_items);
      else
        clear_grad_x(slot, item - x_items - y_items);
    });
  }

  void copy_grad_output(int64_t slot, int64_t item) {
    const Planes& from = arguments_.grad_output;
    const int64_t first = item * kCopyPixels, stride = plan_.grad_output_stride;
    constexpr int64_t size = sizeof(T);
    const char* data = from.data + (first_image_ + slot) * from.batch + first * from.position;
    copy_matrix<T>(least(kCopyPixels, plan_.positions - first), geometry().out_channels,
                   {reinterpret_cast<const T*>(data), from.position / size, from.channel / size},
                   {grad_output_of(slot) + first * stride, stride, 1});
  }

  void clear_grad_x(int64_t slot, int64_t item) {
    const Pixels<NDim> pixels = grad_x_of(slot);
    const int64_t first = item * kCopyPixels, end = least(first + kCopyPixels, plan_.grad_x.pixels);
    for (int64_t pixel = first; pixel < end; ++pixel) {
      char* at = pixels.data;
      for (int64_t axis = NDim - 1, rest = pixel; axis >= 0; rest /= geometry().input[axis--])
        at += rest % geometry().input[axis] * pixels.axis[axis];
      __builtin_memset(at, 0, geometry().in_channels * sizeof(T));
    }
  }

  bool copy_out() {
    const int64_t items = plan_.grads_at_x ? plan_.grad_x.copy_items() : 0;
    return team_.run(items * images_, [&](int64_t item, int) {
      const int64_t slot = item / items;
      plan_.grad_x.copy_out(first_image_ + slot, item % items, buffers_.grad_x + slot * plan_.grad_x_elements());
    });
  }

  // ---- weights in and out: (out, in, tap) <-> per block and chunk (output of the group, column)

  // Calls body(element of weight, element of the packed block) for all of them.
  template <class Body>
  void for_each_weight(const PackedBlock& block, const Body& body) const {
    const int64_t input = block.first - block.group * (plan_.depthwise ? 0 : plan_.group_inputs), taps = plan_.taps;
    if (plan_.depthwise) {
      for (int64_t c = 0; c < block.count; ++c)
        for (int64_t tap = 0; tap < taps; ++tap) body((input + c) * taps + tap, tap * block.count + c);
      return;
    }
    int64_t packed = 0;
    for (int64_t chunk = 0; chunk < plan_.chunks(block); ++chunk) {
      const int64_t first = chunk * plan_.chunk_taps(block), last = least(first + plan_.chunk_taps(block), taps);
      const int64_t width = plan_.panels(block, chunk).padded();
      for (int64_t output = 0; output < plan_.group_outputs; ++output, packed += width) {
        const int64_t row = (block.group * plan_.group_outputs + output) * plan_.terms;
        for (int64_t tap = first; tap < last; ++tap)
          for (int64_t c = 0; c < block.count; ++c)
            body(row + (input + c) * taps + tap, packed + (tap - first) * block.count + c);
      }
    }
  }

  bool pack() {
    const T* weight = static_cast<const T*>(arguments_.weight);
    return team_.run(plan_.blocks, [&](int64_t item, int) {
      const PackedBlock& block = buffers_.blocks[item];
      const size_t bytes = plan_.packed_elements(block) * sizeof(T);
      if (any_at_columns()) {
        __builtin_memset(block.weights, 0, bytes);
        for_each_weight(block, [&](int64_t from, int64_t to) { block.weights[to] = weight[from]; });
      }
      if (plan_.grads_at_weight) __builtin_memset(block.grad_weight, 0, bytes);
    });
  }

  bool unpack() {
    if (!plan_.grads_at_weight) return true;
    T* grad_weight = static_cast<T*>(arguments_.grad_weight);
    return team_.run(plan_.blocks, [&](int64_t item, int) {
      const PackedBlock& block = buffers_.blocks[item];
      for_each_weight(block, [&](int64_t to, int64_t from) { grad_weight[to] = block.grad_weight[from]; });
    });
  }

  // ---- grad_x, grad_offset, grad_mask

  bool positions() {
    if (!any_at_columns()) return true;
    for (int64_t strip = 0; strip < plan_.strips; ++strip) {
      const int64_t first = strip * plan_.strip, count = least(plan_.strip, plan_.positions - first);
      const bool finished = team_.run(plan_.blocks * images_, [&](int64_t item, int thread) {
        const int64_t slot = item / plan_.blocks;
        for (int64_t at = first; at < first + count && team_.keep_going(thread); at += kTilePositions) {
          const Tile<NDim> tile(geometry(), at, least(kTilePositions, first + count - at));
          scatter_block(slot, item % plan_.blocks, tile, at - first, buffers_.thread[thread]);
        }
      });
      if (!finished || !combine(first, count)) return false;
    }
    return true;
  }

  void scatter_block(int64_t slot, int64_t index, const Tile<NDim>& tile, int64_t at, Thread& mine) {
    const PackedBlock& block = buffers_.blocks[index];
    const int64_t outputs = plan_.group_outputs, stride = plan_.grad_output_stride;
    if (plan_.depthwise) {
      const T* grad_output = grad_output_of(slot) + tile.first * stride + block.first;
      for (int64_t tap = 0; tap < plan_.taps; ++tap) {
        const T* weights = block.weights + tap * block.count;
        scatter_tap(slot, index, tile, tap, at, mine, [=](auto lanes, int64_t p, int64_t c) {
          using V = Vec<T, decltype(lanes)::count>;
          return load<V>(grad_output + p * stride + c) * load<V>(weights + c);
        });
      }
      return;
    }
    const T* grad_output = grad_output_of(slot) + tile.first * stride + block.group * outputs;
    const T* weights = block.weights;
    if (outputs == 0) __builtin_memset(mine.columns, 0, kTilePositions * 2 * kLanes<T> * sizeof(T));
    for (int64_t chunk = 0; chunk < plan_.chunks(block); ++chunk) {
      const Panels panels = plan_.panels(block, chunk);
      const int64_t width = panels.padded(), first = chunk * plan_.chunk_taps(block);
      for_each_piece(Terms{1, 0, outputs, 1}, [&](Terms piece, int64_t from, int64_t term) {
        multiply_panel<T>(panels, 0, tile.count, grad_output + from, stride, piece, weights + term * width,
                          mine.columns, width, term == 0);
      });
      for (int64_t tap = first; tap < least(first + plan_.chunk_taps(block), plan_.taps); ++tap) {
        const T* columns = mine.columns + (tap - first) * block.count;
        scatter_tap(slot, index, tile, tap, at, mine, [=](auto lanes, int64_t p, int64_t c) {
          return load<Vec<T, decltype(lanes)::count>>(columns + p * width + c);
        });
      }
      weights += outputs * width;
    }
  }

  template <class Gradient>
  void scatter_tap(int64_t slot, int64_t index, const Tile<NDim>& tile, int64_t tap, int64_t at, Thread& mine,
                   const Gradient& gradient) {
    const Block& block = buffers_.blocks[index];
    locate_corners(geometry(), tile, Tap<NDim>(geometry(), tap), moved(slot, block.offset_group),
                   channels_from(x_of(slot), block.first), buffers_.zeros, channels_from(grad_x_of(slot), block.first),
                   mine.nowhere, *mine.corners);
    T* dots = plan_.grads_at_positions ? dots_of(slot, index, tap, at) : nullptr;
    if (!plan_.grads_at_positions)
      scatter_and_dot<T, NDim, false, true>(*mine.corners, tile.count, block.count, gradient, dots);
    else if (!plan_.grads_at_x)
      scatter_and_dot<T, NDim, true, false>(*mine.corners, tile.count, block.count, gradient, dots);
    else
      scatter_and_dot<T, NDim, true, true>(*mine.corners, tile.count, block.count, gradient, dots);
  }

  bool combine(int64_t first, int64_t count) {
    if (!plan_.grads_at_positions) return true;
    const int64_t tiles = ceil_div(count, kTilePositions), groups = geometry().offset_groups;
    return team_.run(tiles * groups * images_, [&](int64_t item, int) {
      const int64_t slot = item / (tiles * groups), group = item / tiles % groups;
      const int64_t at = item % tiles * kTilePositions;
      const Tile<NDim> tile(geometry(), first + at, least(kTilePositions, count - at));
      for (int64_t tap = 0; tap < plan_.taps; ++tap) combine_tap(slot, group, tile, Tap<NDim>(geometry(), tap), at);
    });
  }

  void combine_tap(int64_t slot, int64_t group, const Tile<NDim>& tile, const Tap<NDim>& tap, int64_t at) {
    const Displacement<T, NDim> moved = this->moved(slot, group);
    const Displacement<T, NDim> gradients(arguments_.grad_offset, arguments_.grad_mask, plan_.taps,
                                          first_image_ + slot, group);
    with_lanes<T>(fits_narrow_lanes<T, NDim>(geometry(), x_of(slot)), [&](auto lanes) {
      using L = decltype(lanes);
      for (int64_t p = 0; p < tile.count; p += L::count) {
        const int64_t position = tile.first + p, count = tile.count - p;
        typename L::Real dots[kDotsEach];
        sum_dots<L>(slot, group, tap.index, at + p, count, dots);
        AxisSample<L> axes[NDim];
        locate<L>(geometry(), tile, tap, moved, p, axes);
        const auto mask = moved.template masks<L>(tap.index, position, count);
        const PositionGradients<L, NDim> gradient = position_gradients<L, NDim>(axes, mask, dots);
        for (int axis = 0; axis < NDim; ++axis)
          gradients.template write_offsets<L>(tap.index, axis, position, count, gradient.offset[axis]);
        gradients.template write_masks<L>(tap.index, position, count, gradient.mask);
      }
    });
  }

  // The dots of some positions over all channels of an offset group: its blocks in their order.
  template <class L>
  DCN_INLINE void sum_dots(int64_t slot, int64_t group, int64_t tap, int64_t position, int64_t count,
                           typename L::Real (&dots)[kDotsEach]) {
    using V = Vec<T, kDotsEach>;
    V sums[L::count] = {};
    const int64_t positions = least(L::count, count);
    for (int64_t index = 0; index < plan_.blocks; ++index) {
      if (buffers_.blocks[index].offset_group != group) continue;
      const T* block = dots_of(slot, index, tap, position);
      for (int64_t i = 0; i < positions; ++i) sums[i] += load<V>(block + i * kDotsEach);
    }
    T lanes[L::count][kDotsEach], transposed[kDotsEach][L::count];
    __builtin_memcpy(lanes, sums, sizeof lanes);
    for (int j = 0; j < kDotsEach; ++j)
      for (int i = 0; i < L::count; ++i) transposed[j][i] = lanes[i][j];
    for (int j = 0; j < kDotsEach; ++j) dots[j] = load<typename L::Real>(transposed[j]);
  }

  // ---- grad_weight, grad_bias

  bool weights() {
    // An item takes several chunks of taps, which find the same pixels in the cache, unless threads would stay idle.
    int64_t most_chunks = 0;
    for (int64_t i = 0; i < plan_.blocks; ++i) {
      const int64_t chunks = weight_chunks(buffers_.blocks[i]);
      if (chunks > most_chunks) most_chunks = chunks;
    }
    const int64_t fair = ceil_div(3 * plan_.threads, plan_.blocks > 0 ? plan_.blocks : 1);
    const int64_t parts = least(fair, most_chunks);
    const int64_t items = plan_.grads_at_weight ? plan_.blocks * parts : 0;
    constexpr int64_t kBiases = 64;
    const int64_t biases = arguments_.grad_bias ? ceil_div(geometry().out_channels, kBiases) : 0;
    return team_.run(items + biases, [&](int64_t item, int thread) {
      if (item >= items) {
        const int64_t first = (item - items) * kBiases;
        return sum_bias(first, least(kBiases, geometry().out_channels - first));
      }
      const PackedBlock& block = buffers_.blocks[item / parts];
      const int64_t chunks = weight_chunks(block), part = item % parts;
      weigh(block, chunks * part / parts, chunks * (part + 1) / parts, thread);
    });
  }

  // Chunks of taps that are summed on their own; a depthwise block has no matrices, and a chunk is a tap.
  int64_t weight_chunks(const Block& block) const { return plan_.depthwise ? plan_.taps : plan_.chunks(block); }

  void weigh(const PackedBlock& block, int64_t first_chunk, int64_t last_chunk, int thread) {
    for (int64_t slot = 0; slot < images_; ++slot)
      for (int64_t first = 0; first < plan_.positions; first += kPiece)
        for (int64_t chunk = first_chunk; chunk < last_chunk; ++chunk) {
          if (!team_.keep_going(thread)) return;
          const int64_t count = least(kPiece, plan_.positions - first);
          if (plan_.depthwise)
            weigh_piece_per_channel(slot, block, chunk, first, count, buffers_.thread[thread]);
          else
            weigh_piece(slot, block, chunk, first, count, buffers_.thread[thread]);
        }
  }

  // Gathers `taps` taps of a block for a piece of positions, a tile at a time: body(tile, first position, tap).
  template <class Body>
  void for_each_sampled_tap(int64_t slot, const Block& block, int64_t first_tap, int64_t taps, int64_t first,
                            int64_t count, Thread& mine, const Body& body) {
    static_assert(kPiece % kGatherPositions == 0 && kGatherPositions <= kTilePositions);
    const Pixels<NDim> pixels = channels_from(x_of(slot), block.first);
    for (int64_t at = 0; at < count; at += kGatherPositions) {
      const Tile<NDim> tile(geometry(), first + at, least(kGatherPositions, count - at));
      for (int64_t tap = first_tap; tap < first_tap + taps; ++tap) {
        locate_values(geometry(), tile, Tap<NDim>(geometry(), tap), moved(slot, block.offset_group), pixels,
                      buffers_.zeros, *mine.samples);
        body(tile, at, tap);
      }
    }
  }

  void weigh_piece(int64_t slot, const PackedBlock& block, int64_t chunk, int64_t first, int64_t count, Thread& mine) {
    const int64_t chunk_taps = plan_.chunk_taps(block), first_tap = chunk * chunk_taps;
    const int64_t outputs = plan_.group_outputs, stride = plan_.grad_output_stride;
    const Panels panels = plan_.panels(block, chunk);
    const int64_t width = panels.padded();
    T* grad_weight = block.grad_weight;
    for (int64_t i = 0; i < chunk; ++i) grad_weight += plan_.panels(block, i).padded() * outputs;
    for_each_sampled_tap(slot, block, first_tap, least(chunk_taps, plan_.taps - first_tap), first, count, mine,
                         [&](const Tile<NDim>& tile, int64_t at, int64_t tap) {
                           gather_columns<T, NDim>(*mine.samples, tile.count, block.count,
                                                   mine.columns + at * width + (tap - first_tap) * block.count, width);
                         });
    const T* grad_output = grad_output_of(slot) + first * stride + block.group * outputs;
    multiply_panel<T>(panels, 0, outputs, grad_output, 1, Terms{1, 0, count, stride}, mine.columns, grad_weight, width,
                      false);
  }

  void weigh_piece_per_channel(int64_t slot, const PackedBlock& block, int64_t tap, int64_t first, int64_t count,
                               Thread& mine) {
    T* piece = mine.columns;
    __builtin_memset(piece, 0, block.count * sizeof(T));
    const int64_t stride = plan_.grad_output_stride;
    for_each_sampled_tap(slot, block, tap, 1, first, count, mine, [&](const Tile<NDim>& tile, int64_t at, int64_t) {
      const T* grad_output = grad_output_of(slot) + (first + at) * stride + block.first;
      gather<T, NDim>(*mine.samples, tile.count, block.count, [&](auto, int64_t p, int64_t c, auto sample) {
        using V = decltype(sample);
        store(piece + c, load<V>(piece + c) + sample * load<V>(grad_output + p * stride + c));
      });
    });
    T* grad_weight = block.grad_weight + tap * block.count;
    for (int64_t c = 0; c < block.count; ++c) grad_weight[c] += piece[c];
  }

  void sum_bias(int64_t first, int64_t count) {
    T* grad_bias = static_cast<T*>(arguments_.grad_bias) + first;
    const int64_t stride = plan_.grad_output_stride;
    for_each_vector<T>(count, [&](auto lanes, int64_t c) {
      using V = Vec<T, decltype(lanes)::count>;
      V total = load<V>(grad_bias + c);
      for (int64_t slot = 0; slot < images_; ++slot)
        for (int64_t at = 0; at < plan_.positions; at += kPiece) {
          const T* grad_output = grad_output_of(slot) + at * stride + first + c;
          V piece = {};
          for (int64_t p = 0; p < least(kPiece, plan_.positions - at); ++p)
            piece += load<V>(grad_output + p * stride);
          total += piece;
        }
      store(grad_bias + c, total);
    });
  }

  const BackwardArguments& arguments_;
  const BackwardPlan<T, NDim>& plan_;
  const BackwardBuffers<T, NDim>& buffers_;
  Team& team_;
  int64_t first_image_ = 0, images_ = 0;
};

template <class T, int NDim>
Status backward(const BackwardArguments& arguments, Team& team) {
  const BackwardPlan<T, NDim> plan(arguments, team.threads());
  return with_workspace<BackwardBuffers<T, NDim>>(plan, [&](const BackwardBuffers<T, NDim>& buffers) {
    return BackwardRun<T, NDim>(plan, buffers, team).run();
  });
}

}  // namespace dcn::DCN_ISA
