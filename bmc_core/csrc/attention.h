// Paged attention over r-row chunks: the types that the dispatcher, the planner and the kernels
// share.
//
// KV cache layout of one (block, KV head), P = 2 for bfloat16 and fp8, 1 for float16 and float32:
//   K: [block_size/16][D/P][16][P]   tiles of 16 rows, transposed in packs of P dimensions
//   V: [block_size/P][D][P]          packs of P rows
// so that one vector load holds the same P dimensions of 16 rows of K, or 16 dimensions of the same
// P rows of V, and neither product needs a horizontal sum. Source: docs/kernel.md.
//
// This header is included by translation units built for different instruction sets, so it holds
// only plain data: no function and no template that a linker could take from the wrong one.
#pragma once

#include <cstdint>

namespace bmc {

constexpr int kTileRows = 16;  // KV rows in one K tile; a KV block is a whole number of tiles
constexpr int kStepRows = 64;  // KV rows between two updates of the running softmax
constexpr int kStepTiles = kStepRows / kTileRows;
constexpr int kQueryBlockRows = 128;  // most query rows (positions x heads) of one work item
constexpr int kMinHeadSize = 32;
constexpr int kMaxHeadSize = 256;
// KV rows of one sequence, and rows of one block: so that a position plus a step, a window or
// another position stays far inside an int32_t.
constexpr int32_t kMaxSeqLen = 1 << 30;

enum class DType : int { kFloat32 = 0, kFloat16 = 1, kBFloat16 = 2 };
// What the cache holds: the query's type, or 8-bit floats (P = 2) times a scale.
enum class CacheType : int { kSameAsQuery = 0, kE4M3 = 1, kE5M2 = 2 };

// One KV head of some consecutive query positions of one sequence, over KV rows [kv_begin, kv_end),
// for all query heads of the group, or for some of them where the group alone fills an item.
struct WorkItem {
  int32_t seq;
  int32_t kv_head;
  int32_t head_begin;  // first query head, counted within the group
  int32_t head_count;
  int32_t query_begin;  // first query position, counted within this step's query of the sequence
  int32_t query_count;
  int32_t kv_begin;     // a multiple of kTileRows, or the first row that a query sees
  int32_t kv_end;       // no more than kv_begin where no query sees a row
  int32_t split_group;  // -1: the only item of its rows; else index into Plan's split groups
  int32_t split_index;  // position among the items of the group
};

// Items that cover the same query rows over different KV rows; whoever finishes last merges them.
struct SplitGroup {
  int32_t count;
  int64_t first_partial;  // row index of the first partial result in the workspace
  int32_t pending;        // items not finished yet (atomic); the merger sets it back to count
};

struct PlanView {
  const WorkItem* items;
  int64_t num_items;
  SplitGroup* split_groups;
  const int32_t* query_start;  // [num_seqs + 1]
  const int32_t* seq_lens;     // [num_seqs]
  const int32_t* first_rows;   // [num_seqs] rows before it are seen by no query
  const int32_t* blocks;       // ids of the blocks that hold rows which a query sees
  const int64_t* block_start;  // [num_seqs] index that each sequence's block 0 has, or would have
  int32_t block_size;
  int32_t group_size;  // query heads per KV head
  int32_t max_rows;    // most query rows (positions x heads) of any item
  int32_t window;      // rows a query sees, itself included; 0: all
  bool causal;
};

struct AttentionArgs {
  PlanView plan;
  const void* query;  // [tokens, q heads, D], strides in elements, last dimension contiguous
  int64_t query_stride_token, query_stride_head;
  void* out;  // same shape and dtype as query
  int64_t out_stride_token, out_stride_head;
  const void* cache;  // [blocks, kv heads, 2 * block_size * D]
  int64_t cache_stride_block, cache_stride_head;
  int32_t head_size;
  DType dtype;
  CacheType cache_type;
  float scale;                // of the logits; the scale of quantized keys is already in it
  float value_scale;          // of quantized values, else 1
  float softcap;              // 0: none
  const float* alibi_slopes;  // [q heads] or null
  const float* sinks;         // [q heads] or null
  char* scratch;              // num_threads x scratch_bytes, 64-byte aligned
  int64_t scratch_bytes;
  float* partials;     // [split rows][D + 2]: running max, sum, weighted sum of V
  int64_t* next_item;  // shared counter, 0 at the start
  int32_t num_threads;
};

struct KernelTable {
  const char* name;
  int64_t (*scratch_bytes)(int32_t max_rows, int32_t head_size);
  void (*attend)(const AttentionArgs& args);
};

const KernelTable& kernels_portable();
#ifdef BMC_X86
const KernelTable& kernels_avx2();
const KernelTable& kernels_avx512();
const KernelTable& kernels_avx512_bf16();
const KernelTable& kernels_amx_bf16();
#endif

}  // namespace bmc
