#define DCN_ISA baseline
#include "deform_conv.hpp"
#include "roi_pool.hpp"

#include "kernels.inc.hpp"
