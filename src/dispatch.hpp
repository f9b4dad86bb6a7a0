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
// For at most `threads` threads, which it notes; a call on fewer of them is fine.
Status prepare_forward(const Kernels&, DType, const ForwardArguments&, int threads, Interrupt,
                       PreparedForward&);
Status backward(const Kernels&, DType, const BackwardArguments&, int threads, Interrupt);
Status roi_forward(const Kernels&, DType, const RoIForwardArguments&, int threads, Interrupt);
Status roi_backward(const Kernels&, DType, const RoIBackwardArguments&, int threads, Interrupt);
void logistic(const Kernels&, DType, const Planes&, Storage, const int64_t (&extents)[3], double factor);

}  // namespace dcn
