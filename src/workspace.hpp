// One allocation per call, made before any thread starts: out of memory is then an answer and never an abort. Prepared
// calls find it made.
#pragma once

#include "parallel.hpp"
#include "platform.hpp"

namespace DCN_NAMESPACE {

// Hands out parts of one block. Without a block it only counts: a plan is laid out twice, first to learn its
// size.
class Workspace {
 public:
  explicit Workspace(char* block = nullptr) : block_(block) {}

  template <class T>
  T* take(size_t count) {
    constexpr size_t kLine = 64;
    const size_t at = used_;
    size_t bytes;
    if (__builtin_mul_overflow(count, sizeof(T), &bytes) || bytes > kMost - kLine ||
        __builtin_add_overflow(used_, (bytes + kLine - 1) / kLine * kLine, &used_) || used_ > kMost)
      used_ = kMost;
    return block_ ? reinterpret_cast<T*>(block_ + at) : nullptr;
  }
  size_t used() const { return used_; }
  bool possible() const { return used_ < kMost; }

 private:
  static constexpr size_t kMost = SIZE_MAX / 4;
  char* block_;
  size_t used_ = 0;
};

// Takes a block that holds a `Buffers` (built from a Workspace&); null where there is no memory.
template <class Buffers, class Plan>
char* take_block(const Plan& plan) {
  Workspace count;
  Buffers measured(plan, count);
  return count.possible() ? static_cast<char*>(allocate(count.used() + 64)) : nullptr;
}

// Lays out a `Buffers` on a block of it and runs body(buffers).
template <class Buffers, class Plan, class Body>
Status on_block(const Plan& plan, void* block, const Body& body) {
  Workspace space(static_cast<char*>(block));
  Buffers buffers(plan, space);
  return body(buffers) ? Status::kOk : Status::kInterrupted;
}

// The same on a block of its own, which is freed.
template <class Buffers, class Plan, class Body>
Status with_workspace(const Plan& plan, const Body& body) {
  char* block = take_block<Buffers>(plan);
  if (!block) return Status::kOutOfMemory;
  const Status status = on_block<Buffers>(plan, block, body);
  release(block);
  return status;
}

}  // namespace DCN_NAMESPACE
