// Compiled for the baseline, so it may use the standard library.
#include "parallel.hpp"

#if defined(__linux__)
#include <sched.h>
#endif

#include <algorithm>
#include <atomic>
#include <chrono>
#include <climits>
#include <cstdlib>
#include <new>
#include <system_error>
#include <thread>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace dcn {

using Clock = std::chrono::steady_clock;

namespace {

// A pending Ctrl-C is noticed after this long, plus one step of an item.
constexpr auto kPollInterval = std::chrono::milliseconds(20);

std::atomic<const Runtime*> runtime{nullptr};
std::atomic<bool> serial{false};
std::atomic<int> process_limit{INT_MAX};
std::atomic<int> active_teams{0};

enum Mark : unsigned char { kUntouched, kClaimed, kDone };  // of what one item does for several

void pause_briefly(int spins) {
  if (spins > 4096) {
    std::this_thread::sleep_for(std::chrono::microseconds(50));
    return;
  }
#if defined(__x86_64__)
  _mm_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

// libgomp ends the process when it cannot create a thread or has no memory for its own records. So before a
// team of this thread grows, as many plain threads are started and joined: where that fails, the team is as
// large as it went. Every calling thread has an OpenMP pool of its own, hence thread_local.
thread_local int proven_threads = 1;

bool some_memory() {
  void* probe = std::malloc(1 << 20);
  std::free(probe);
  return probe != nullptr;
}

int startable_threads(int wanted) {
  if (wanted <= proven_threads) return wanted;
  if (!some_memory()) return 1;
  constexpr int kMost = 256;
  std::thread probes[kMost];
  int started = 0;
  const int missing = wanted - 1 < kMost ? wanted - 1 : kMost;
  try {
    for (; started < missing; ++started) probes[started] = std::thread([] {});
  } catch (const std::system_error&) {
  } catch (const std::bad_alloc&) {
  }
  for (int i = 0; i < started; ++i) probes[i].join();
  return started + 1;
}

}  // namespace

struct Team::Shared {
  struct alignas(64) Share {
    std::atomic<int64_t> next;
    int64_t end;
  };
  Share shares[kShares];
  int share_count = 0;
  alignas(64) std::atomic<int> working{0};
  alignas(64) std::atomic<bool> stop{false};
  alignas(64) Interrupt interrupt;
  Clock::time_point next_poll;

  void share(int64_t items, int count) {
    const auto first = [=](int64_t i) { return items / count * i + std::min(i, items % count); };
    for (int i = 0; i < count; ++i) {
      shares[i].next.store(first(i), std::memory_order_relaxed);
      shares[i].end = first(i + 1);
    }
    share_count = count;
  }

  // False once interrupted; only the calling thread asks, and after a yes never again.
  bool poll() {
    if (stop.load(std::memory_order_relaxed)) return false;
    const auto now = Clock::now();
    if (now < next_poll) return true;
    next_poll = now + kPollInterval;
    if (!interrupt.pending || !interrupt.pending(interrupt.context)) return true;
    stop.store(true, std::memory_order_relaxed);
    return false;
  }
};

Team::Team(int threads, Interrupt interrupt) {
  static_assert(sizeof(Shared) <= sizeof(storage_) && alignof(Shared) <= 64, "Team::storage_ is too small");
  shared_ = new (storage_) Shared;
  shared_->interrupt = interrupt;
  shared_->next_poll = Clock::now() + kPollInterval;
  // Callers on several threads share the cores instead of each starting a full team.
  const int active = active_teams.fetch_add(1) + 1;
  threads_ = serial.load() || !has_runtime() || threads / active < 1 ? 1 : threads / active;
}

Team::~Team() {
  active_teams.fetch_sub(1);
  shared_->~Shared();
}

bool Team::claim(unsigned char& mark) {
  unsigned char seen = kUntouched;
  return __atomic_load_n(&mark, __ATOMIC_RELAXED) == kUntouched &&
         __atomic_compare_exchange_n(&mark, &seen, kClaimed, false, __ATOMIC_RELAXED, __ATOMIC_RELAXED);
}

void Team::finish(unsigned char& mark) { __atomic_store_n(&mark, kDone, __ATOMIC_RELEASE); }

void Team::wait_for(const unsigned char& mark) {
  for (int spins = 0; __atomic_load_n(&mark, __ATOMIC_ACQUIRE) != kDone; ++spins) pause_briefly(spins);
}

bool Team::keep_going(int thread) {
  return thread == 0 ? shared_->poll() : !shared_->stop.load(std::memory_order_relaxed);
}

void Team::work(Item body, const void* context, int thread) {
  for (int i = 0; i < shared_->share_count; ++i) {
    Shared::Share& share = shared_->shares[(thread + i) % shared_->share_count];
    while (true) {
      if (!keep_going(thread)) return;
      const int64_t item = share.next.fetch_add(1, std::memory_order_relaxed);
      if (item >= share.end) break;
      body(context, item, thread);
    }
  }
}

bool Team::run(int64_t items, Item body, const void* context) {
  // The whole team, also for fewer items: OpenMP ends the threads that a smaller team does not need.
  const int wanted = items > 1 && threads_ > 1 ? startable_threads(threads_) : 1;
  shared_->share(items, std::min(wanted, kShares));
  if (wanted == 1) {
    work(body, context, 0);
    return !shared_->stop.load(std::memory_order_relaxed);
  }
  shared_->working.store(wanted, std::memory_order_relaxed);
  auto member = [&](int thread, int threads) {
    work(body, context, thread);
    if (thread != 0) {
      shared_->working.fetch_sub(1, std::memory_order_release);
      return;
    }
    // The calling thread keeps polling: waiting for the runtime it could not see a Ctrl-C.
    const int others = wanted - threads + 1;
    for (int spins = 0; shared_->working.load(std::memory_order_acquire) > others; ++spins) {
      pause_briefly(spins);
      if (spins % 64 == 0) shared_->poll();
    }
  };
  using Member = decltype(member);
  runtime.load()->run(
      wanted,
      [](void* context, int thread, int threads) { (*static_cast<Member*>(context))(thread, threads); },
      &member);
  proven_threads = wanted;
  return !shared_->stop.load(std::memory_order_relaxed);
}

void set_runtime(const Runtime* given) { runtime.store(given); }

bool has_runtime() { return runtime.load() != nullptr; }

int hardware_threads() {
  int threads = has_runtime() ? runtime.load()->threads() : 1;
#if defined(__linux__)
  cpu_set_t allowed;
  if (sched_getaffinity(0, sizeof allowed, &allowed) == 0 && CPU_COUNT(&allowed) < threads)
    threads = CPU_COUNT(&allowed);
#endif
  return threads > 1 ? threads : 1;
}

int process_threads() {
  const int limit = process_limit.load(), threads = hardware_threads();
  return limit < threads ? limit : threads;
}

void set_process_threads(int limit) { process_limit.store(limit); }

void run_serially() {
  serial.store(true);
  active_teams.store(0);  // teams of the parent's other threads did not survive the fork
}

}  // namespace dcn
