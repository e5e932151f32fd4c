#include "cache_write.h"

#include <omp.h>

#include <cstring>
#include <stdexcept>
#include <string>
#include <vector>

#define BMC_ISA_NAMESPACE plain
#include "fp8.h"
#include "scalar_float.h"

namespace bmc {

using plain::bfloat_to_float, plain::half_to_float;
using plain::E4M3, plain::E5M2;

namespace {

constexpr int64_t kMinParallelBytes = 1 << 16;  // below, waking threads costs more than the copy

// Nearest code, ties to even; finite values and infinities beyond the range become the largest
// finite code (as vLLM's own fp8 caches do), NaN stays NaN.
template <class Format>
uint8_t encode_fp8(float x) {
  constexpr int kShift = 23 - Format::kMantissaBits;
  constexpr uint32_t kMaxCode = Format::kMantissaBits == 3 ? 0x7e : 0x7b;
  constexpr float kSmallestNormal = Format::kMantissaBits == 3 ? 0x1p-6f : 0x1p-14f;
  // Adding this leaves a subnormal's code in the lowest bits: its ulp is the smallest subnormal.
  constexpr float kSubnormalMagic = kSmallestNormal * (1u << kShift);
  uint32_t bits, magic;
  memcpy(&bits, &x, 4);
  const uint8_t sign = static_cast<uint8_t>(bits >> 24 & 0x80u);
  bits &= 0x7fffffffu;
  if (bits > 0x7f800000u) return sign | 0x7f;
  float magnitude;
  memcpy(&magnitude, &bits, 4);
  if (magnitude < kSmallestNormal) {
    const float shifted = magnitude + kSubnormalMagic;
    memcpy(&bits, &shifted, 4);
    memcpy(&magic, &kSubnormalMagic, 4);
    return sign | static_cast<uint8_t>(bits - magic);
  }
  const uint32_t rounded = bits + (1u << (kShift - 1)) - 1 + (bits >> kShift & 1u);
  const uint32_t code = (rounded >> kShift) - ((127u - Format::kBias) << Format::kMantissaBits);
  return sign | static_cast<uint8_t>(code < kMaxCode ? code : kMaxCode);
}

template <class T, int kPack>
void scatter_row(const T* key, const T* value, T* block, int row, int block_size, int head_size) {
  T* k = block + static_cast<int64_t>(row / kTileRows) * kTileRows * head_size +
         row % kTileRows * kPack;
  for (int d = 0; d < head_size; d += kPack) {
    memcpy(k + static_cast<int64_t>(d) * kTileRows, key + d, sizeof(T) * kPack);
  }
  T* v = block + static_cast<int64_t>(block_size) * head_size +
         static_cast<int64_t>(row / kPack) * kPack * head_size + row % kPack;
  for (int d = 0; d < head_size; ++d) v[static_cast<int64_t>(d) * kPack] = value[d];
}

// One row of K and V from the model's type to the cache's.
template <class T, class C, int kPack, class Convert>
void write_tokens(const WriteArgs& args, const int64_t* slots, Convert convert) {
  const T* keys = static_cast<const T*>(args.key);
  const T* values = static_cast<const T*>(args.value);
  C* cache = static_cast<C*>(args.cache);
  const int64_t rows = args.num_tokens * args.num_kv_heads;
  const int64_t bytes = rows * args.head_size * 2 * static_cast<int64_t>(sizeof(T));
  const int threads = bytes < kMinParallelBytes ? 1 : args.num_threads;
#pragma omp parallel for num_threads(threads) if (threads > 1)
  for (int64_t i = 0; i < rows; ++i) {
    const int64_t token = i / args.num_kv_heads, head = i % args.num_kv_heads;
    const int64_t slot = slots[token];
    if (slot < 0) continue;
    const T* key = keys + token * args.key_stride_token + head * args.key_stride_head;
    const T* value = values + token * args.value_stride_token + head * args.value_stride_head;
    C converted[2][kMaxHeadSize];
    const C* k = convert(key, args.key_scale, args.head_size, converted[0]);
    const C* v = convert(value, args.value_scale, args.head_size, converted[1]);
    scatter_row<C, kPack>(
        k, v,
        cache + slot / args.block_size * args.cache_stride_block + head * args.cache_stride_head,
        static_cast<int>(slot % args.block_size), args.block_size, args.head_size);
  }
}

template <class T, int kPack>
void write_same(const WriteArgs& args, const int64_t* slots) {
  write_tokens<T, T, kPack>(args, slots, [](const T* row, float, int, T*) { return row; });
}

template <class T, class Fp8Format>
void write_fp8(const WriteArgs& args, const int64_t* slots, float (*widen)(T)) {
  write_tokens<T, uint8_t, 2>(args, slots,
                              [=](const T* row, float scale, int count, uint8_t* codes) {
                                const float inverse = 1.f / scale;
                                for (int d = 0; d < count; ++d)
                                  codes[d] = encode_fp8<Fp8Format>(widen(row[d]) * inverse);
                                return static_cast<const uint8_t*>(codes);
                              });
}

template <class Fp8Format>
void write_quantized(const WriteArgs& args, const int64_t* slots) {
  switch (args.dtype) {
    case DType::kFloat32:
      return write_fp8<float, Fp8Format>(args, slots, [](float x) { return x; });
    case DType::kFloat16:
      return write_fp8<uint16_t, Fp8Format>(args, slots, half_to_float);
    case DType::kBFloat16:
      return write_fp8<uint16_t, Fp8Format>(args, slots, bfloat_to_float);
  }
}

}  // namespace

void write_cache(const WriteArgs& args) {
  const int64_t num_slots = args.num_blocks * args.block_size;
  const std::vector<int64_t> copy(args.slots, args.slots + args.num_tokens);
  const int64_t* slots = copy.data();
  for (int64_t i = 0; i < args.num_tokens; ++i) {
    if (slots[i] >= num_slots) {
      throw std::out_of_range("slot_mapping[" + std::to_string(i) + "] is " +
                              std::to_string(slots[i]) + "; allowed: below " +
                              std::to_string(num_slots) +
                              " (blocks x block size), negative to skip");
    }
  }
  if (args.cache_type == CacheType::kE4M3) return write_quantized<E4M3>(args, slots);
  if (args.cache_type == CacheType::kE5M2) return write_quantized<E5M2>(args, slots);
  switch (args.dtype) {
    case DType::kFloat32:
      return write_same<uint32_t, 1>(args, slots);
    case DType::kFloat16:
      return write_same<uint16_t, 1>(args, slots);
    case DType::kBFloat16:
      return write_same<uint16_t, 2>(args, slots);
  }
}

}  // namespace bmc
