// Blocks of memory, without a header of the standard library, for the same reason as parallel.hpp.
#pragma once

#include <cstddef>

namespace dcn {

void* allocate(size_t bytes);  // 64-byte aligned, null when there is none
void release(void* block);
// The same for the time of a call: what one before gave back, where that suffices.
void* borrow(size_t bytes);
void give_back(void* block);

}  // namespace dcn
