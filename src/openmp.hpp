// OpenMP's threads.
#pragma once

#include "parallel.hpp"

namespace dcn {

const Runtime* openmp_runtime();

}  // namespace dcn
