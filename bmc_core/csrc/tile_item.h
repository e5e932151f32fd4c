// An item computed with AMX matrix tiles (bfloat16 queries): up to 32 query rows by 256 KV rows at
// a time. The cache layout is already what the tiles want: a K tile [D/2][16][2] is D/32 right-hand
// tiles of 16 pair rows by 64 bytes, and V's row pairs [rows/2][D][2] are right-hand tiles with a
// row stride of D pairs. Worth it from about one tile of query rows on; needs head and block sizes
// in steps of 32.
#pragma once

#include "item.h"

namespace bmc::BMC_ISA_NAMESPACE {
namespace {

constexpr int kTileDim = 32;    // dimensions, or KV rows, that one tile product sums over
constexpr int kGroupRows = 32;  // KV rows of one right-hand pair of tiles
constexpr int kMinTileRows = 4;
constexpr int kMinUnpackedRows = 8;  // fewer decode fp8 in registers

// The compiler's tile intrinsics do not say that they read memory.
inline void stores_before_tiles() { __asm__ volatile("" ::: "memory"); }

// Rows of this thread's tiles: 0 to 5 hold query rows (sums, query, probabilities), 6 and 7 K or V.
// A product takes as many cycles as its left tile has rows.
class TileConfig {
 public:
  ~TileConfig() {
    if (query_rows_ != 0) _tile_release();
  }
  void set_query_rows(int rows) {
    if (rows == query_rows_) return;
    query_rows_ = rows;
    alignas(64) uint8_t bytes[64] = {};
    bytes[0] = 1;  // palette
    for (int t = 0; t < 8; ++t) {
      bytes[16 + 2 * t] = 64;  // bytes per row
      bytes[48 + t] = static_cast<uint8_t>(t < 6 ? rows : 16);
    }
    _tile_loadconfig(bytes);
  }

 private:
  int query_rows_ = 0;
};

template <class E>
class TileItem : Item<E> {
  using Base = Item<E>;
  using Base::args_, Base::head_size_, Base::rows_, Base::s_, Base::work_;
  using typename Base::Arith;
  using typename Base::Storage;
  using Wide = uint16_t;
  static constexpr bool kUnpack = sizeof(Storage) == 1;

 public:
  TileItem(const AttentionArgs& args, const WorkItem& work, Scratch<E>& scratch, Queue& queue)
      : Base(args, work, scratch, queue) {}

  static bool fits(const AttentionArgs& args, const WorkItem& work) {
    const int least = kUnpack ? kMinUnpackedRows : kMinTileRows;
    return work.query_count * work.head_count >= least && args.head_size % kTileDim == 0 &&
           args.plan.block_size % kGroupRows == 0;
  }

  void run(TileConfig& config) {
    config.set_query_rows(rows_ < 16 ? rows_ : 16);
    Base::begin();
    edge_ = s_.edge;
    for (int kv = work_.kv_begin & ~(kGroupRows - 1); kv < work_.kv_end; kv += kPanelColumns) {
      step(kv);
    }
    Base::end();
  }

 private:
  static constexpr int kGroups = kPanelColumns / kGroupRows;

  void step(int kv) {
    const int rest = work_.kv_end - kv;
    const int groups = rest >= kPanelColumns ? kGroups : (rest + kGroupRows - 1) / kGroupRows;
    const Wide* keys[kGroups];
    const Wide* values[kGroups];
    const char* fetch_values[kGroups];
    const char* fetch_keys[kGroups];
    for (int g = 0; g < groups; ++g) {
      const int row = kv + g * kGroupRows;
      const Storage* key = Base::key_tile(row);
      const Storage* value = key + Base::value_offset();
      fetch_values[g] = reinterpret_cast<const char*>(value);
      const char* next = Base::upcoming_keys(row + kPanelColumns, kv + kPanelColumns, kGroupRows);
      fetch_keys[g] = next != nullptr ? next : reinterpret_cast<const char*>(key);
      value = Base::usable_values(value, row, kGroupRows, edge_);
      if constexpr (kUnpack) {
        const int count = kGroupRows * head_size_;
        Wide* unpacked = s_.unpacked + 2 * g * count;
        E::unpack(key, count, 1.f, unpacked);
        E::unpack(value, count, 1.f, unpacked + count);
        keys[g] = unpacked;
        values[g] = unpacked + count;
      } else {
        keys[g] = key;
        values[g] = value;
      }
    }
    static_assert(kQueryBlockRows % kPanelRows == 0);
    Panel panels[kQueryBlockRows / kPanelRows];
    int count = 0;
    for (int row = 0; row < rows_; row += kPanelRows) {
      Panel& panel = panels[count];
      panel.row = row;
      panel.kv = kv;
      panel.rows = rows_ - row < kPanelRows ? rows_ - row : kPanelRows;
      const int visible = s_.limit[row + panel.rows - 1] - kv;
      if (visible <= 0) continue;
      const int seen = (visible + kGroupRows - 1) / kGroupRows;
      panel.groups = seen < groups ? seen : groups;
      const int columns = panel.groups * kGroupRows;
      panel.masked = s_.limit[row] < kv + columns || s_.lower[row + panel.rows - 1] > kv;
      panel.scores = s_.scores + (count % kPanels) * kPanelRows * kPanelColumns;
      panel.probs = s_.probs + (count % kPanels) * kPanelRows * kPanelColumns;
      ++count;
    }
    if (count == 0) return;
    // The first panel of rows streams K and V in; for the others both are in the cache.
    InterleavedSoftmax nothing(*this);
    score(panels[0], keys, fetch_values, nothing);
    for (int i = 0; i < count; ++i) {
      const Panel* before = i > 0 ? &panels[i - 1] : nullptr;
      const Panel* after = i + 1 < count ? &panels[i + 1] : nullptr;
      InterleavedSoftmax softmax(*this, panels[i], before, after);
      if (after != nullptr) score(*after, keys, nullptr, softmax);
      if (before != nullptr) weigh(*before, values, i == 1 ? fetch_keys : nullptr, softmax);
      softmax.finish();
    }
    weigh(panels[count - 1], values, count == 1 ? fetch_keys : nullptr, nothing);
  }

  // Up to 32 query rows over the KV rows of a step.
  struct Panel {
    int row, rows, kv, groups;
    bool masked;
    float* scores;  // [32][kPanelColumns]
    Arith* probs;   // [32][kPanelColumns]
    bool two() const { return rows > 16; }
  };

  // The softmax of a panel, a row at a time between the products of its neighbors: the matrix unit
  // and the vector units work at the same time.
  class InterleavedSoftmax {
   public:
    explicit InterleavedSoftmax(TileItem& item)
        : item_(item), panel_(nullptr), rows_(0), turns_(1) {}
    InterleavedSoftmax(TileItem& item, const Panel& panel, const Panel* before, const Panel* after)
        : item_(item), panel_(&panel), rows_(panel.rows), turns_(0) {
      const int dims = item.head_size_ / kTileDim;
      if (before != nullptr && before->two()) turns_ += before->groups * dims;
      if (after != nullptr && after->two()) turns_ += after->groups * dims;
    }
    void turn() {
      due_ += rows_;
      while (due_ >= turns_ && next_ < rows_) {
        due_ -= turns_;
        item_.softmax_row(*panel_, next_++);
      }
    }
    void finish() {
      while (next_ < rows_) item_.softmax_row(*panel_, next_++);
    }

   private:
    TileItem& item_;
    const Panel* panel_;
    int rows_, turns_, due_ = 0, next_ = 0;
  };

  void softmax_row(const Panel& panel, int m) {
    const int row = panel.row + m;
    const float correction =
        Base::softmax(row, panel.scores + m * kPanelColumns, panel.probs + m * kPanelColumns,
                      panel.kv, panel.groups * kGroupRows, panel.masked);
    if (correction != 1.f) rescale(row, correction);
  }

  void score(const Panel& panel, const Wide* const* keys, const char* const* fetch_v,
             InterleavedSoftmax& interleaved) {
    panel.two() ? score_two(panel, keys, fetch_v, interleaved) : score_one(panel, keys, fetch_v);
  }
  void weigh(const Panel& panel, const Wide* const* values, const char* const* fetch_k,
             InterleavedSoftmax& interleaved) {
    panel.two() ? weigh_two(panel, values, fetch_k, interleaved)
                : weigh_one(panel, values, fetch_k);
  }

  // The part of a group's K or V that belongs to dimensions [d, d + 32).
  static void fetch(const char* group, int d) {
    constexpr int kBytes = kGroupRows * sizeof(Storage);
    for (int i = 0; i < kTileDim * kBytes; i += 64)
      __builtin_prefetch(group + d * kBytes + i, 0, 2);
  }

  void rescale(int row, float correction) {
    float* acc = s_.acc + row * head_size_;
    for (int d = 0; d < head_size_; d += 16) {
      store(acc + d, mul(load(acc + d), set1(correction)));
    }
  }

  int64_t query_stride() const { return head_size_ * static_cast<int64_t>(sizeof(Arith)); }
  int64_t acc_stride() const { return head_size_ * static_cast<int64_t>(sizeof(float)); }
  int64_t value_stride() const { return head_size_ * 2 * static_cast<int64_t>(sizeof(Wide)); }
  static constexpr int64_t kScoreStride = kPanelColumns * sizeof(float);
  static constexpr int64_t kProbStride = kPanelColumns * sizeof(Arith);

  // scores[16][32 * groups] = query . K. So few rows wait for memory: K is read in the order of its
  // addresses.
  void score_one(const Panel& panel, const Wide* const* keys, const char* const* fetch_v) {
    const Arith* q = s_.query + panel.row * head_size_;
    const int64_t second_tile = kTileRows * head_size_;
    stores_before_tiles();
    for (int g = 0; g < panel.groups; ++g) {
      const Wide* key = keys[g];
      _tile_zero(0);
      for (int d = 0; d < head_size_; d += kTileDim) {
        if (fetch_v != nullptr) fetch(fetch_v[g], d);
        _tile_loadd(6, key + d * kTileRows, 64);
        _tile_loadd(4, q + d, query_stride());
        _tile_dpbf16ps(0, 4, 6);
      }
      _tile_zero(1);
      for (int d = 0; d < head_size_; d += kTileDim) {
        _tile_loadd(7, key + second_tile + d * kTileRows, 64);
        _tile_loadd(5, q + d, query_stride());
        _tile_dpbf16ps(1, 5, 7);
      }
      float* scores = panel.scores + g * kGroupRows;
      _tile_stored(0, scores, kScoreStride);
      _tile_stored(1, scores + 16, kScoreStride);
    }
    stores_before_tiles();
  }

  // acc[16][D] += probs[16][32 * groups] . V, with V read in the order of its addresses.
  void weigh_one(const Panel& panel, const Wide* const* values, const char* const* fetch_k) {
    float* acc = s_.acc + panel.row * head_size_;
    stores_before_tiles();
    for (int g = 0; g < panel.groups; ++g) {
      _tile_loadd(4, panel.probs + g * kGroupRows, kProbStride);
      for (int d = 0; d < head_size_; d += 32) {
        if (fetch_k != nullptr) fetch(fetch_k[g], d);
        float* out = acc + d;
        _tile_loadd(0, out, acc_stride());
        _tile_loadd(1, out + 16, acc_stride());
        _tile_loadd(6, values[g] + d * 2, value_stride());
        _tile_loadd(7, values[g] + d * 2 + 32, value_stride());
        _tile_dpbf16ps(0, 4, 6);
        _tile_dpbf16ps(1, 4, 7);
        _tile_stored(0, out, acc_stride());
        _tile_stored(1, out + 16, acc_stride());
      }
    }
    stores_before_tiles();
  }

  // scores[32][32 * groups] = query . K, each K tile used for two tiles of rows.
  void score_two(const Panel& panel, const Wide* const* keys, const char* const* fetch_v,
                 InterleavedSoftmax& interleaved) {
    const Arith* q = s_.query + panel.row * head_size_;
    const int64_t second_tile = kTileRows * head_size_;
    stores_before_tiles();
    for (int g = 0; g < panel.groups; ++g) {
      _tile_zero(0);
      _tile_zero(1);
      _tile_zero(2);
      _tile_zero(3);
      const Wide* key = keys[g];
      for (int d = 0; d < head_size_; d += kTileDim) {
        if (fetch_v != nullptr) fetch(fetch_v[g], d);
        _tile_loadd(6, key + d * kTileRows, 64);
        _tile_loadd(7, key + second_tile + d * kTileRows, 64);
        _tile_loadd(4, q + d, query_stride());
        _tile_dpbf16ps(0, 4, 6);
        _tile_dpbf16ps(1, 4, 7);
        _tile_loadd(5, q + 16 * head_size_ + d, query_stride());
        _tile_dpbf16ps(2, 5, 6);
        _tile_dpbf16ps(3, 5, 7);
        interleaved.turn();
      }
      float* scores = panel.scores + g * kGroupRows;
      _tile_stored(0, scores, kScoreStride);
      _tile_stored(1, scores + 16, kScoreStride);
      _tile_stored(2, scores + 16 * kPanelColumns, kScoreStride);
      _tile_stored(3, scores + 16 * kPanelColumns + 16, kScoreStride);
    }
    stores_before_tiles();
  }

  // acc[32][D] += probs[32][32 * groups] . V; sums stay in tiles over all groups.
  void weigh_two(const Panel& panel, const Wide* const* values, const char* const* fetch_k,
                 InterleavedSoftmax& interleaved) {
    float* acc = s_.acc + panel.row * head_size_;
    stores_before_tiles();
    for (int d = 0; d < head_size_; d += 32) {
      float* out = acc + d;
      _tile_loadd(0, out, acc_stride());
      _tile_loadd(1, out + 16, acc_stride());
      _tile_loadd(2, out + 16 * head_size_, acc_stride());
      _tile_loadd(3, out + 16 * head_size_ + 16, acc_stride());
      for (int g = 0; g < panel.groups; ++g) {
        if (fetch_k != nullptr) fetch(fetch_k[g], d);
        const Arith* p = panel.probs + g * kGroupRows;
        _tile_loadd(6, values[g] + d * 2, value_stride());
        _tile_loadd(7, values[g] + d * 2 + 32, value_stride());
        _tile_loadd(4, p, kProbStride);
        _tile_dpbf16ps(0, 4, 6);
        _tile_dpbf16ps(1, 4, 7);
        _tile_loadd(5, p + 16 * kPanelColumns, kProbStride);
        _tile_dpbf16ps(2, 5, 6);
        _tile_dpbf16ps(3, 5, 7);
        interleaved.turn();
      }
      _tile_stored(0, out, acc_stride());
      _tile_stored(1, out + 16, acc_stride());
      _tile_stored(2, out + 16 * head_size_, acc_stride());
      _tile_stored(3, out + 16 * head_size_ + 16, acc_stride());
    }
    stores_before_tiles();
  }

  Storage* edge_ = nullptr;
};

}  // namespace
}  // namespace bmc::BMC_ISA_NAMESPACE
