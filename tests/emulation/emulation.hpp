// Runs the text of a GPU kernel on one CPU thread: what device.hpp has on a GPU, and the words of CUDA.
//
// Each thread of a block is a fiber. Barriers and what a warp does together switch fibers, in an order that the
// test chooses: a result that changes with it shows a missing barrier. Shared memory is poisoned with NaN before
// each block, and an asynchronous copy lands only at its wait, so that what is read too early shows as well.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <random>
#include <vector>

#ifndef __x86_64__
#include <ucontext.h>
#endif
#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#endif

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
// One section, so that all of it can be poisoned.
#define __shared__ static __attribute__((section("dcn_shared")))

struct alignas(8) uint2 {
  unsigned x, y;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
struct alignas(8) float2 {
  float x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
inline float2 make_float2(float x, float y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
inline uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }

extern "C" {
extern unsigned char __start_dcn_shared[] __attribute__((weak));
extern unsigned char __stop_dcn_shared[] __attribute__((weak));
}

namespace dcn::emulation {

constexpr unsigned kWarp = 32;
constexpr size_t kStack = 128 * 1024;

struct Index {
  unsigned x = 1, y = 1, z = 1;
  unsigned count() const { return x * y * z; }
  Index at(unsigned number) const { return {number % x, number / x % y, number / x / y}; }
};

// What the threads of a warp give each other. There are two: who is ahead already writes into the other.
struct Exchange {
  unsigned char value[kWarp][16];
  float a[16][16], b[16][8];
};

struct Warp {
  unsigned arrived = 0, generation = 0, alive = 0;
  Exchange exchanges[2];
};

struct PendingCopy {
  void* to;
  const void* from;
  bool valid;
  int group;
};

struct Fiber {
  Index index;
  unsigned lane = 0;
  Warp* warp = nullptr;
  bool done = false;
  int groups = 0;
  std::vector<PendingCopy> copies;
#ifdef __x86_64__
  void* stack_pointer = nullptr;
#else
  ucontext_t context;
#endif
};

struct Block {
  Index index, threads, grid;
  unsigned arrived = 0, generation = 0, alive = 0;
  unsigned long progress = 0;  // counts arrivals and ends: a round of all fibers without one is a deadlock
};

inline Fiber* current;
inline Block block;
inline unsigned char* dynamic_memory;
inline void (*run_kernel)();

// ---- fibers

#ifdef __x86_64__
inline void* scheduler_stack_pointer;
extern "C" void dcn_switch(void** save, void* to);
asm(".pushsection .text\n"
    ".weak dcn_switch\n"
    ".type dcn_switch, @function\n"
    "dcn_switch:\n"
    "  pushq %rbp\n  pushq %rbx\n  pushq %r12\n  pushq %r13\n  pushq %r14\n  pushq %r15\n"
    "  movq %rsp, (%rdi)\n  movq %rsi, %rsp\n"
    "  popq %r15\n  popq %r14\n  popq %r13\n  popq %r12\n  popq %rbx\n  popq %rbp\n  ret\n"
    ".size dcn_switch, .-dcn_switch\n"
    ".popsection\n");
inline void yield() { dcn_switch(&current->stack_pointer, scheduler_stack_pointer); }
inline void resume(Fiber& fiber) { dcn_switch(&scheduler_stack_pointer, fiber.stack_pointer); }
#else
inline ucontext_t scheduler_context;
inline void yield() { swapcontext(&current->context, &scheduler_context); }
inline void resume(Fiber& fiber) { swapcontext(&scheduler_context, &fiber.context); }
#endif

inline void fiber_main() {
  run_kernel();
  current->done = true;
  --block.alive;
  --current->warp->alive;
  ++block.progress;
  for (;;) yield();
}

inline void prepare(Fiber& fiber, unsigned char* stack) {
#ifdef __x86_64__
  void** top = reinterpret_cast<void**>(reinterpret_cast<uintptr_t>(stack + kStack) & ~uintptr_t(15));
  *--top = nullptr;
  *--top = reinterpret_cast<void*>(&fiber_main);
  for (int i = 0; i < 6; ++i) *--top = nullptr;
  fiber.stack_pointer = top;
#else
  getcontext(&fiber.context);
  fiber.context.uc_stack.ss_sp = stack;
  fiber.context.uc_stack.ss_size = kStack;
  fiber.context.uc_link = nullptr;
  makecontext(&fiber.context, &fiber_main, 0);
#endif
}

inline void wait_at(unsigned& arrived, unsigned& generation, const unsigned& expected) {
  const unsigned now = generation;
  ++block.progress;
  if (++arrived == expected) {
    arrived = 0;
    ++generation;
    return;
  }
  while (generation == now) yield();
}

inline void warp_barrier() {
  wait_at(current->warp->arrived, current->warp->generation, current->warp->alive);
}

// Returns what all threads of the warp gave; it holds until this thread's next exchange but one.
template <class Give>
inline Exchange& exchange(const Give& give) {
  Exchange& shared = current->warp->exchanges[current->warp->generation & 1];
  give(shared);
  warp_barrier();
  return shared;
}

// Runs a grid. order: 0 forward, 1 backward, else the seed of a random order of blocks and of threads, a new one
// at every turn. Returns 0, or 1 with a message.
inline int launch(Index grid, Index threads, size_t shared_bytes, unsigned order, char* message,
                  size_t size) {
  static std::vector<Fiber> fibers;
  static std::vector<Warp> warps;
  static std::unique_ptr<unsigned char[]> stacks;
  static size_t stack_count = 0;
  const unsigned count = threads.count();
  if (fibers.size() < count) fibers.resize(count), warps.resize((count + kWarp - 1) / kWarp);
  if (stack_count < count) stacks.reset(new unsigned char[kStack * count]), stack_count = count;

  // Exactly so many bytes: AddressSanitizer knows where they end.
  void* memory = nullptr;
  if (posix_memalign(&memory, 128, shared_bytes ? shared_bytes : 1)) return 1;
  const std::unique_ptr<void, void (*)(void*)> owner(memory, &std::free);
  dynamic_memory = static_cast<unsigned char*>(memory);

  std::mt19937 random(order);
  std::vector<unsigned> turn(count), blocks(grid.count());
  for (unsigned i = 0; i < blocks.size(); ++i) blocks[i] = order == 1 ? blocks.size() - 1 - i : i;
  if (order > 1) std::shuffle(blocks.begin(), blocks.end(), random);

  for (const unsigned number : blocks) {
    block = Block{};
    block.index = grid.at(number), block.threads = threads, block.grid = grid, block.alive = count;
    if (__start_dcn_shared) std::memset(__start_dcn_shared, 0xff, __stop_dcn_shared - __start_dcn_shared);
    std::memset(dynamic_memory, 0xff, shared_bytes);
#if defined(__SANITIZE_ADDRESS__)
    __asan_unpoison_memory_region(stacks.get(), kStack * count);
#endif
    for (unsigned i = 0; i < count; i += kWarp) {
      Warp& warp = warps[i / kWarp];
      warp.arrived = warp.generation = 0;
      warp.alive = std::min(kWarp, count - i);
    }
    for (unsigned i = 0; i < count; ++i) {
      turn[i] = order == 1 ? count - 1 - i : i;
      Fiber& fiber = fibers[i];
      fiber.index = threads.at(i), fiber.lane = i % kWarp, fiber.warp = &warps[i / kWarp];
      fiber.done = false, fiber.groups = 0;
      fiber.copies.clear();
      prepare(fiber, stacks.get() + kStack * i);
    }
    while (block.alive) {
      const unsigned long before = block.progress;
      if (order > 1) std::shuffle(turn.begin(), turn.end(), random);
      for (const unsigned i : turn) {
        if (fibers[i].done) continue;
        current = &fibers[i];
        resume(fibers[i]);
      }
      if (before == block.progress) {
        std::snprintf(message, size,
                      "block %u of %u: %u of %u threads wait at a barrier that the others do not reach",
                      number, grid.count(), block.alive, count);
        return 1;
      }
    }
    if (block.arrived) {
      std::snprintf(message, size, "block %u of %u: threads ended while others waited at a barrier", number,
                    grid.count());
      return 1;
    }
  }
  return 0;
}

}  // namespace dcn::emulation

#define threadIdx (::dcn::emulation::current->index)
#define blockIdx (::dcn::emulation::block.index)
#define blockDim (::dcn::emulation::block.threads)
#define gridDim (::dcn::emulation::block.grid)

namespace dcn {

inline float float_of_bits(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}
inline uint32_t bits_of_float(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
}

inline void barrier() {
  emulation::wait_at(emulation::block.arrived, emulation::block.generation, emulation::block.alive);
}
inline void warp_barrier() { emulation::warp_barrier(); }

template <class T>
inline T shuffle(T value, int lane) {
  static_assert(sizeof(T) <= 16);
  const auto& shared = emulation::exchange([&](emulation::Exchange& to) {
    std::memcpy(to.value[emulation::current->lane], &value, sizeof value);
  });
  std::memcpy(&value, shared.value[lane & 31], sizeof value);
  return value;
}
template <class T>
inline T shuffle_xor(T value, int lanes) {
  return shuffle(value, static_cast<int>(emulation::current->lane) ^ lanes);
}

inline unsigned char* dynamic_shared() { return emulation::dynamic_memory; }

inline float float_of_f16(uint16_t bits) {
  _Float16 value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}
inline float float_of_bf16(uint16_t bits) { return float_of_bits(static_cast<uint32_t>(bits) << 16); }
inline uint16_t f16_of(float value) {
  const _Float16 half = static_cast<_Float16>(value);
  uint16_t bits;
  std::memcpy(&bits, &half, sizeof bits);
  return bits;
}
inline uint16_t bf16_of(float value) {
  const uint32_t bits = bits_of_float(value);
  if (value != value) return static_cast<uint16_t>(bits >> 16 | 0x40);
  return static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}
inline uint32_t f16x2_of(float low, float high) {
  return f16_of(low) | static_cast<uint32_t>(f16_of(high)) << 16;
}
inline uint32_t bf16x2_of(float low, float high) {
  return bf16_of(low) | static_cast<uint32_t>(bf16_of(high)) << 16;
}
// To nearest, ties away from zero: 10 bits of the fraction are left.
inline uint32_t tf32_of(float value) {
  const uint32_t bits = bits_of_float(value);
  if ((bits & 0x7f800000) == 0x7f800000) return bits & 0x7fffff ? 0x7fffffff : bits;
  return (bits + 0x1000) & ~uint32_t(0x1fff);
}

template <class T>
inline T load_readonly(const T* from) {
  return *from;
}
inline void add_in_memory(float* to, float value) { *to += value; }
inline void add_in_memory(double* to, double value) { *to += value; }
inline void add_in_memory4(float* to, float a, float b, float c, float d) {
  to[0] += a, to[1] += b, to[2] += c, to[3] += d;
}

inline void copy16_async(void* shared, const void* global, bool valid) {
  emulation::current->copies.push_back({shared, global, valid, emulation::current->groups});
}
inline void commit_copies() { ++emulation::current->groups; }
template <int Pending>
inline void wait_for_copies() {
  emulation::Fiber& fiber = *emulation::current;
  size_t kept = 0;
  for (const auto& copy : fiber.copies) {
    if (copy.group >= fiber.groups - Pending) {
      fiber.copies[kept++] = copy;
    } else if (copy.valid) {
      std::memcpy(copy.to, copy.from, 16);
    } else {
      std::memset(copy.to, 0, 16);
    }
  }
  fiber.copies.resize(kept);
}

namespace emulation {
inline Exchange& exchange_rows(const void* row) {
  return exchange([&](Exchange& to) { std::memcpy(to.value[current->lane], row, 16); });
}
}  // namespace emulation

inline void load_matrices(uint32_t (&r)[4], const void* row) {
  const auto& rows = emulation::exchange_rows(row);
  const unsigned lane = emulation::current->lane;
  for (unsigned m = 0; m < 4; ++m) std::memcpy(&r[m], rows.value[8 * m + lane / 4] + 4 * (lane % 4), 4);
}
inline void load_matrices_transposed(uint32_t (&r)[4], const void* row) {
  const auto& rows = emulation::exchange_rows(row);
  const unsigned lane = emulation::current->lane;
  for (unsigned m = 0; m < 4; ++m)
    for (unsigned i = 0; i < 2; ++i)
      std::memcpy(reinterpret_cast<char*>(&r[m]) + 2 * i,
                  rows.value[8 * m + 2 * (lane % 4) + i] + 2 * (lane / 4), 2);
}

namespace emulation {
// d += a b, a of 16 x K, b of K x 8; `count` numbers of `a` and of `b` lie in one register.
template <int K, class Decode>
inline void multiply_add(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2],
                         const Decode& decode) {
  constexpr unsigned packed = K / 8;
  const unsigned row = current->lane / 4, column = current->lane % 4;
  const Exchange& shared = exchange([&](Exchange& to) {
    for (unsigned r = 0; r < 4; ++r)
      for (unsigned i = 0; i < packed; ++i)
        to.a[row + r % 2 * 8][column * packed + i + r / 2 * (K / 2)] = decode(a[r], i);
    for (unsigned r = 0; r < 2; ++r)
      for (unsigned i = 0; i < packed; ++i) to.b[column * packed + i + r * (K / 2)][row] = decode(b[r], i);
  });
  for (unsigned i = 0; i < 4; ++i) {
    float sum = 0;
    for (unsigned k = 0; k < K; ++k) sum += shared.a[row + i / 2 * 8][k] * shared.b[k][column * 2 + i % 2];
    d[i] += sum;
  }
}
}  // namespace emulation

inline void multiply_add_f16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  emulation::multiply_add<16>(d, a, {b0, b1}, [](uint32_t two, unsigned i) {
    return float_of_f16(static_cast<uint16_t>(two >> 16 * i));
  });
}
inline void multiply_add_bf16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  emulation::multiply_add<16>(d, a, {b0, b1}, [](uint32_t two, unsigned i) {
    return float_of_bf16(static_cast<uint16_t>(two >> 16 * i));
  });
}
// The hardware reads the upper 19 bits only.
inline void multiply_add_tf32(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  emulation::multiply_add<8>(d, a, {b0, b1},
                             [](uint32_t bits, unsigned) { return float_of_bits(bits & ~uint32_t(0x1fff)); });
}

}  // namespace dcn
