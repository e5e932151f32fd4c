// The attention kernel: one template over element type, compiled once per instruction set.
//
// Work item = all query rows that share a KV head (positions x heads of the group), so that K and V
// are read from memory once. 64 KV rows at a time: scores, running softmax in base 2, weighted sum of V.
// Rows past a query's limit inside the last tile are computed and masked: BMC's redundant compute.
// Scores of stale rows are replaced, never added to; stale rows of V are replaced by zeros before they
// are multiplied, so NaN and Inf left in unused rows cannot reach the output.
//
// No std:: template here: see attention.h.
#pragma once

#include <cmath>
#include <cstring>
#include <type_traits>

#include "attention.h"
#include "elements.h"

namespace bmc::BMC_ISA_NAMESPACE {
namespace {

constexpr float kLog2e = 1.44269504088896340736f;
constexpr float kNegativeInfinity = -__builtin_inff();

inline int64_t align64(int64_t bytes) { return (bytes + 63) & ~int64_t{63}; }

// 2^x, relative error under 3e-7, 0 below 2^-125 and clamped at 2^126; NaN stays NaN.
inline F32x16 exp2(F32x16 x) {
  const F32x16 clamped = min(set1(126.f), max(set1(-126.f), x));
  const F32x16 n = round_nearest(clamped);
  const F32x16 f = sub(clamped, n);
  F32x16 p = set1(1.5403530e-4f);  // ln2^k / k!
  p = fma(p, f, set1(1.3333558e-3f));
  p = fma(p, f, set1(9.6181291e-3f));
  p = fma(p, f, set1(5.5504109e-2f));
  p = fma(p, f, set1(2.4022651e-1f));
  p = fma(p, f, set1(6.9314718e-1f));
  p = fma(p, f, set1(1.f));
  return zero_below(scale_by_power_of_two(p, n), x, -125.f);
}

inline F32x16 tanh(F32x16 x) {  // 1 - 2 / (e^2x + 1)
  const F32x16 e = exp2(mul(min(set1(20.f), max(set1(-20.f), x)), set1(2.f * kLog2e)));
  return sub(set1(1.f), div(set1(2.f), add(e, set1(1.f))));
}

// Per-thread buffers of one item, carved from AttentionArgs::scratch.
template <class E>
struct Scratch {
  typename E::Arith* query;   // [rows][D]
  float* acc;                 // [rows][D] weighted sums of V, relative to running_max
  float* running_max;         // [rows] in base 2
  float* running_sum;         // [rows]
  int32_t* lower;             // [rows] first KV row seen
  int32_t* limit;             // [rows] one past the last KV row seen
  float* slope;               // [rows] ALiBi slope x log2(e)
  float* scores;              // [kRowBlock][kStepRows]
  typename E::Arith* probs;   // [kRowBlock][kStepRows]
  float* correction;          // [kRowBlock]
  typename E::Storage* edge;  // two tiles of V whose stale rows are zeroed

  static int64_t bytes(int32_t rows, int32_t head_size) {
    Scratch s;
    return s.carve(nullptr, rows, head_size);
  }
  int64_t carve(char* base, int64_t rows, int64_t head_size) {
    int64_t at = 0;
    auto take = [&](auto*& p, int64_t count) {
      p = reinterpret_cast<std::remove_reference_t<decltype(p)>>(base + at);
      at += align64(count * static_cast<int64_t>(sizeof(*p)));
    };
    take(query, rows * head_size);
    take(acc, rows * head_size);
    take(running_max, rows);
    take(running_sum, rows);
    take(lower, rows);
    take(limit, rows);
    take(slope, rows);
    take(scores, kRowBlock * kStepRows);
    take(probs, kRowBlock * kStepRows);
    take(correction, kRowBlock);
    take(edge, 2 * kTileRows * head_size);
    return at;
  }
};

// scores[MR][NT tiles of 16] = query[MR][D] . K; tiles[n]: [D/P][16][P]. While the first row block
// passes, the same bytes of V and of the next step's K are fetched.
template <class E, int MR, int NT, bool kFetch>
inline void score_block(const typename E::Arith* query, int head_size,
                        const typename E::Storage* const* tiles, float* scores,
                        const typename E::Storage* const* fetch_v,
                        const typename E::Storage* const* fetch_k) {
  constexpr int kStride = kTileRows * E::kPack;
  F32x16 acc[MR][NT];
#pragma GCC unroll 8
  for (int m = 0; m < MR; ++m) {
#pragma GCC unroll 8
    for (int n = 0; n < NT; ++n) acc[m][n] = set1(0.f);
  }
  const int packs = head_size / E::kPack;
  for (int k = 0; k < packs; ++k) {
    typename E::Right b[NT];
#pragma GCC unroll 8
    for (int n = 0; n < NT; ++n) {
      b[n] = E::right(tiles[n] + k * kStride);
      if constexpr (kFetch) {
        __builtin_prefetch(fetch_v[n] + k * kStride, 0, 3);
        __builtin_prefetch(fetch_k[n] + k * kStride, 0, 2);
      }
    }
#pragma GCC unroll 8
    for (int m = 0; m < MR; ++m) {
      const typename E::Left a = E::left(query + m * head_size + k * E::kPack);
#pragma GCC unroll 8
      for (int n = 0; n < NT; ++n) E::dot(acc[m][n], a, b[n]);
    }
  }
#pragma GCC unroll 8
  for (int m = 0; m < MR; ++m) {
#pragma GCC unroll 8
    for (int n = 0; n < NT; ++n) store(scores + m * kStepRows + n * kTileRows, acc[m][n]);
  }
}

// acc[MR][16 * NV dimensions] = acc * correction + probs[MR][16 * tiles] . V; tiles[t]: [16/P][D][P].
template <class E, int MR, int NV>
inline void value_block(const typename E::Arith* probs, const typename E::Storage* const* tiles,
                        int num_tiles, int dim, int head_size, const float* correction,
                        float* acc) {
  F32x16 sum[MR][NV];
#pragma GCC unroll 8
  for (int m = 0; m < MR; ++m) {
    const F32x16 c = set1(correction[m]);
#pragma GCC unroll 8
    for (int n = 0; n < NV; ++n) sum[m][n] = mul(c, load(acc + m * head_size + dim + 16 * n));
  }
  for (int t = 0; t < num_tiles; ++t) {
    const typename E::Storage* v = tiles[t] + dim * E::kPack;
    const typename E::Arith* p = probs + t * kTileRows;
    for (int k = 0; k < kTileRows / E::kPack; ++k) {
      typename E::Right b[NV];
#pragma GCC unroll 8
      for (int n = 0; n < NV; ++n) b[n] = E::right(v + n * 16 * E::kPack);
#pragma GCC unroll 8
      for (int m = 0; m < MR; ++m) {
        const typename E::Left a = E::left(p + m * kStepRows);
#pragma GCC unroll 8
        for (int n = 0; n < NV; ++n) E::dot(sum[m][n], a, b[n]);
      }
      v += head_size * E::kPack;
      p += E::kPack;
    }
  }
#pragma GCC unroll 8
  for (int m = 0; m < MR; ++m) {
#pragma GCC unroll 8
    for (int n = 0; n < NV; ++n) store(acc + m * head_size + dim + 16 * n, sum[m][n]);
  }
}

template <class E>
class Item {
  using Storage = typename E::Storage;
  using Arith = typename E::Arith;

 public:
  Item(const AttentionArgs& args, const WorkItem& work, Scratch<E>& scratch)
      : args_(args), work_(work), s_(scratch), head_size_(args.head_size) {
    const PlanView& plan = args.plan;
    group_ = plan.group_size;
    rows_ = work.query_count * group_;
    seq_len_ = plan.seq_lens[work.seq];
    query_len_ = plan.query_start[work.seq + 1] - plan.query_start[work.seq];
    blocks_ = plan.blocks + plan.block_start[work.seq];
    head_cache_ = static_cast<const Storage*>(args.cache) + work.kv_head * args.cache_stride_head;
  }

  void run() {
    begin();
    for (int kv = work_.kv_begin & ~(kTileRows - 1); kv < work_.kv_end; kv += kStepRows) step(kv);
    if (work_.split_group < 0) {
      for (int row = 0; row < rows_; ++row) {
        finish(row, s_.running_sum[row], s_.acc + row * head_size_);
      }
    } else {
      hand_over();
    }
  }

 private:
  int token(int row) const {
    return args_.plan.query_start[work_.seq] + work_.query_begin + row / group_;
  }
  int query_head(int row) const { return work_.kv_head * group_ + row % group_; }
  int position(int row) const { return seq_len_ - query_len_ + work_.query_begin + row / group_; }

  void begin() {
    const Storage* query = static_cast<const Storage*>(args_.query);
    const bool takes_sink = args_.sinks != nullptr && work_.split_index == 0;
    for (int row = 0; row < rows_; ++row) {
      const Storage* q = query + token(row) * args_.query_stride_token +
                         query_head(row) * args_.query_stride_head;
      for (int d = 0; d < head_size_; d += 16) {
        E::pack(s_.query + row * head_size_ + d, E::widen(q + d));
      }
      const int pos = position(row);
      s_.limit[row] = args_.plan.causal ? pos + 1 : seq_len_;
      const int window = args_.plan.window;
      s_.lower[row] = window > 0 && pos + 1 > window ? pos + 1 - window : 0;
      s_.slope[row] = args_.alibi_slopes ? args_.alibi_slopes[query_head(row)] * kLog2e : 0.f;
      s_.running_max[row] = takes_sink ? args_.sinks[query_head(row)] * kLog2e : kNegativeInfinity;
      s_.running_sum[row] = takes_sink ? 1.f : 0.f;
    }
    memset(s_.acc, 0, sizeof(float) * rows_ * head_size_);
    first_row_ = s_.lower[0];  // the lowest and the highest row that any query of the item sees
  }

  const Storage* key_tile(int row) const {
    const int block_size = args_.plan.block_size;
    return head_cache_ + blocks_[row / block_size] * args_.cache_stride_block +
           static_cast<int64_t>(row % block_size) * head_size_;
  }
  int64_t value_offset() const {
    return static_cast<int64_t>(args_.plan.block_size) * head_size_;
  }

  // Up to 64 KV rows from kv on.
  void step(int kv) {
    const int end = work_.kv_end;
    const int tiles = kv + kStepRows <= end ? kStepTiles : (end - kv + kTileRows - 1) / kTileRows;
    const Storage* keys[kStepTiles];
    const Storage* values[kStepTiles];
    const Storage* next[kStepTiles];
    for (int t = 0; t < kStepTiles; ++t) {
      const int row = t < tiles ? kv + t * kTileRows : kv;
      keys[t] = key_tile(row);
      values[t] = keys[t] + value_offset();
      next[t] = row + kStepRows < end ? key_tile(row + kStepRows) : keys[t];
    }
    const Storage* fetch_values[kStepTiles] = {values[0], values[1], values[2], values[3]};
    replace_stale_values(kv, tiles, values);

    for (int row = 0; row < rows_; row += kRowBlock) {
      const int count = rows_ - row < kRowBlock ? rows_ - row : kRowBlock;
      // Rows are in order of position: the last one of the block sees furthest.
      const int visible = s_.limit[row + count - 1] - kv;
      if (visible <= 0) continue;
      const int seen = (visible + kTileRows - 1) / kTileRows;
      const int used = seen < tiles ? seen : tiles;
      score(row, count, used, keys, row == 0, fetch_values, next);
      bool masked = s_.limit[row] < kv + used * kTileRows || s_.lower[row + count - 1] > kv;
      for (int m = 0; m < count; ++m) softmax(row + m, m, kv, used, masked);
      weigh(row, count, used, values);
    }
  }

  // Rows of V outside [first_row_, end of the sequence) are stale or belong to others.
  void replace_stale_values(int kv, int tiles, const Storage** values) {
    Storage* copy = s_.edge;
    for (int t = 0; t < tiles; ++t) {
      const int row = kv + t * kTileRows;
      const int lo = first_row_ - row, hi = seq_len_ - row;
      if (lo <= 0 && hi >= kTileRows) continue;
      // Items begin and end within a tile of their first and last row: at most two tiles get here.
      memcpy(copy, values[t], sizeof(Storage) * kTileRows * head_size_);
      for (int r = 0; r < kTileRows; ++r) {
        if (r >= lo && r < hi) continue;
        Storage* v = copy + (r / E::kPack) * head_size_ * E::kPack + r % E::kPack;
        for (int d = 0; d < head_size_; ++d) v[d * E::kPack] = 0;
      }
      values[t] = copy;
      copy += kTileRows * head_size_;
    }
  }

  template <int MR>
  void score_rows(int row, int tiles, const Storage** keys, bool fetch, const Storage** fetch_v,
                  const Storage** fetch_k) {
    const Arith* q = s_.query + row * head_size_;
    int t = 0;
    for (; t + kScoreTiles <= tiles; t += kScoreTiles) {
      if (fetch) {
        score_block<E, MR, kScoreTiles, true>(q, head_size_, keys + t, s_.scores + t * kTileRows,
                                              fetch_v + t, fetch_k + t);
      } else {
        score_block<E, MR, kScoreTiles, false>(q, head_size_, keys + t, s_.scores + t * kTileRows,
                                               fetch_v, fetch_k);
      }
    }
    for (; t < tiles; ++t) {
      score_block<E, MR, 1, false>(q, head_size_, keys + t, s_.scores + t * kTileRows, fetch_v,
                                   fetch_k);
    }
  }

  void score(int row, int count, int tiles, const Storage** keys, bool fetch,
             const Storage** fetch_v, const Storage** fetch_k) {
    dispatch<kRowBlock>(count, [&](auto mr) {
      score_rows<decltype(mr)::value>(row, tiles, keys, fetch, fetch_v, fetch_k);
    });
  }

  // One row's scores become probabilities relative to its new running maximum.
  void softmax(int row, int m, int kv, int tiles, bool masked) {
    float* scores = s_.scores + m * kStepRows;
    F32x16 x[kStepTiles];
    F32x16 top = set1(kNegativeInfinity);
    const float scale = args_.scale;
    const bool plain = args_.softcap == 0.f && args_.alibi_slopes == nullptr;
    for (int t = 0; t < tiles; ++t) {
      x[t] = load(scores + t * kTileRows);
      if (plain) {
        x[t] = mul(x[t], set1(scale * kLog2e));
      } else {
        if (args_.softcap != 0.f) {
          x[t] = mul(tanh(mul(x[t], set1(scale / args_.softcap))), set1(args_.softcap * kLog2e));
        } else {
          x[t] = mul(x[t], set1(scale * kLog2e));
        }
        const float distance = static_cast<float>(kv + t * kTileRows - position(row));
        x[t] = fma(add(iota(), set1(distance)), set1(s_.slope[row]), x[t]);
      }
      if (masked) {
        const int first = kv + t * kTileRows;
        x[t] = keep_lanes(x[t], s_.lower[row] - first, s_.limit[row] - first, kNegativeInfinity);
      }
      top = max(x[t], top);
    }
    Arith* probs = s_.probs + m * kStepRows;
    const float old_max = s_.running_max[row];
    const float row_max = reduce_max(top);
    const float new_max = row_max > old_max ? row_max : old_max;
    if (new_max == kNegativeInfinity) {  // nothing seen yet: zeros, and NaN for NaN scores
      F32x16 sum = set1(0.f);
      for (int t = 0; t < tiles; ++t) {
        const F32x16 p = exp2(x[t]);
        sum = add(sum, p);
        E::pack(probs + t * kTileRows, p);
      }
      s_.correction[m] = 1.f;
      s_.running_sum[row] += reduce_add(sum);
      return;
    }
    F32x16 sum = set1(0.f);
    const F32x16 origin = set1(new_max);
    for (int t = 0; t < tiles; ++t) {
      const F32x16 p = exp2(sub(x[t], origin));
      sum = add(sum, p);
      E::pack(probs + t * kTileRows, p);
    }
    const float correction = old_max == new_max ? 1.f : exp2f(old_max - new_max);
    s_.correction[m] = correction;
    s_.running_sum[row] = s_.running_sum[row] * correction + reduce_add(sum);
    s_.running_max[row] = new_max;
  }

  template <int MR>
  void weigh_rows(int row, int tiles, const Storage** values) {
    float* acc = s_.acc + row * head_size_;
    int dim = 0;
    for (; dim + 16 * kValueVectors <= head_size_; dim += 16 * kValueVectors) {
      value_block<E, MR, kValueVectors>(s_.probs, values, tiles, dim, head_size_, s_.correction,
                                        acc);
    }
    for (; dim < head_size_; dim += 16) {
      value_block<E, MR, 1>(s_.probs, values, tiles, dim, head_size_, s_.correction, acc);
    }
  }

  void weigh(int row, int count, int tiles, const Storage** values) {
    dispatch<kRowBlock>(
        count, [&](auto mr) { weigh_rows<decltype(mr)::value>(row, tiles, values); });
  }

  // out = acc / sum; a row that sees nothing is zero.
  void finish(int row, float sum, const float* acc) const {
    Storage* out = static_cast<Storage*>(args_.out) + token(row) * args_.out_stride_token +
                   query_head(row) * args_.out_stride_head;
    const F32x16 inverse = set1(sum == 0.f ? 0.f : 1.f / sum);
    for (int d = 0; d < head_size_; d += 16) E::narrow(out + d, mul(load(acc + d), inverse));
  }

  // Leaves this item's share in the workspace; the last one of the group merges all shares.
  void hand_over() {
    SplitGroup& group = args_.plan.split_groups[work_.split_group];
    const int64_t width = head_size_ + 2;
    float* shares = args_.partials + static_cast<int64_t>(group.first_partial) * width;
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

  template <int N>
  struct Constant {
    static constexpr int value = N;
  };
  // Calls body with the constant equal to n, 1 <= n <= N.
  template <int N, class Body>
  static void dispatch(int n, Body&& body) {
    if constexpr (N == 1) {
      body(Constant<1>{});
    } else {
      if (n == N) {
        body(Constant<N>{});
      } else {
        dispatch<N - 1>(n, body);
      }
    }
  }

  const AttentionArgs& args_;
  const WorkItem& work_;
  Scratch<E>& s_;
  const int head_size_;
  int group_, rows_, seq_len_, query_len_, first_row_ = 0;
  const int32_t* blocks_;
  const Storage* head_cache_;
};

template <class E>
void attend_share(const AttentionArgs& args, int thread) {
  Scratch<E> scratch;
  scratch.carve(args.scratch + thread * args.scratch_bytes, args.plan.max_rows, args.head_size);
  for (;;) {
    const int64_t i = __atomic_fetch_add(args.next_item, 1, __ATOMIC_RELAXED);
    if (i >= args.plan.num_items) return;
    Item<E>(args, args.plan.items[i], scratch).run();
  }
}

void attend_share_of(const AttentionArgs& args, int thread) {
  switch (args.dtype) {
    case DType::kFloat32:
      return attend_share<Float32>(args, thread);
    case DType::kFloat16:
      return attend_share<Float16>(args, thread);
    case DType::kBFloat16:
      return attend_share<BFloat16>(args, thread);
  }
}

void attend(const AttentionArgs& args) {
  if (args.num_threads == 1) return attend_share_of(args, 0);
#pragma omp parallel num_threads(args.num_threads)
  { attend_share_of(args, omp_get_thread_num()); }
}

int64_t scratch_bytes(int32_t max_rows, int32_t head_size) {
  return align64(Scratch<Float32>::bytes(max_rows, head_size));  // the widest element
}

}  // namespace
}  // namespace bmc::BMC_ISA_NAMESPACE
