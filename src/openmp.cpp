// The only file that knows OpenMP.
#include "openmp.hpp"

#include <omp.h>

namespace dcn {

static int threads() {
  const int most = omp_get_max_threads(), limit = omp_get_thread_limit();
  return limit < most ? limit : most;
}

static void run(int wanted, void (*body)(void* context, int thread, int threads), void* context) {
#pragma omp parallel num_threads(wanted)
  body(context, omp_get_thread_num(), omp_get_num_threads());
}

const Runtime* openmp_runtime() {
  static const Runtime runtime = {threads, run};
  return &runtime;
}

}  // namespace dcn
