// One source of kernels (DCN_SOURCE) with the entry through which emulated.py launches them.
#include DCN_SOURCE

#include "arguments.hpp"

namespace {
void (*kernel)(const dcn::Arguments);
const dcn::Arguments* arguments;
}  // namespace

extern "C" int emulate(void (*run)(const dcn::Arguments), const unsigned* grid, const unsigned* threads,
                       size_t shared_bytes, const dcn::Arguments* given, unsigned order, char* message,
                       size_t size) {
  kernel = run, arguments = given;
  dcn::emulation::run_kernel = [] { kernel(*arguments); };
  return dcn::emulation::launch({grid[0], grid[1], grid[2]}, {threads[0], threads[1], threads[2]},
                                shared_bytes, order, message, size);
}

extern "C" size_t arguments_size() { return sizeof(dcn::Arguments); }
