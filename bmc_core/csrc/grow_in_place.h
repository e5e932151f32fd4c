// Growing K and V where they are: parts that lie one behind the other move up, so that each has
// more room behind it.
#pragma once

#include <cstdint>

namespace bmc {

// Part i, `valid` bytes at base + i * old_stride, moves to base + i * new_stride. New strides are
// no smaller than old ones, strides no smaller than `valid`. What lies behind the valid bytes is
// undefined afterwards. Throws std::bad_alloc before anything has moved.
void grow_in_place(char* base, int64_t parts, int64_t valid, int64_t old_stride, int64_t new_stride,
                   int num_threads);

}  // namespace bmc
