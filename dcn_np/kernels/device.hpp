// What the kernels ask of the processor: PTX on a GPU, so that no CUDA header is needed; an emulation on a CPU
// (DCN_EMULATION), where the tests run the same text.
//
// Asynchronous copies, matrix loads and products of tiles are there from compute capability 8.0 on; before, a
// copy is an ordinary one and the others do not exist.
#pragma once

#include "platform.hpp"

#ifdef DCN_EMULATION
#include "emulation.hpp"
#else

namespace dcn {

DCN_INLINE void barrier() { __syncthreads(); }
DCN_INLINE void warp_barrier() { __syncwarp(); }

// All threads of the warp take part.
template <class T>
DCN_INLINE T shuffle(T value, int lane) {
  return __shfl_sync(0xffffffffu, value, lane);
}
template <class T>
DCN_INLINE T shuffle_xor(T value, int lanes) {
  return __shfl_xor_sync(0xffffffffu, value, lanes);
}

// The block's dynamic shared memory, on a border of 128 bytes.
DCN_INLINE unsigned char* dynamic_shared() {
  extern __shared__ __align__(128) unsigned char dcn_dynamic_shared[];
  return dcn_dynamic_shared;
}

// ---- number formats; conversions round to nearest even

DCN_INLINE float float_of_bits(uint32_t bits) { return __uint_as_float(bits); }
DCN_INLINE uint32_t bits_of_float(float value) { return __float_as_uint(value); }

DCN_INLINE float float_of_f16(uint16_t bits) {
  float value;
  asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(bits));
  return value;
}
DCN_INLINE float float_of_bf16(uint16_t bits) { return float_of_bits(static_cast<uint32_t>(bits) << 16); }
DCN_INLINE uint16_t f16_of(float value) {
  uint16_t bits;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(bits) : "f"(value));
  return bits;
}
DCN_INLINE uint16_t bf16_of(float value) {
#if __CUDA_ARCH__ >= 900
  uint16_t bits;
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(bits) : "f"(value));
  return bits;
#else
  const uint32_t bits = bits_of_float(value);
  if (value != value) return static_cast<uint16_t>(bits >> 16 | 0x40);
  return static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
#endif
}
DCN_INLINE uint32_t f16x2_of(float low, float high) {
  return f16_of(low) | static_cast<uint32_t>(f16_of(high)) << 16;
}
DCN_INLINE uint32_t bf16x2_of(float low, float high) {
#if __CUDA_ARCH__ >= 800
  uint32_t bits;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(bits) : "f"(high), "f"(low));
  return bits;
#else
  return bf16_of(low) | static_cast<uint32_t>(bf16_of(high)) << 16;
#endif
}

// ---- memory

// Of memory that nothing writes while the kernel runs; T has 2, 4, 8 or 16 bytes.
template <class T>
DCN_INLINE T load_readonly(const T* from) {
  return __ldg(from);
}

// Adds without an order between threads; one thread's additions to one address keep theirs.
DCN_INLINE void add_in_memory(float* to, float value) {
  asm volatile("red.relaxed.gpu.global.add.f32 [%0], %1;" ::"l"(__cvta_generic_to_global(to)), "f"(value)
               : "memory");
}
DCN_INLINE void add_in_memory(double* to, double value) {
  asm volatile("red.relaxed.gpu.global.add.f64 [%0], %1;" ::"l"(__cvta_generic_to_global(to)), "d"(value)
               : "memory");
}
// `to` lies on a border of 16 bytes.
DCN_INLINE void add_in_memory4(float* to, float a, float b, float c, float d) {
#if __CUDA_ARCH__ >= 900
  asm volatile(
      "red.relaxed.gpu.global.add.v4.f32 [%0], {%1, %2, %3, %4};" ::"l"(__cvta_generic_to_global(to)), "f"(a),
      "f"(b), "f"(c), "f"(d)
      : "memory");
#else
  add_in_memory(to, a);
  add_in_memory(to + 1, b);
  add_in_memory(to + 2, c);
  add_in_memory(to + 3, d);
#endif
}

DCN_INLINE uint32_t shared_address(const void* generic) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(generic));
}

// Copies 16 bytes, or zeros where not `valid`. They are there after wait_for_copies() and, for other threads, a
// barrier.
DCN_INLINE void copy16_async(void* shared, const void* global, bool valid) {
#if __CUDA_ARCH__ >= 800
  const int bytes = valid ? 16 : 0;
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(shared)),
               "l"(__cvta_generic_to_global(global)), "r"(bytes)
               : "memory");
#else
  *static_cast<uint4*>(shared) = valid ? __ldg(static_cast<const uint4*>(global)) : uint4{0, 0, 0, 0};
#endif
}
// The copies since the last commit become one group.
DCN_INLINE void commit_copies() {
#if __CUDA_ARCH__ >= 800
  asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}
// Waits until at most `Pending` groups of this thread, the latest, are under way.
template <int Pending>
DCN_INLINE void wait_for_copies() {
#if __CUDA_ARCH__ >= 800
  asm volatile("cp.async.wait_group %0;" ::"n"(Pending) : "memory");
#endif
}

#if __CUDA_ARCH__ >= 800

// ---- tiles in a warp's registers, as the PTX ISA lays them out

DCN_INLINE uint32_t tf32_of(float value) {
  uint32_t bits;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(bits) : "f"(value));
  return bits;
}

// Four 8 x 8 matrices of 16-bit numbers. Thread 8 * m + r says where row r of matrix m lies, 16 bytes on a border
// of 16; thread t gets numbers 2 * (t % 4) and the next of row t / 4 of each.
DCN_INLINE void load_matrices(uint32_t (&r)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(row))
               : "memory");
}
// The same with rows and columns of each matrix exchanged.
DCN_INLINE void load_matrices_transposed(uint32_t (&r)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(row))
               : "memory");
}

// d += a b for tiles of 16 x 16 by 16 x 8, in float.
DCN_INLINE void multiply_add_f16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
DCN_INLINE void multiply_add_bf16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
// The same for 16 x 8 by 8 x 8.
DCN_INLINE void multiply_add_tf32(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

#endif  // 8.0 and newer

}  // namespace dcn

#endif  // DCN_EMULATION
