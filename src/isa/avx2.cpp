#define DCN_ISA avx2
#include "deform_conv.hpp"
#include "kernels.inc.hpp"
