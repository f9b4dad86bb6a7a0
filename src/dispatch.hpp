// Which instruction set runs: an explicit choice, else DCN_NP_ISA, else the best that this processor has.
#pragma once

#include "kernels.hpp"

namespace dcn {

int isa_count();  // of the instruction sets compiled in, best first
const Kernels* isa_kernels(int index);
bool isa_supported(int index);  // by this processor
int dtype_count();
const char* dtype_name(int dtype);  // as NumPy names it
int half_count();
const char* half_name(int half);  // those of Storage, from its second on

// Run on at most `threads` threads: fewer where the work is too small to share.
Status forward(const Kernels&, DType, const ForwardArguments&, int threads, Interrupt);
Status backward(const Kernels&, DType, const BackwardArguments&, int threads, Interrupt);
Status roi_forward(const Kernels&, DType, const RoIForwardArguments&, int threads, Interrupt);
Status roi_backward(const Kernels&, DType, const RoIBackwardArguments&, int threads, Interrupt);

}  // namespace dcn
