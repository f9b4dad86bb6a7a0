#include "dispatch.hpp"

namespace dcn {

// The one list of instruction sets in C++, best first: name, what the processor must have. setup.py has their
// flags.
#if defined(__x86_64__)
#define DCN_FOR_EACH_ISA(X)                                                                                  \
  X(avx512, __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&                       \
                __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&                  \
                __builtin_cpu_supports("fma"))                                                               \
  X(avx2, __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c")) \
  X(baseline, true)
#else
#define DCN_FOR_EACH_ISA(X) X(baseline, true)
#endif

#define DCN_DECLARE(name, condition) \
  namespace name {                   \
  extern const Kernels kKernels;     \
  }
DCN_FOR_EACH_ISA(DCN_DECLARE)
#undef DCN_DECLARE

namespace {

struct Isa {
  const Kernels* kernels;
  bool (*supported)();
};

#define DCN_ENTRY(name, condition) {&name::kKernels, [] { return static_cast<bool>(condition); }},
const Isa kIsas[] = {DCN_FOR_EACH_ISA(DCN_ENTRY)};
#undef DCN_ENTRY

// Starting a team costs as much as some two million operations.
constexpr double kWorthSharing = 2e6;

int worthwhile_threads(const Geometry& geometry, int threads) {
  double operations =
      2.0 * static_cast<double>(geometry.batch * geometry.out_channels) *
      static_cast<double>(geometry.in_channels / (geometry.groups > 0 ? geometry.groups : 1) + 8);
  for (int axis = 0; axis < geometry.ndim; ++axis)
    operations *= static_cast<double>(geometry.output[axis]) * static_cast<double>(geometry.kernel[axis]);
  return operations < kWorthSharing ? 1 : threads;
}

// A bin reads some 16 pixels, and each image is copied.
int worthwhile_threads(const RoIGeometry& geometry, int threads) {
  const double pixels = static_cast<double>(geometry.input[0]) * static_cast<double>(geometry.input[1]);
  const double bins = static_cast<double>(geometry.output[0]) * static_cast<double>(geometry.output[1]);
  const double images = static_cast<double>(geometry.batch < geometry.rois ? geometry.batch : geometry.rois);
  const double operations =
      images * pixels * static_cast<double>(geometry.channels) +
      16 * static_cast<double>(geometry.rois) * bins * static_cast<double>(geometry.outputs);
  return operations < kWorthSharing ? 1 : threads;
}

}  // namespace

int isa_count() { return sizeof(kIsas) / sizeof(kIsas[0]); }
const Kernels* isa_kernels(int index) { return kIsas[index].kernels; }
bool isa_supported(int index) { return kIsas[index].supported(); }

int dtype_count() { return kDTypes; }

const char* dtype_name(int dtype) {
#define DCN_DTYPE_NAME(name, type) #name,
  static const char* const names[] = {DCN_FOR_EACH_DTYPE(DCN_DTYPE_NAME)};
#undef DCN_DTYPE_NAME
  return names[dtype];
}

#define DCN_HALF_NAME(name, storage) #name,
static const char* const kHalves[] = {DCN_FOR_EACH_HALF(DCN_HALF_NAME)};
#undef DCN_HALF_NAME

int half_count() { return sizeof(kHalves) / sizeof(kHalves[0]); }
const char* half_name(int half) { return kHalves[half]; }

Status forward(const Kernels& kernels, DType dtype, const ForwardArguments& arguments, int threads,
               Interrupt interrupt) {
  Team team(worthwhile_threads(arguments.geometry, threads), interrupt);
  return kernels.forward[dtype][arguments.geometry.ndim - 1](arguments, team);
}

Status prepare_forward(const Kernels& kernels, DType dtype, const ForwardArguments& arguments, int threads,
                       Interrupt interrupt, PreparedForward& prepared) {
  prepared.threads = worthwhile_threads(arguments.geometry, threads);
  Team team(prepared.threads, interrupt);
  return kernels.prepare_forward[dtype][arguments.geometry.ndim - 1](arguments, team, prepared);
}

Status backward(const Kernels& kernels, DType dtype, const BackwardArguments& arguments, int threads,
                Interrupt interrupt) {
  Team team(worthwhile_threads(arguments.geometry, threads), interrupt);
  return kernels.backward[dtype][arguments.geometry.ndim - 1](arguments, team);
}

Status roi_forward(const Kernels& kernels, DType dtype, const RoIForwardArguments& arguments, int threads,
                   Interrupt interrupt) {
  Team team(worthwhile_threads(arguments.geometry, threads), interrupt);
  return kernels.roi_forward[dtype](arguments, team);
}

Status roi_backward(const Kernels& kernels, DType dtype, const RoIBackwardArguments& arguments, int threads,
                    Interrupt interrupt) {
  Team team(worthwhile_threads(arguments.geometry, threads), interrupt);
  return kernels.roi_backward[dtype](arguments, team);
}

void logistic(const Kernels& kernels, DType dtype, const Planes& values, Storage storage,
              const int64_t (&extents)[3], double factor) {
  kernels.logistic[dtype](values, storage, extents, factor);
}

}  // namespace dcn
