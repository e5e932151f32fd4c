// Writes new KV rows into their slots of the tiled cache (layout: attention.h). Plain C++: a row is
// a scatter of D/P small stores for K and P-strided stores for V, the same on every instruction
// set.
#pragma once

#include <cstdint>

#include "attention.h"

namespace bmc {

struct WriteArgs {
  const void* key;    // [tokens, kv heads, D], last dimension contiguous, strides in elements
  const void* value;  // same shape
  int64_t key_stride_token, key_stride_head, value_stride_token, value_stride_head;
  void* cache;  // [blocks, kv heads, 2 * block_size * D]
  int64_t cache_stride_block, cache_stride_head;
  const int64_t* slots;  // [tokens] block * block_size + row; negative: skipped
  int64_t num_tokens;
  int64_t num_blocks;
  int32_t num_kv_heads, head_size, block_size;
  DType dtype;
  CacheType cache_type;
  float key_scale, value_scale;  // a quantized row holds row / scale, rounded and saturated
  int32_t num_threads;
};

// Throws std::out_of_range before anything is written when a slot lies past the cache. Slots are
// read once: another thread that changes them meanwhile cannot move a write out of the cache.
void write_cache(const WriteArgs& args);

}  // namespace bmc
