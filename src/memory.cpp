// Compiled for the baseline, so it may use the standard library.
#include "memory.hpp"

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include <atomic>
#include <cstdint>
#include <cstdlib>

namespace dcn {

namespace {

constexpr size_t kHugePage = 2 << 20;

struct Header {  // before every block
  char* given;
  size_t given_bytes;
  size_t bytes;

  bool large() const { return bytes >= kHugePage; }
};

Header& header_of(void* block) { return static_cast<Header*>(block)[-1]; }

// Large blocks that were given back wait for the next call: the system clears every page of a new one, which took up to
// a tenth of the time of a call. There are as many as there were calls at a time.
#if defined(__SANITIZE_ADDRESS__)
constexpr size_t kMostKept = 0;  // so that it sees who reads and writes behind what was asked for
#else
constexpr size_t kMostKept = 64 << 20;
#endif
std::atomic<size_t> kept_bytes{0};
std::atomic<void*> kept[8]{};

// Large blocks come from the system and not from the heap, where one that was kept would leave a hole when it is freed.
#if defined(MADV_HUGEPAGE)
char* map(size_t bytes) {
  void* given = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  return given == MAP_FAILED ? nullptr : static_cast<char*>(given);
}
void unmap(char* given, size_t bytes) { munmap(given, bytes); }
// A fault per 2 MB, and fewer misses of the page tables when corners are gathered from all over an image.
void use_huge_pages(char* block, size_t bytes) { madvise(block, bytes, MADV_HUGEPAGE); }
#else
char* map(size_t bytes) { return static_cast<char*>(std::malloc(bytes)); }
void unmap(char* given, size_t) { std::free(given); }
void use_huge_pages(char*, size_t) {}
#endif

}  // namespace

void* allocate(size_t bytes) {
  const bool large = bytes >= kHugePage;
  const size_t alignment = large ? kHugePage : 64;
  if (bytes > SIZE_MAX - 3 * alignment) return nullptr;
  const size_t whole = (bytes + alignment - 1) / alignment * alignment;
  const size_t given_bytes = whole + alignment + sizeof(Header);
  // Not aligned_alloc: where glibc is older than 2.38 it finds no use for the block that the last call freed, and
  // the heap of a small process grew by megabytes.
  char* given = large ? map(given_bytes) : static_cast<char*>(std::malloc(given_bytes));
  if (!given) return nullptr;
  char* first = given + sizeof(Header);
  char* block = first + (alignment - reinterpret_cast<uintptr_t>(first) % alignment) % alignment;
  header_of(block) = {given, given_bytes, bytes};
  if (large) use_huge_pages(block, whole);
  return block;
}

void release(void* block) {
  if (!block) return;
  const Header header = header_of(block);
  if (header.large())
    unmap(header.given, header.given_bytes);
  else
    std::free(header.given);
}

void* borrow(size_t bytes) {
  if (bytes < kHugePage) return allocate(bytes);
  for (std::atomic<void*>& place : kept)
    if (void* block = place.exchange(nullptr)) {
      kept_bytes.fetch_sub(header_of(block).bytes);
      if (header_of(block).bytes >= bytes) return block;
      release(block);
    }
  return allocate(bytes);
}

void give_back(void* block) {
  const Header& header = header_of(block);
  if (header.large()) {
    const size_t bytes = header.bytes;
    if (kept_bytes.fetch_add(bytes) + bytes <= kMostKept)
      for (std::atomic<void*>& place : kept) {
        void* none = nullptr;
        if (place.compare_exchange_strong(none, block)) return;
      }
    kept_bytes.fetch_sub(bytes);
  }
  release(block);
}

}  // namespace dcn
