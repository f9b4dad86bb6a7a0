#define DCN_ISA avx512
#include "deform_conv.hpp"
#include "roi_pool.hpp"

#include "kernels.inc.hpp"
