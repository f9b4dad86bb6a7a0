// What the shared headers need from the compiler that reads them: g++/clang++ when the wheel is built, NVRTC
// at run time.
//
// On the CPU every header below is compiled once per instruction set, inside a namespace of its own
// (dcn::avx2), so that the linker can never replace the code of one instruction set by that of another.
#pragma once

#if defined(__CUDACC__)
#define DCN_INLINE __device__ __forceinline__
#define DCN_NAMESPACE dcn
#else
#include <cstddef>
#include <cstdint>
#define DCN_INLINE inline __attribute__((always_inline))
#ifdef DCN_ISA
#define DCN_NAMESPACE dcn::DCN_ISA
#endif
#endif
