#define DCN_ISA baseline
#include "deform_conv.hpp"
#include "kernels.inc.hpp"
