// One allocation per call, made before any thread starts: out of memory is then an answer and never an abort. Prepared
// calls find it made, large ones often that of the call before.
#pragma once

#include "memory.hpp"
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

// A block that holds a `Buffers` (built from a Workspace&), from allocate() or borrow(); null where there is no memory.
template <class Buffers, class Plan>
void* take_block(const Plan& plan, void* (*take)(size_t bytes) = allocate) {
  Workspace count;
  Buffers measured(plan, count);
  return count.possible() ? take(count.used() + 64) : nullptr;
}

// Lays out a `Buffers` on a block of it and runs body(buffers).
template <class Buffers, class Plan, class Body>
Status on_block(const Plan& plan, void* block, const Body& body) {
  Workspace space(static_cast<char*>(block));
  Buffers buffers(plan, space);
  return body(buffers) ? Status::kOk : Status::kInterrupted;
}

// The same on a block for this call alone.
template <class Buffers, class Plan, class Body>
Status with_workspace(const Plan& plan, const Body& body) {
  void* block = take_block<Buffers>(plan, borrow);
  if (!block) return Status::kOutOfMemory;
  const Status status = on_block<Buffers>(plan, block, body);
  give_back(block);
  return status;
}

}  // namespace DCN_NAMESPACE
