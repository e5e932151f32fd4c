// The processor that csrc/tile_item.h is written for, in plain C++: eight matrix registers of a
// thread and products of bfloat16 pairs, on top of the portable sixteen lanes. Slow, and the same
// on every machine. What the processor answers with an invalid-opcode fault ends the process here
// too.
#pragma once

#include <cstdio>
#include <cstdlib>

#include "simd_portable.h"

#define BMC_BFLOAT_PAIRS

namespace bmc::BMC_ISA_NAMESPACE {
namespace {

struct BFloatPairs {
  uint16_t v[32];  // [16][2]
};
inline BFloatPairs load_pairs(const uint16_t* p) {
  BFloatPairs r;
  memcpy(r.v, p, sizeof(r.v));
  return r;
}
inline BFloatPairs broadcast_pair(const uint16_t* p) {
  BFloatPairs r;
  for (int i = 0; i < 32; ++i) r.v[i] = p[i % 2];
  return r;
}
inline void dot_pairs(F32x16& acc, const BFloatPairs& a, const BFloatPairs& b) {
  F32x16 a0, a1, b0, b1;
  load_bfloat_pairs(a.v, &a0, &a1);
  load_bfloat_pairs(b.v, &b0, &b1);
  acc = fma(a1, b1, fma(a0, b0, acc));
}
template <class Format>
inline BFloatPairs fp8_to_bfloat(const uint8_t* p) {
  BFloatPairs r;
  unpack_fp8<Format>(p, r.v);
  return r;
}

struct MatrixRegister {
  int rows = 0, row_bytes = 0;  // 0: not configured
  unsigned char bytes[16][64];
};

inline void require(bool condition, const char* what) {
  if (condition) return;
  fprintf(stderr, "emulated matrix registers: %s\n", what);
  abort();
}

inline MatrixRegister* all_registers() {
  static thread_local MatrixRegister all[8];
  return all;
}

inline MatrixRegister& matrix_register(int index) {
  MatrixRegister& r = all_registers()[index];
  require(r.rows > 0 && r.row_bytes > 0, "used before they are configured");
  return r;
}

inline void _tile_loadconfig(const void* config) {
  const auto* bytes = static_cast<const unsigned char*>(config);
  require(bytes[0] == 1, "palette 1 is the only one");
  for (int i = 0; i < 8; ++i) {
    MatrixRegister& r = all_registers()[i];
    r.row_bytes = bytes[16 + 2 * i] + 256 * bytes[17 + 2 * i];
    r.rows = bytes[48 + i];
    require(r.rows <= 16 && r.row_bytes <= 64, "at most 16 rows of 64 bytes");
    memset(r.bytes, 0, sizeof(r.bytes));
  }
}
inline void _tile_release() {
  for (int i = 0; i < 8; ++i) all_registers()[i].rows = 0;
}
inline void _tile_zero(int index) {
  MatrixRegister& r = matrix_register(index);
  memset(r.bytes, 0, sizeof(r.bytes));
}
inline void _tile_loadd(int index, const void* base, int64_t stride) {
  MatrixRegister& r = matrix_register(index);
  memset(r.bytes, 0, sizeof(r.bytes));
  for (int row = 0; row < r.rows; ++row) {
    memcpy(r.bytes[row], static_cast<const char*>(base) + row * stride, r.row_bytes);
  }
}
inline void _tile_stored(int index, void* base, int64_t stride) {
  const MatrixRegister& r = matrix_register(index);
  for (int row = 0; row < r.rows; ++row) {
    memcpy(static_cast<char*>(base) + row * stride, r.bytes[row], r.row_bytes);
  }
}
// sums[rows][16] += left[rows][k][2] . right[k][16][2]
inline void _tile_dpbf16ps(int sums, int left, int right) {
  MatrixRegister& c = matrix_register(sums);
  const MatrixRegister &a = matrix_register(left), &b = matrix_register(right);
  const int pairs = a.row_bytes / 4;
  require(a.rows == c.rows && b.rows == pairs && b.row_bytes == 64 && c.row_bytes == 64,
          "a product of registers whose shapes do not go together");
  uint16_t words[32];
  for (int row = 0; row < c.rows; ++row) {
    F32x16 sum;
    memcpy(&sum, c.bytes[row], 64);
    memcpy(words, a.bytes[row], 64);
    for (int k = 0; k < pairs; ++k) {
      BFloatPairs right_pairs;
      memcpy(right_pairs.v, b.bytes[k], 64);
      dot_pairs(sum, broadcast_pair(words + 2 * k), right_pairs);
    }
    memcpy(c.bytes[row], &sum, 64);
  }
}

}  // namespace
}  // namespace bmc::BMC_ISA_NAMESPACE
