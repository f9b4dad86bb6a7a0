// Kernels that are right without FAULT, each wrong in one way with it; and one kernel for each thing that
// device.hpp offers. All work on one block: `x` in, `between` out.
#include "arguments.hpp"
#include "scalar.hpp"

#ifdef FAULT
#define UNLESS_FAULT(statement)
#else
#define UNLESS_FAULT(statement) statement
#endif

namespace dcn {

constexpr int kThreads = 64;

// Each thread reads what another one wrote.
extern "C" __global__ void missing_barrier(const Arguments a) {
  __shared__ float values[kThreads];
  const int thread = threadIdx.x;
  values[thread] = reinterpret_cast<const float*>(a.x.data)[thread];
  UNLESS_FAULT(barrier();)
  static_cast<float*>(a.between)[thread] = values[kThreads - 1 - thread];
}

// The second value may not come before the first was read.
extern "C" __global__ void reused_buffer(const Arguments a) {
  __shared__ float values[kThreads];
  const float* from = reinterpret_cast<const float*>(a.x.data);
  const int thread = threadIdx.x;
  float sum = 0;
  for (int i = 0; i < 2; ++i) {
    values[thread] = from[thread] * (i + 1);
    barrier();
    sum += values[(thread + 1) % kThreads];
    UNLESS_FAULT(barrier();)
  }
  static_cast<float*>(a.between)[thread] = sum;
}

extern "C" __global__ void uninitialised(const Arguments a) {
  float* values = reinterpret_cast<float*>(dynamic_shared());
  UNLESS_FAULT(values[threadIdx.x] = 1;)
  static_cast<float*>(a.between)[threadIdx.x] = values[threadIdx.x];
}

extern "C" __global__ void missing_wait(const Arguments a) {
  float4* values = reinterpret_cast<float4*>(dynamic_shared());
  copy16_async(&values[threadIdx.x], reinterpret_cast<const float4*>(a.x.data) + threadIdx.x, true);
  commit_copies();
  UNLESS_FAULT(wait_for_copies<0>();)
  barrier();
  static_cast<float*>(a.between)[threadIdx.x] = values[kThreads - 1 - threadIdx.x].x;
}

// Two groups are under way; the first is needed.
extern "C" __global__ void short_wait(const Arguments a) {
  float4* values = reinterpret_cast<float4*>(dynamic_shared());
  const float4* from = reinterpret_cast<const float4*>(a.x.data);
  for (int i = 0; i < 2; ++i) {
    copy16_async(&values[i * kThreads + threadIdx.x], from + threadIdx.x, i == 0);
    commit_copies();
  }
#ifdef FAULT
  wait_for_copies<2>();
#else
  wait_for_copies<1>();
#endif
  static_cast<float*>(a.between)[threadIdx.x] = values[threadIdx.x].x;
}

extern "C" __global__ void divergent_barrier(const Arguments a) {
#ifdef FAULT
  if (threadIdx.x == 0)
    warp_barrier();
  else
    barrier();
#else
  barrier();
#endif
  static_cast<float*>(a.between)[threadIdx.x] = 1;
}

// Without an owner for each sum its value depends on who comes first.
extern "C" __global__ void unordered_sum(const Arguments a) {
  const float* from = reinterpret_cast<const float*>(a.x.data);
#ifdef FAULT
  add_in_memory(static_cast<float*>(a.between), from[threadIdx.x]);
#else
  if (threadIdx.x == 0)
    for (int i = 0; i < kThreads; ++i) static_cast<float*>(a.between)[0] += from[i];
#endif
}

extern "C" __global__ void shared_out_of_bounds(const Arguments a) {
  volatile float* values = reinterpret_cast<float*>(dynamic_shared());
  values[threadIdx.x] = 1;
  UNLESS_FAULT(if (threadIdx.x + 1 < kThreads))
  static_cast<float*>(a.between)[threadIdx.x] = values[threadIdx.x + 1];
}

extern "C" __global__ void global_out_of_bounds(const Arguments a) {
  const volatile float* from = reinterpret_cast<const float*>(a.x.data);
  UNLESS_FAULT(if (threadIdx.x + 1 < kThreads))
  static_cast<float*>(a.between)[threadIdx.x] = from[threadIdx.x + 1];
}

#ifndef FAULT
constexpr int kRow = 8;  // 16-bit numbers in a row of a matrix
#else
constexpr int kRow = 16;
#endif

// Four matrices, one after the other, 8 rows of 16 bytes each; with the fault every second row is another's.
extern "C" __global__ void matrices(const Arguments a) {
  uint16_t* rows = reinterpret_cast<uint16_t*>(dynamic_shared());
  const int lane = threadIdx.x;
  for (int i = 0; i < 8; ++i) rows[lane * 8 + i] = reinterpret_cast<const uint16_t*>(a.x.data)[lane * 8 + i];
  warp_barrier();
  uint32_t r[4];
  load_matrices(r, rows + lane * kRow % 256);
  for (int i = 0; i < 4; ++i) static_cast<uint32_t*>(a.between)[lane * 8 + i] = r[i];
  load_matrices_transposed(r, rows + lane * kRow % 256);
  for (int i = 0; i < 4; ++i) static_cast<uint32_t*>(a.between)[lane * 8 + 4 + i] = r[i];
}

// x: the registers of a (4 x 32 lanes), of b (2 x 32), `between`: those of d, float.
template <class Multiply>
DCN_INLINE void product(const Arguments& a, const Multiply& multiply) {
  const uint32_t* from = reinterpret_cast<const uint32_t*>(a.x.data);
  const int lane = threadIdx.x;
  const uint32_t left[4] = {from[lane], from[32 + lane], from[64 + lane], from[96 + lane]};
  float d[4] = {};
  multiply(d, left, from[128 + lane], from[160 + lane]);
  for (int i = 0; i < 4; ++i) static_cast<float*>(a.between)[32 * i + lane] = d[i];
}
extern "C" __global__ void product_f16(const Arguments a) {
  product(a, [](auto& d, const auto& l, uint32_t b0, uint32_t b1) { multiply_add_f16(d, l, b0, b1); });
}
extern "C" __global__ void product_bf16(const Arguments a) {
  product(a, [](auto& d, const auto& l, uint32_t b0, uint32_t b1) { multiply_add_bf16(d, l, b0, b1); });
}
extern "C" __global__ void product_tf32(const Arguments a) {
  product(a, [](auto& d, const auto& l, uint32_t b0, uint32_t b1) { multiply_add_tf32(d, l, b0, b1); });
}

extern "C" __global__ void shuffles(const Arguments a) {
  const double value = reinterpret_cast<const double*>(a.x.data)[threadIdx.x];
  static_cast<double*>(a.between)[threadIdx.x] = shuffle(value, 5);
  static_cast<double*>(a.between)[32 + threadIdx.x] = shuffle_xor(value, 6);
}

// count numbers: x as float to 16 bits, 16 bits to float, and tf32.
extern "C" __global__ void conversions(const Arguments a) {
  for (int64_t i = threadIdx.x; i < a.count; i += 32) {
    const float value = reinterpret_cast<const float*>(a.x.data)[i];
    uint32_t* to = static_cast<uint32_t*>(a.between) + 3 * i;
    to[0] = f16x2_of(value, float_of_f16(f16_of(value)));
    to[1] = bf16x2_of(value, float_of_bf16(bf16_of(value)));
    to[2] = tf32_of(value);
  }
}

}  // namespace dcn
