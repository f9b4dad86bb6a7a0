// One round of images in the backward pass: where their pixels lie, and copies in and out of the caller's
// layout.
#pragma once

#include "backward_plan.hpp"

namespace dcn::DCN_ISA {

template <class T, int NDim>
class BackwardRound {
 public:
  BackwardRound(const BackwardPlan<T, NDim>& plan, const BackwardBuffers<T, NDim>& buffers, Team& team)
      : arguments_(plan.arguments), plan_(plan), buffers_(buffers), team_(team) {}

  void start(int64_t first_image, int64_t images) {
    first_image_ = first_image;
    images_ = images;
  }

  bool copy_in() {
    const int64_t x_items = plan_.x.copy_items();
    const int64_t y_items = plan_.grad_output_in_place ? 0 : ceiling(plan_.positions, kCopyPixels);
    const int64_t zero_items = plan_.grads_at_x ? ceiling(plan_.grad_x.pixels, kCopyPixels) : 0;
    const int64_t items = x_items + y_items + zero_items;
    return team_.run(items * images_, [&](int64_t item, int) {
      const int64_t slot = item / items;
      item %= items;
      if (item < x_items)
        plan_.for_each_block([&](const Block& block) {
          plan_.x.copy_in(first_image_ + slot, item, x_buffer(slot), block.first, block.count);
        });
      else if (item < x_items + y_items)
        copy_grad_output(slot, item - x_items);
      else
        clear_grad_x(slot, item - x_items - y_items);
    });
  }

  bool copy_out() {
    const int64_t items = plan_.grads_at_x ? plan_.grad_x.copy_items() : 0;
    return team_.run(items * images_, [&](int64_t item, int) {
      const int64_t slot = item / items;
      plan_.for_each_block([&](const Block& block) {
        plan_.grad_x.copy_out(first_image_ + slot, item % items, grad_x_buffer(slot), block.first,
                              block.count);
      });
    });
  }

 protected:
  using Buffers = BackwardBuffers<T, NDim>;
  using Thread = typename Buffers::PerThread;
  using PackedBlock = typename Buffers::PackedBlock;

  const Geometry& geometry() const { return plan_.geometry; }

  T* x_buffer(int64_t slot) const { return buffers_.x + slot * plan_.x.buffer_elements(); }
  T* grad_x_buffer(int64_t slot) const { return buffers_.grad_x + slot * plan_.grad_x_elements(); }

  Pixels<NDim> x_of(int64_t slot, const Block& block) const {
    return plan_.x.view(first_image_ + slot, x_buffer(slot), block.first, block.count);
  }
  Pixels<NDim> grad_x_of(int64_t slot, const Block& block) const {
    if (!plan_.grads_at_x) return x_of(slot, block);
    return plan_.grad_x.view(first_image_ + slot, grad_x_buffer(slot), block.first, block.count);
  }
  T* grad_output_of(int64_t slot) const {
    if (!plan_.grad_output_in_place) return buffers_.grad_output + slot * plan_.grad_output_elements();
    const Planes& grad_output = arguments_.grad_output;
    return reinterpret_cast<T*>(grad_output.data + (first_image_ + slot) * grad_output.batch);
  }
  Displacement<T, NDim> moved(int64_t slot, int64_t offset_group) const {
    return {arguments_.offset,   arguments_.mask, arguments_.positions,    plan_.taps,
            first_image_ + slot, offset_group,    geometry().offset_groups};
  }

  const BackwardArguments& arguments_;
  const BackwardPlan<T, NDim>& plan_;
  const Buffers& buffers_;
  Team& team_;
  int64_t first_image_ = 0, images_ = 0;

 private:
  void copy_grad_output(int64_t slot, int64_t item) {
    const Planes& from = arguments_.grad_output;
    const int64_t first = item * kCopyPixels, stride = plan_.grad_output_stride;
    const StoredMatrix<T> stored = {from.data + (first_image_ + slot) * from.batch + first * from.position,
                                    from.position, from.channel, arguments_.images};
    stored.copy_to(least(kCopyPixels, plan_.positions - first), geometry().out_channels,
                   {grad_output_of(slot) + first * stride, stride, 1});
  }

  void clear_grad_x(int64_t slot, int64_t item) {
    const int64_t first = item * kCopyPixels, end = least(first + kCopyPixels, plan_.grad_x.pixels);
    plan_.for_each_block([&](const Block& block) {
      clear_pixels<T>(grad_x_of(slot, block), geometry().input, first, end, block.count);
    });
  }
};

}  // namespace dcn::DCN_ISA
