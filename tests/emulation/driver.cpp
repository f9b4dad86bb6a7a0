// One source of kernels (DCN_SOURCE) with the entry through which emulated.py launches them.
#include DCN_SOURCE

#include "arguments.hpp"
#include "roi_arguments.hpp"

namespace {
void (*kernel)();
const void* arguments;

template <class Arguments>
void run() {
  reinterpret_cast<void (*)(const Arguments)>(kernel)(*static_cast<const Arguments*>(arguments));
}
}  // namespace

// What the kernel takes is told by the size of what is given.
static_assert(sizeof(dcn::Arguments) != sizeof(dcn::RoIArguments));

extern "C" int emulate(void (*run_this)(), const unsigned* grid, const unsigned* threads, size_t shared_bytes,
                       const void* given, size_t given_size, unsigned order, char* message, size_t size) {
  kernel = run_this, arguments = given;
  dcn::emulation::run_kernel =
      given_size == sizeof(dcn::RoIArguments) ? run<dcn::RoIArguments> : run<dcn::Arguments>;
  return dcn::emulation::launch({grid[0], grid[1], grid[2]}, {threads[0], threads[1], threads[2]},
                                shared_bytes, order, message, size);
}

extern "C" size_t arguments_size() { return sizeof(dcn::Arguments); }
extern "C" size_t roi_arguments_size() { return sizeof(dcn::RoIArguments); }
