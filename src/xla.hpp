// The forward and the backward as custom calls of XLA on the CPU, computed from its buffers into its buffers. They
// are called from XLA's threads, from several at a time, without Python's lock; no exception leaves them.
#pragma once

namespace dcn::xla {

struct CallFrame;
struct Error;

// What both are handed: the attribute `geometry`, the 24 numbers of Geometry; `given` and `needs`, sets of arrays
// as bits in the order x, offset, mask, weight, bias, output; as arguments the arrays of `given`, as results those
// of `needs`, each in that order, dense and in C order. x, output, and offset and mask have dtypes of Storage;
// weight and bias what is computed in. In the backward `output` is grad_output, and the results are gradients.
//
// The frame may come from a program that was saved by whom we do not know: everything in it is checked, and what
// does not fit is an error, before anything is written.
Error* forward(CallFrame* frame);
Error* backward(CallFrame* frame);

// Which instruction set they run on, of isa_kernels(). The number of threads is process_threads().
void use_isa(int isa);

}  // namespace dcn::xla
