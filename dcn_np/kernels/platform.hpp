// What the shared headers need from the compiler that reads them: g++/clang++ when the wheel is built, NVRTC
// at run time, g++ again where the tests run the GPU's kernels on a CPU (DCN_EMULATION).
//
// On the CPU every header below is compiled once per instruction set, inside a namespace of its own
// (dcn::avx2), so that the linker can never replace the code of one instruction set by that of another.
#pragma once

#if defined(__CUDACC_RTC__)
// NVRTC has no header of the standard library; these are its sizes on every system that has a GPU.
using uint8_t = unsigned char;
using uint16_t = unsigned short;
using int32_t = int;
using uint32_t = unsigned int;
using int64_t = long long;
using uint64_t = unsigned long long;
#else
#include <cstddef>
#include <cstdint>
#endif

#ifdef __CUDACC__
#define DCN_NAN __longlong_as_double(0x7ff8000000000000)
#else
#define DCN_NAN __builtin_nan("")
#endif

#if defined(__CUDACC__)
#define DCN_INLINE __device__ __forceinline__
#define DCN_NAMESPACE dcn
#elif defined(DCN_EMULATION)
#define DCN_INLINE inline
#define DCN_NAMESPACE dcn
#else
#define DCN_INLINE inline __attribute__((always_inline))
#ifdef DCN_ISA
#define DCN_NAMESPACE dcn::DCN_ISA
#endif
#endif
