// One work item: all query rows (positions x heads of the group) that share a KV head, over a range
// of KV rows. Holds what does not depend on how the products are computed: packing the query, the
// running softmax in base 2, stale rows, the output, and merging items that were split along the KV
// rows.
//
// Scores of stale rows are replaced, never added to; stale rows of V are replaced by zeros before
// they are multiplied, so NaN and Inf left in unused rows cannot reach the output.
#pragma once

#include <cstring>
#include <type_traits>

#include "attention.h"
#include "elements.h"
#include "vector_math.h"

namespace bmc::BMC_ISA_NAMESPACE {
namespace {

#ifdef BMC_TILES
// Matrix tiles want many rows and columns between two updates of the softmax.
constexpr int kPanelRows = 32;
constexpr int kPanelColumns = 256;
constexpr int kPanels = 2;     // at work at a time
constexpr int kEdgeTiles = 4;  // stale rows of V are replaced 32 at a time
#else
constexpr int kPanelRows = kRowBlock;
constexpr int kPanelColumns = kStepRows;
constexpr int kPanels = 1;
constexpr int kEdgeTiles = 2;
#endif

inline int64_t align64(int64_t bytes) { return (bytes + 63) & ~int64_t{63}; }

// Per-thread buffers of one item, carved from AttentionArgs::scratch. Rows are padded to whole
// panels, so that matrix tiles may compute rows that nobody reads.
template <class E>
struct Scratch {
  typename E::Arith* query;   // [rows][D]
  float* acc;                 // [rows][D] weighted sums of V, relative to running_max
  float* running_max;         // [rows] in base 2
  float* running_sum;         // [rows]
  int32_t* lower;             // [rows] first KV row seen
  int32_t* limit;             // [rows] one past the last KV row seen
  float* slope;               // [rows] ALiBi slope x log2(e)
  float* scores;              // [kPanels][kPanelRows][kPanelColumns]
  typename E::Arith* probs;   // [kPanels][kPanelRows][kPanelColumns]
  float* correction;          // [kPanelRows]
  typename E::Storage* edge;  // [kEdgeTiles][16][D] rows of V with stale ones zeroed
  uint16_t* unpacked;         // [2][kPanelColumns][D] K and V of a step, from a quantized cache

  // Sets the pointers from base on; returns the bytes taken.
  int64_t carve(char* base, int64_t max_rows, int64_t head_size) {
    const int64_t rows = (max_rows + kPanelRows - 1) / kPanelRows * kPanelRows;
    int64_t at = 0;
    auto take = [&](auto*& p, int64_t count) {
      // Not base + at: no base is given where only the size is asked for.
      p = reinterpret_cast<std::remove_reference_t<decltype(p)>>(reinterpret_cast<uintptr_t>(base) +
                                                                 at);
      at += align64(count * static_cast<int64_t>(sizeof(*p)));
    };
    take(query, rows * head_size);
    take(acc, rows * head_size);
    take(running_max, rows);
    take(running_sum, rows);
    take(lower, rows);
    take(limit, rows);
    take(slope, rows);
    take(scores, kPanels * kPanelRows * kPanelColumns);
    take(probs, kPanels * kPanelRows * kPanelColumns);
    take(correction, kPanelRows);
    take(edge, kEdgeTiles * kTileRows * head_size);
    take(unpacked, sizeof(typename E::Storage) == 1 ? 2 * kPanelColumns * head_size : 0);
    return at;
  }
};

// The items of one thread, one after the other. The next one is taken early, in the last step of
// the one before, so that its first keys can be fetched meanwhile.
class Queue {
 public:
  explicit Queue(const AttentionArgs& args) : args_(args) {}
  // The item that pop() will return; null: none is left.
  const WorkItem* peek() {
    if (!taken_) {
      taken_ = true;
      const int64_t i = __atomic_fetch_add(args_.next_item, 1, __ATOMIC_RELAXED);
      next_ = i < args_.plan.num_items ? args_.plan.items + i : nullptr;
    }
    return next_;
  }
  const WorkItem* pop() {
    const WorkItem* item = peek();
    taken_ = false;
    return item;
  }

 private:
  const AttentionArgs& args_;
  const WorkItem* next_ = nullptr;
  bool taken_ = false;
};

template <class E>
class Item {
 protected:
  using Storage = typename E::Storage;
  using Value = typename E::Value;
  using Arith = typename E::Arith;

  Item(const AttentionArgs& args, const WorkItem& work, Scratch<E>& scratch, Queue& queue)
      : args_(args), work_(work), s_(scratch), head_size_(args.head_size), queue_(queue) {
    const PlanView& plan = args.plan;
    heads_ = work.head_count;
    first_head_ = work.kv_head * plan.group_size + work.head_begin;
    rows_ = work.query_count * heads_;
    seq_len_ = plan.seq_lens[work.seq];
    query_len_ = plan.query_start[work.seq + 1] - plan.query_start[work.seq];
  }

  int token(int row) const {
    return args_.plan.query_start[work_.seq] + work_.query_begin + row / heads_;
  }
  int query_head(int row) const { return first_head_ + row % heads_; }
  int position(int row) const { return seq_len_ - query_len_ + work_.query_begin + row / heads_; }

  void begin() {
    const Value* query = static_cast<const Value*>(args_.query);
    const int first = args_.plan.first_rows[work_.seq];
    const bool takes_sink = args_.sinks != nullptr && work_.split_index == 0;
    for (int row = 0; row < rows_; ++row) {
      const Value* q =
          query + token(row) * args_.query_stride_token + query_head(row) * args_.query_stride_head;
      for (int d = 0; d < head_size_; d += 16) {
        F32x16 x = E::widen(q + d);
        if constexpr (E::kUnit != 1.f) x = mul(x, set1(unit_));
        E::pack(s_.query + row * head_size_ + d, x);
      }
      const int pos = position(row);
      s_.limit[row] = args_.plan.causal ? pos + 1 : seq_len_;
      const int window = args_.plan.window;
      const int in_window = window > 0 ? pos + 1 - window : 0;
      s_.lower[row] = in_window > first ? in_window : first;
      s_.slope[row] = args_.alibi_slopes ? args_.alibi_slopes[query_head(row)] * kLog2e : 0.f;
      s_.running_max[row] = takes_sink ? args_.sinks[query_head(row)] * kLog2e : kNegativeInfinity;
      s_.running_sum[row] = takes_sink ? 1.f : 0.f;
    }
    memset(s_.acc, 0, sizeof(float) * rows_ * head_size_);
    first_row_ = s_.lower[0];  // the lowest row that any query of the item sees
  }

  const Storage* key_tile(int row) const { return key_tile_of(work_, row); }

  // What to fetch while rows `before` this item's `row` are used: that row's keys, or past the
  // item's end, as far from the next item's begin.
  const char* upcoming_keys(int row, int first_after, int step) const {
    const WorkItem* item = &work_;
    if (row >= work_.kv_end) {
      item = first_after >= work_.kv_end ? queue_.peek() : nullptr;
      if (item == nullptr) return nullptr;
      row = (item->kv_begin & ~(step - 1)) + row - first_after;
      if (row >= item->kv_end) return nullptr;
    }
    return reinterpret_cast<const char*>(key_tile_of(*item, row));
  }
  int64_t value_offset() const { return static_cast<int64_t>(args_.plan.block_size) * head_size_; }

  // The `count` rows of V from `row` on (packs of one block): themselves, or a copy with zeros
  // where rows are outside [first_row_, end of the sequence), that is stale or somebody else's. An
  // item has at most two such places, where its range begins and where it ends.
  const Storage* usable_values(const Storage* values, int row, int count, Storage*& copy) const {
    const int lo = first_row_ - row, hi = seq_len_ - row;
    if (lo <= 0 && hi >= count) return values;
    memcpy(copy, values, sizeof(Storage) * count * head_size_);
    for (int r = 0; r < count; ++r) {
      if (r >= lo && r < hi) continue;
      Storage* v = copy + (r / E::kPack) * head_size_ * E::kPack + r % E::kPack;
      for (int d = 0; d < head_size_; ++d) v[d * E::kPack] = 0;
    }
    const Storage* usable = copy;
    copy += count * head_size_;
    return usable;
  }

  // Turns scores[0..columns) of a row, over KV rows from kv on, into probabilities relative to its
  // new running maximum. Returns what the row's earlier sums must be multiplied by. columns:
  // multiple of 16.
  float softmax(int row, float* scores, Arith* probs, int kv, int columns, bool masked) {
    const bool plain = args_.softcap == 0.f && args_.alibi_slopes == nullptr;
    float unit = args_.scale * kLog2e;  // scores x unit: logits in base 2
    if (!plain || masked || args_.scale <= 0.f) {
      prepare_logits(row, scores, kv, columns, plain, masked);
      unit = 1.f;
    }
    F32x16 top = set1(kNegativeInfinity);
#pragma GCC unroll 4
    for (int c = 0; c < columns; c += 16) top = max(load(scores + c), top);
    const float old_max = s_.running_max[row];
    const float row_max = reduce_max(top) * unit;
    const float new_max = row_max > old_max ? row_max : old_max;
    // Nothing seen yet: any finite origin gives zeros, and NaN for NaN scores.
    const F32x16 origin = set1(new_max == kNegativeInfinity ? 0.f : -new_max);
    const F32x16 factor = set1(unit);
    F32x16 sum = set1(0.f);
#pragma GCC unroll 4
    for (int c = 0; c < columns; c += 16) {
      const F32x16 p = exp2<E::kExpDegree>(fma(load(scores + c), factor, origin));
      sum = add(sum, p);
      E::pack(probs + c, p);
    }
    const float correction = old_max == new_max ? 1.f : exp2f(old_max - new_max);
    s_.running_sum[row] = s_.running_sum[row] * correction + reduce_add(sum);
    s_.running_max[row] = new_max;
    return correction;
  }

  // Scores to logits in base 2: scale, soft cap, ALiBi, -inf where the row does not see.
  void prepare_logits(int row, float* scores, int kv, int columns, bool plain, bool masked) const {
    const float scale = args_.scale;
    for (int c = 0; c < columns; c += 16) {
      F32x16 x = load(scores + c);
      if (args_.softcap != 0.f) {
        x = mul(tanh(mul(x, set1(scale / args_.softcap))), set1(args_.softcap * kLog2e));
      } else {
        x = mul(x, set1(scale * kLog2e));
      }
      if (!plain) {
        const float distance = static_cast<float>(kv + c - position(row));
        x = fma(add(iota(), set1(distance)), set1(s_.slope[row]), x);
      }
      if (masked) {
        x = keep_lanes(x, s_.lower[row] - kv - c, s_.limit[row] - kv - c, kNegativeInfinity);
      }
      store(scores + c, x);
    }
  }

  // After the last step: writes the output, or hands the share over where the item was split.
  void end() {
    if (work_.split_group >= 0) return hand_over();
    for (int row = 0; row < rows_; ++row) {
      finish(row, s_.running_sum[row], s_.acc + row * head_size_);
    }
  }

  const AttentionArgs& args_;
  const WorkItem& work_;
  Scratch<E>& s_;
  const int head_size_;
  int heads_, first_head_, rows_, seq_len_, query_len_, first_row_ = 0;
  float unit_ = 1.f;  // of K and V as the products see them

 private:
  const Storage* key_tile_of(const WorkItem& work, int row) const {
    const PlanView& plan = args_.plan;
    const int64_t block = plan.blocks[plan.block_start[work.seq] + row / plan.block_size];
    return static_cast<const Storage*>(args_.cache) + work.kv_head * args_.cache_stride_head +
           block * args_.cache_stride_block +
           static_cast<int64_t>(row % plan.block_size) * head_size_;
  }

  // out = acc / sum; a row that sees nothing is zero.
  void finish(int row, float sum, const float* acc) const {
    Value* out = static_cast<Value*>(args_.out) + token(row) * args_.out_stride_token +
                 query_head(row) * args_.out_stride_head;
    const F32x16 inverse = set1(sum == 0.f ? 0.f : args_.value_scale * unit_ / sum);
    for (int d = 0; d < head_size_; d += 16) E::narrow(out + d, mul(load(acc + d), inverse));
  }

  // Leaves this item's share in the workspace; the last one of the group merges all shares.
  void hand_over() {
    SplitGroup& group = args_.plan.split_groups[work_.split_group];
    const int64_t width = head_size_ + 2;
    float* shares = args_.partials + group.first_partial * width;
    for (int row = 0; row < rows_; ++row) {
      float* share = shares + (static_cast<int64_t>(work_.split_index) * rows_ + row) * width;
      share[0] = s_.running_max[row];
      share[1] = s_.running_sum[row];
      memcpy(share + 2, s_.acc + row * head_size_, sizeof(float) * head_size_);
    }
    if (__atomic_sub_fetch(&group.pending, 1, __ATOMIC_ACQ_REL) != 0) return;
    __atomic_store_n(&group.pending, group.count, __ATOMIC_RELAXED);  // ready for the next layer
    for (int row = 0; row < rows_; ++row) merge(row, group.count, shares, width);
  }

  void merge(int row, int count, const float* shares, int64_t width) {
    float top = kNegativeInfinity;
    for (int i = 0; i < count; ++i) {
      const float m = shares[(static_cast<int64_t>(i) * rows_ + row) * width];
      top = m > top ? m : top;
    }
    float* acc = s_.acc + row * head_size_;
    memset(acc, 0, sizeof(float) * head_size_);
    float sum = 0.f;
    for (int i = 0; i < count; ++i) {
      const float* share = shares + (static_cast<int64_t>(i) * rows_ + row) * width;
      const float weight = share[0] == top ? 1.f : exp2f(share[0] - top);
      sum += share[1] * weight;
      for (int d = 0; d < head_size_; d += 16) {
        store(acc + d, fma(load(share + 2 + d), set1(weight), load(acc + d)));
      }
    }
    finish(row, sum, acc);
  }

  Queue& queue_;
};

}  // namespace
}  // namespace bmc::BMC_ISA_NAMESPACE
