// One allocation per call, made before any thread starts: out of memory is then an answer and never an abort.
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

// Lays out a `Buffers` (built from a Workspace&), runs body(buffers) on it and frees the memory.
template <class Buffers, class Plan, class Body>
Status with_workspace(const Plan& plan, const Body& body) {
  Workspace count;
  Buffers measured(plan, count);
  if (!count.possible()) return Status::kOutOfMemory;
  char* block = static_cast<char*>(allocate(count.used() + 64));
  if (!block) return Status::kOutOfMemory;
  Workspace space(block);
  Buffers buffers(plan, space);
  const bool finished = body(buffers);
  release(block);
  return finished ? Status::kOk : Status::kInterrupted;
}

}  // namespace DCN_NAMESPACE
