// Faults that a sanitizer build must catch, one function each: if one passes in silence, so would a real one.
// The volatile operands keep the compiler from seeing the fault itself.
#include <cmath>
#include <cstdint>
#include <cstdlib>

extern "C" {

int read_past_the_end(int size) {
  volatile float* values = static_cast<float*>(std::calloc(size, sizeof(float)));
  const float value = values[size];
  std::free(const_cast<float*>(values));
  return value != 0;
}

int write_before_the_start(int size) {
  volatile float* values = static_cast<float*>(std::calloc(size, sizeof(float)));
  values[-size] = 1;
  std::free(const_cast<float*>(values));
  return 0;
}

int use_after_free(int size) {
  volatile float* values = static_cast<float*>(std::calloc(size, sizeof(float)));
  std::free(const_cast<float*>(values));
  return values[0] != 0;
}

int cast_nan(int size) {
  volatile double nan = std::nan("") * size;
  return static_cast<int>(nan);
}

int cast_huge(int size) {
  volatile double huge = 1e30 * size;
  return static_cast<int64_t>(huge) != 0;
}

int overflow(int size) {
  volatile int64_t most = INT64_MAX;
  return most + size > 0;
}

}  // extern "C"
