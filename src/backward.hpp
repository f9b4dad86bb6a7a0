// The backward pass: the forward's three steps walked back, without atomics.
//
// Input channels are cut into blocks; a block belongs to one thread at a time, so its part of grad_x needs no
// synchronisation and is summed in a fixed order. Per image:
//
//     positions   per block   grad_columns = grad_output x weights, tap by tap and tile by tile; from them
//                             the dots of the corners, and grad_x
//     combine     per tile    the dots of all blocks, in order -> grad_offset, grad_mask
//     weights     per block   the columns again x grad_output -> grad_weight
//
// The dots of all blocks are kept for a strip of positions at a time. Gathering the columns a second time
// costs a few percent and lets grad_weight be shared among threads by tap as well.
#pragma once

#include "backward_positions.hpp"
#include "backward_weights.hpp"

namespace dcn::DCN_ISA {

template <class T, int NDim>
bool pack_blocks(const BackwardPlan<T, NDim>& plan, const BackwardBuffers<T, NDim>& buffers, Team& team) {
  const T* weight = static_cast<const T*>(plan.arguments.weight);
  return team.run(plan.blocks, [&](int64_t item, int) {
    const auto& block = buffers.blocks[item];
    const size_t bytes = plan.packed_elements(block) * sizeof(T);
    if (plan.grads_at_x || plan.grads_at_positions) {
      __builtin_memset(block.weights, 0, bytes);
      plan.for_each_weight_matrix(
          block, [&](int64_t channels, int64_t taps, int64_t from, int64_t to, int64_t stride) {
            transpose_matrix<T>(channels, taps, weight + from, plan.taps, block.weights + to, stride);
          });
    }
    if (plan.grads_at_weight) __builtin_memset(block.grad_weight, 0, bytes);
  });
}

template <class T, int NDim>
bool unpack_blocks(const BackwardPlan<T, NDim>& plan, const BackwardBuffers<T, NDim>& buffers, Team& team) {
  if (!plan.grads_at_weight) return true;
  T* grad_weight = static_cast<T*>(plan.arguments.grad_weight);
  return team.run(plan.blocks, [&](int64_t item, int) {
    const auto& block = buffers.blocks[item];
    plan.for_each_weight_matrix(
        block, [&](int64_t channels, int64_t taps, int64_t to, int64_t from, int64_t stride) {
          transpose_matrix<T>(taps, channels, block.grad_weight + from, stride, grad_weight + to, plan.taps);
        });
  });
}

template <class T, int NDim>
bool run_backward(const BackwardPlan<T, NDim>& plan, const BackwardBuffers<T, NDim>& buffers, Team& team) {
  const Geometry& geometry = plan.geometry;
  if (!pack_blocks(plan, buffers, team)) return false;
  if (plan.arguments.grad_bias)
    __builtin_memset(plan.arguments.grad_bias, 0, geometry.out_channels * sizeof(T));
  BackwardRound<T, NDim> copies(plan, buffers, team);
  PositionPass<T, NDim> positions(plan, buffers, team);
  WeightPass<T, NDim> weights(plan, buffers, team);
  for (int64_t first = 0; first < geometry.batch; first += plan.round_images) {
    const int64_t images = least(plan.round_images, geometry.batch - first);
    copies.start(first, images);
    positions.start(first, images);
    weights.start(first, images);
    if (!copies.copy_in() || !positions.run() || !weights.run() || !copies.copy_out()) return false;
  }
  return unpack_blocks(plan, buffers, team);
}

template <class T, int NDim>
Status backward(const BackwardArguments& arguments, Team& team) {
  const BackwardPlan<T, NDim> plan(arguments, team.threads());
  return with_workspace<BackwardBuffers<T, NDim>>(
      plan, [&](const BackwardBuffers<T, NDim>& buffers) { return run_backward(plan, buffers, team); });
}

}  // namespace dcn::DCN_ISA
