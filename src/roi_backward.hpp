// Pooling over regions, backward, without atomics.
//
// The bins of a strip of regions are located first. Then a part of the channels of a slice of an image, one
// block or some, belongs to one thread at a time, which takes the image's regions in order. Three dots per
// bin and block are kept; their sums over blocks, in order, are the gradients of offsets and masks.
#pragma once

#include "roi_plan.hpp"

namespace dcn::DCN_ISA {

// Output channels of one class, which begin with a block.
struct RoIPart {
  int64_t first, count, class_id, block;
};

// Where a bin of the first region of a strip is kept, and how far from there that of the next one.
struct BinPlace {
  int64_t first, step;
};

template <class T>
struct RoIBackwardPlan : RoIPlan {
  Slices<T> x, grad_x;
  Storage images;
  Planes grad_output, grad_offset, grad_mask;
  bool grads_at_x, grads_at_positions;
  int64_t class_blocks, blocks;  // of a slice
  int64_t together;              // blocks of a part, which a thread takes at a time
  int64_t class_parts, parts;    // of a slice
  int64_t located_bytes;         // of a bin and its lines
  int64_t offset_parts;          // of a region, each with an offset; none where no such gradient is made
  int64_t strip;                 // regions
  int64_t rounds;                // images at a time
  int threads;

  static constexpr int64_t kTileBins = 64;
  static_assert(kTileBins <= kCopyPixels);

  RoIBackwardPlan(const RoIBackwardArguments& arguments, int threads)
      : RoIPlan(arguments.geometry, arguments.arrays),
        x(arguments.geometry, arguments.arrays.x, arguments.arrays.images),
        grad_x(arguments.geometry, arguments.grad_x, arguments.arrays.images),
        images(arguments.arrays.images),
        grad_output(arguments.grad_output),
        grad_offset(arguments.grad_offset),
        grad_mask(arguments.grad_mask),
        grads_at_x(arguments.grad_x.data),
        grads_at_positions(arguments.grad_offset.data || arguments.grad_mask.data),
        class_blocks(ceiling(class_outputs, kBlock<T>)),
        blocks(class_blocks * geometry.classes),
        threads(threads) {
    const bool enough = blocks * x.count * geometry.batch >= kTogether * threads;
    together = enough ? kTogether : 1;
    class_parts = ceiling(class_blocks, together);
    parts = class_parts * geometry.classes;
    offset_parts = grads_at_positions && geometry.rois > 0 ? geometry.part[0] * geometry.part[1] : 0;
    const int64_t lines = most_lines(0) + most_lines(1) + kLinesTogether;
    located_bytes = static_cast<int64_t>(sizeof(LocatedBin<T>) + lines * sizeof(Line<T>));
    constexpr int64_t kStripBytes = 4 << 20, kLeast = 16;
    const int64_t dots_bytes = grads_at_positions ? class_blocks * kDotsPerBin * sizeof(T) : 0;
    const int64_t bytes = bins * geometry.classes * (located_bytes + dots_bytes) + 1;
    strip = clamp(kStripBytes / bytes, least(kLeast, geometry.rois), geometry.rois);
    rounds = round_images((x_elements() + grad_x_elements()) * sizeof(T), threads);
  }
  size_t x_elements() const { return grads_at_positions ? x.image_elements() : 0; }
  size_t grad_x_elements() const { return grads_at_x ? grad_x.image_elements() : 0; }
  int64_t located_bins() const { return strip * bins * geometry.classes; }
  int64_t dots_elements() const { return grads_at_positions ? strip * bins * blocks * kDotsPerBin : 0; }

  BinPlace place(int64_t bin, const BinCells& cells) const {
    const int64_t row = bin / geometry.output[1], column = bin % geometry.output[1];
    const int64_t slice = cells.at(row, column).slice;
    const Range rows = bins_of_part(slice / geometry.group, geometry.group, geometry.output[0]);
    const Range columns = bins_of_part(slice % geometry.group, geometry.group, geometry.output[1]);
    const int64_t height = rows.end - rows.first, width = columns.end - columns.first;
    const int64_t before =
        rows.first * geometry.output[1] + height * columns.first;  // bins of earlier slices
    const int64_t within = (row - rows.first) * width + column - columns.first;
    return {before * strip + within, height * width};
  }
  RoIPart part(int64_t index) const {
    const int64_t class_id = index / class_parts, block = index % class_parts * together;
    const int64_t within = block * kBlock<T>, count = least(together * kBlock<T>, class_outputs - within);
    return {class_id * class_outputs + within, count, class_id, class_id * class_blocks + block};
  }
};

template <class T>
struct RoIBackwardBuffers {
  struct PerThread {
    PatchBuffers<T> patch;
    T* gradients;  // of a tile of bins, channels-last, block by block
    T* moved;      // of a region's parts, by y and x
  };
  T* x;
  T* grad_x;
  T* dots;
  char* located;
  BinFactors<T>* factors;
  BinCells cells;
  BinPlace* places;
  PerThread* thread;

  RoIBackwardBuffers(const RoIBackwardPlan<T>& plan, Workspace& space)
      : x(space.take<T>(plan.rounds * plan.x_elements())),
        grad_x(space.take<T>(plan.rounds * plan.grad_x_elements())),
        dots(space.take<T>(plan.dots_elements())),
        located(space.take<char>(plan.located_bins() * plan.located_bytes)),
        factors(space.take<BinFactors<T>>(plan.located_bins())),
        cells(plan.geometry, space),
        places(space.take<BinPlace>(plan.bins)),
        thread(space.take<PerThread>(plan.threads)) {
    for (int64_t bin = 0; places && bin < plan.bins; ++bin) places[bin] = plan.place(bin, cells);
    for (int i = 0; i < plan.threads; ++i) {
      const PerThread mine = {PatchBuffers<T>(plan.geometry, space),
                              space.take<T>(plan.kTileBins * kBlock<T> * plan.together),
                              space.take<T>(2 * plan.offset_parts)};
      if (thread) thread[i] = mine;
    }
  }
};

template <class T>
class RoIBackwardRun {
 public:
  RoIBackwardRun(const RoIBackwardPlan<T>& plan, const RoIBackwardBuffers<T>& buffers, Team& team)
      : plan_(plan), buffers_(buffers), team_(team) {}

  bool run() {
    for (first_image_ = 0; first_image_ < plan_.geometry.batch; first_image_ += plan_.rounds) {
      images_ = least(plan_.rounds, plan_.geometry.batch - first_image_);
      if (!copy_in() || !strips() || !copy_out()) return false;
    }
    return true;
  }

 private:
  int64_t slices() const { return plan_.x.count; }

  bool copy_in() {
    const int64_t x_items = plan_.grads_at_positions ? plan_.x.copy_items() : 0;
    const int64_t pixels = plan_.geometry.input[0] * plan_.geometry.input[1];
    const int64_t zero_items = plan_.grads_at_x ? slices() * ceiling(pixels, kCopyPixels) : 0;
    const int64_t items = x_items + zero_items;
    return team_.run(items * images_, [&](int64_t item, int) {
      const int64_t slot = item / items, index = item % items;
      if (index >= x_items)
        return clear(slot, (index - x_items) % slices(), (index - x_items) / slices() * kCopyPixels, pixels);
      const auto at = plan_.x.copy_item(index);
      for_each_part([&](const RoIPart& part) {
        plan_.x.slice(at.slice).copy_in(first_image_ + slot, at.item,
                                        plan_.x.buffer(buffers_.x, slot, at.slice), part.first, part.count);
      });
    });
  }

  void clear(int64_t slot, int64_t slice, int64_t first, int64_t pixels) {
    for_each_part([&](const RoIPart& part) {
      clear_pixels<T>(view(plan_.grad_x, buffers_.grad_x, slot, slice, part), plan_.geometry.input, first,
                      least(first + kCopyPixels, pixels), part.count);
    });
  }

  bool copy_out() {
    const int64_t items = plan_.grads_at_x ? plan_.grad_x.copy_items() : 0;
    return team_.run(items * images_, [&](int64_t item, int) {
      const int64_t slot = item / items;
      const auto at = plan_.grad_x.copy_item(item % items);
      for_each_part([&](const RoIPart& part) {
        plan_.grad_x.slice(at.slice).copy_out(first_image_ + slot, at.item,
                                              plan_.grad_x.buffer(buffers_.grad_x, slot, at.slice),
                                              part.first, part.count);
      });
    });
  }

  template <class Body>
  void for_each_part(const Body& body) const {
    for (int64_t index = 0; index < plan_.parts; ++index) body(plan_.part(index));
  }

  Pixels<2> view(const Slices<T>& images, T* buffer, int64_t slot, int64_t slice, const RoIPart& part) const {
    return images.view(first_image_ + slot, buffer, slot, slice, part.first, part.count);
  }

  bool strips() {
    const int64_t begin = plan_.begins[first_image_], end = plan_.begins[first_image_ + images_];
    for (int64_t first = begin; first < end; first += plan_.strip) {
      const int64_t last = least(first + plan_.strip, end);
      const int64_t items = plan_.parts * slices() * images_;
      const bool finished = locate(first, last) && team_.run(items, [&](int64_t item, int thread) {
        const int64_t image_slice = item / plan_.parts;
        visit_part(image_slice / slices(), image_slice % slices(), item % plan_.parts, first, last, thread);
      });
      if (!finished || !combine(first, last)) return false;
    }
    return true;
  }

  // The bins of regions of an image, for every class.
  bool locate(int64_t first, int64_t last) {
    return team_.run(last - first, [&](int64_t item, int thread) {
      for (int64_t class_id = 0; class_id < plan_.geometry.classes; ++class_id) {
        Patch<T> patch(plan_, buffers_.cells, buffers_.thread[thread].patch, plan_.order[first + item]);
        for (int64_t bin = 0; bin < plan_.bins; ++bin) {
          if (plan_.grads_at_positions)
            patch.template locate<true>(bin, class_id);
          else
            patch.template locate<false>(bin, class_id);
          const int64_t index = located_index(item, bin, class_id);
          patch.keep(located(index), buffers_.factors[index]);
        }
      }
    });
  }
  int64_t located_index(int64_t region, int64_t bin, int64_t class_id) const {
    return place(region, bin) * plan_.geometry.classes + class_id;
  }
  LocatedBin<T>& located(int64_t index) const {
    return *reinterpret_cast<LocatedBin<T>*>(buffers_.located + index * plan_.located_bytes);
  }

  // The pixels of a part of the channels.
  struct Visited {
    RoIPart part;
    Pixels<2> x, grad_x;
  };

  // The regions first to last, in the order by images, that lie in the image.
  void visit_part(int64_t slot, int64_t slice, int64_t index, int64_t first, int64_t last, int thread) {
    const int64_t begin = plan_.begins[first_image_ + slot], end = plan_.begins[first_image_ + slot + 1];
    const RoIPart part = plan_.part(index);
    Visited visited = {part, {}, {}};
    if (plan_.grads_at_positions) visited.x = view(plan_.x, buffers_.x, slot, slice, part);
    if (plan_.grads_at_x) visited.grad_x = view(plan_.grad_x, buffers_.grad_x, slot, slice, part);
    T* gradients = buffers_.thread[thread].gradients;
    for (int64_t at = begin > first ? begin : first; at < least(end, last); ++at)
      for_each_tile(slice, [&](int64_t bin, int64_t bins) {
        if (!team_.keep_going(thread)) return;
        copy_gradients(plan_.order[at], bin, bins, part, gradients);
        const int64_t next = at + 1 < least(end, last) ? plan_.order[at + 1] : plan_.order[at];
        for (int64_t i = 0; i < bins; ++i) {
          prefetch_gradients(next, bin + i, part);
          visit(located(located_index(at - first, bin + i, part.class_id)), visited,
                gradients + i * part.count, dots_of(at - first, bin + i, part.block));
        }
      });
  }

  // Calls body(first bin, count) for runs of the bins that read a slice.
  template <class Body>
  void for_each_tile(int64_t slice, const Body& body) const {
    const RoIGeometry& geometry = plan_.geometry;
    const int64_t width = geometry.output[1];
    Range rows = bins_of_part(slice / geometry.group, geometry.group, geometry.output[0]);
    Range columns = bins_of_part(slice % geometry.group, geometry.group, width);
    if (columns.end - columns.first == width) {  // whole rows follow each other without a gap
      columns = {rows.first * width, rows.end * width};
      rows = {0, 1};
    }
    for (int64_t row = rows.first; row < rows.end; ++row)
      for (int64_t first = columns.first; first < columns.end; first += plan_.kTileBins)
        body(row * width + first, least(plan_.kTileBins, columns.end - first));
  }

  void copy_gradients(int64_t roi, int64_t bin, int64_t count, const RoIPart& part, T* to) const {
    const Planes& from = plan_.grad_output;
    char* data = from.data + roi * from.batch + part.first * from.channel + bin * from.position;
    const StoredMatrix<T> stored = {data, from.position, from.channel, plan_.images};
    stored.copy_to(count, part.count, {to, part.count, 1});
  }

  // A bin's share of what will be copied of the next region, while there is other work.
  DCN_INLINE void prefetch_gradients(int64_t roi, int64_t bin, const RoIPart& part) const {
    const Planes& from = plan_.grad_output;
    const int64_t bytes = part.count * static_cast<int64_t>(sizeof(T));
    const int64_t step = from.channel < from.position ? from.position : bytes;
    prefetch_lines<false>(from.data + roi * from.batch + part.first * from.channel + bin * step, bytes);
  }

  void visit(const LocatedBin<T>& bin, const Visited& visited, const T* gradient, T* dots) const {
    const int64_t channels = visited.part.count;
    const auto visit = [&](auto function) {
      function(bin, visited.x, visited.grad_x, channels, gradient, dots);
    };
    if (!plan_.grads_at_positions) return visit(visit_patch<T, true, false>);
    if (plan_.grads_at_x)
      visit(visit_patch<T, true, true>);
    else
      visit(visit_patch<T, false, true>);
    for (int64_t c = 0; c < channels; c += kBlock<T>, dots += kDotsPerBin) {
      if (dots[0] == dots[0] && dots[1] == dots[1] && dots[2] == dots[2]) continue;
      Pixels<2> x = visited.x;
      x.data += c * static_cast<int64_t>(sizeof(T));
      dot_patch<T>(bin, x, least(kBlock<T>, channels - c), gradient + c, dots);
    }
  }

  T* dots_of(int64_t region, int64_t bin, int64_t block) const {
    return buffers_.dots + (place(region, bin) * plan_.blocks + block) * kDotsPerBin;
  }

  // Of a bin of a strip. Those that one thread visits lie together: by slice, then by region.
  int64_t place(int64_t region, int64_t bin) const {
    return buffers_.places[bin].first + region * buffers_.places[bin].step;
  }

  bool combine(int64_t first, int64_t last) {
    if (!plan_.grads_at_positions) return true;
    return team_.run(last - first, [&](int64_t item, int thread) {
      for (int64_t class_id = 0; class_id < plan_.geometry.classes; ++class_id)
        combine(item, plan_.order[first + item], class_id, buffers_.thread[thread].moved);
    });
  }

  // Masks are of bins, and there is one class then; offsets are of parts.
  void combine(int64_t region, int64_t roi, int64_t class_id, T* moved) {
    for (int64_t i = 0; i < 2 * plan_.offset_parts; ++i) moved[i] = 0;
    const int64_t* output = plan_.geometry.output;
    for (int64_t row = 0, bin = 0; row < output[0]; ++row)
      for (int64_t column = 0; column < output[1]; ++column, ++bin) {
        const BinGradients grads = gradients(region, bin, class_id);
        T* of_part = moved + 2 * buffers_.cells.at(row, column).part;
        of_part[0] += grads.y, of_part[1] += grads.x;
        put_number<T>(plan_.grad_mask, plan_.positions, roi, 0, bin, grads.mask);
      }
    for (int64_t part = 0; part < plan_.offset_parts; ++part) {
      put_number<T>(plan_.grad_offset, plan_.positions, roi, 2 * class_id, part, moved[2 * part + 1]);
      put_number<T>(plan_.grad_offset, plan_.positions, roi, 2 * class_id + 1, part, moved[2 * part]);
    }
  }

  struct BinGradients {
    T mask, y, x;
  };
  BinGradients gradients(int64_t region, int64_t bin, int64_t class_id) const {
    using V = Vec<T, kDotsPerBin>;
    V totals = {};
    const T* dots = dots_of(region, bin, class_id * plan_.class_blocks);
    for (int64_t i = 0; i < plan_.class_blocks; ++i) totals += load<V>(dots + i * kDotsPerBin);
    const BinFactors<T>& by = buffers_.factors[located_index(region, bin, class_id)];
    return {by.inverse * totals[0], by.mask * (by.slope[0] * totals[1]), by.mask * (by.slope[1] * totals[2])};
  }

  const RoIBackwardPlan<T>& plan_;
  const RoIBackwardBuffers<T>& buffers_;
  Team& team_;
  int64_t first_image_ = 0, images_ = 0;
};

template <class T>
Status roi_backward(const RoIBackwardArguments& arguments, Team& team) {
  const RoIBackwardPlan<T> plan(arguments, team.threads());
  if (!plan.grads_at_x && !plan.grads_at_positions) return Status::kOk;
  return with_workspace<RoIBackwardBuffers<T>>(plan, [&](const RoIBackwardBuffers<T>& buffers) {
    return RoIBackwardRun<T>(plan, buffers, team).run();
  });
}

}  // namespace dcn::DCN_ISA
