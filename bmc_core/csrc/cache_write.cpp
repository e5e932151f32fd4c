#include "cache_write.h"

#include <omp.h>

#include <cstring>
#include <stdexcept>
#include <string>

namespace bmc {
namespace {

constexpr int64_t kMinParallelBytes = 1 << 16;  // below, waking threads costs more than the copy

template <class T, int kPack>
void write_row(const T* key, const T* value, T* block, int row, int block_size, int head_size) {
  T* k = block + static_cast<int64_t>(row / kTileRows) * kTileRows * head_size +
         row % kTileRows * kPack;
  for (int d = 0; d < head_size; d += kPack) {
    memcpy(k + static_cast<int64_t>(d) * kTileRows, key + d, sizeof(T) * kPack);
  }
  T* v = block + static_cast<int64_t>(block_size) * head_size +
         static_cast<int64_t>(row / kPack) * kPack * head_size + row % kPack;
  for (int d = 0; d < head_size; ++d) v[static_cast<int64_t>(d) * kPack] = value[d];
}

template <class T, int kPack>
void write_tokens(const WriteArgs& args) {
  const T* keys = static_cast<const T*>(args.key);
  const T* values = static_cast<const T*>(args.value);
  T* cache = static_cast<T*>(args.cache);
  const int64_t rows = args.num_tokens * args.num_kv_heads;
  const int64_t bytes = rows * args.head_size * 2 * static_cast<int64_t>(sizeof(T));
  const int threads = bytes < kMinParallelBytes ? 1 : args.num_threads;
#pragma omp parallel for num_threads(threads) if (threads > 1)
  for (int64_t i = 0; i < rows; ++i) {
    const int64_t token = i / args.num_kv_heads, head = i % args.num_kv_heads;
    const int64_t slot = args.slots[token];
    if (slot < 0) continue;
    T* block =
        cache + slot / args.block_size * args.cache_stride_block + head * args.cache_stride_head;
    write_row<T, kPack>(keys + token * args.key_stride_token + head * args.key_stride_head,
                        values + token * args.value_stride_token + head * args.value_stride_head,
                        block, static_cast<int>(slot % args.block_size), args.block_size,
                        args.head_size);
  }
}

}  // namespace

void write_cache(const WriteArgs& args) {
  const int64_t num_slots = args.num_blocks * args.block_size;
  for (int64_t i = 0; i < args.num_tokens; ++i) {
    if (args.slots[i] >= num_slots) {
      throw std::out_of_range("slot_mapping[" + std::to_string(i) + "] is " +
                              std::to_string(args.slots[i]) + "; allowed: below " +
                              std::to_string(num_slots) +
                              " (blocks x block size), negative to skip");
    }
  }
  switch (args.dtype) {
    case DType::kFloat32:
      return write_tokens<uint32_t, 1>(args);
    case DType::kFloat16:
      return write_tokens<uint16_t, 1>(args);
    case DType::kBFloat16:
      return write_tokens<uint16_t, 2>(args);
  }
}

}  // namespace bmc
