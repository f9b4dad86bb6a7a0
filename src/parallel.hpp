// Threads and interruption for the kernels, without a header of the standard library: the
// instruction-set files include this, and an inline function of std compiled there could replace everyone's
// copy at link time.
#pragma once

#include <cstddef>
#include <cstdint>

namespace dcn {

enum class Status : int { kOk = 0, kOutOfMemory = 1, kInterrupted = 2 };

// Asked from time to time, on the calling thread only, whether to give up (a pending Ctrl-C).
struct Interrupt {
  bool (*pending)(void* context);
  void* context;
};

// The threads of one call. Each takes items one by one from a share of its own, and then from those of others: items
// near to each other, of one run() and the next, meet the same caches. What an item computes may depend on its index
// and never on the thread that runs it, and no two items of one run() may write the same memory: that is what makes
// results independent of the number of threads. run() takes fewer threads where the system gives fewer, and no
// exception crosses it.
class Team {
 public:
  Team(int threads, Interrupt interrupt);
  ~Team();
  Team(const Team&) = delete;
  Team& operator=(const Team&) = delete;

  int threads() const { return threads_; }

  // Calls body(item, thread) for every item, on at most `threads()` threads. False: interrupted, results are
  // unfinished.
  template <class Body>
  bool run(int64_t items, const Body& body) {
    return run(
        items,
        [](const void* context, int64_t item, int thread) {
          (*static_cast<const Body*>(context))(item, thread);
        },
        &body);
  }

  // For what several items need and one of them does. Its mark begins as 0. Who has claimed it does it and finishes,
  // whatever happens, and waits for nothing before.
  static bool claim(unsigned char& mark);
  static void finish(unsigned char& mark);
  static void wait_for(const unsigned char& mark);  // claimed by somebody

  // For the inside of long items: false when the call was interrupted and the item should return at once.
  bool keep_going(int thread);

 private:
  using Item = void (*)(const void* context, int64_t item, int thread);
  bool run(int64_t items, Item body, const void* context);
  void work(Item body, const void* context, int thread);

  static constexpr int kShares = 64;  // more threads have some in common
  struct Shared;
  Shared* shared_;
  int threads_;
  alignas(64) unsigned char storage_[64 * (kShares + 4)];
};

// Who keeps threads. A module of its own fills this in (openmp.hpp), for its library cannot be loaded everywhere; as
// long as none has, every team has one thread.
struct Runtime {
  int (*threads)();  // how many it would start from this thread
  // Calls body(context, thread, threads) on at most `wanted` threads, of which the caller is number 0.
  void (*run)(int wanted, void (*body)(void* context, int thread, int threads), void* context);
};
void set_runtime(const Runtime* runtime);
bool has_runtime();

int hardware_threads();  // what the runtime would start from this thread: OMP_NUM_THREADS, omp_set_num_threads
// What a call may use that comes from a thread which is not Python's; until it is set, what OpenMP would start.
int process_threads();
void set_process_threads(int limit);
void run_serially();  // from now on every team has one thread: called in the child of a fork

}  // namespace dcn
