// An item computed with vector registers: 64 KV rows at a time, a few query rows by a few vectors
// in registers. Any element type, head size and block size.
#pragma once

#include "item.h"

namespace bmc::BMC_ISA_NAMESPACE {
namespace {

// Cache lines of some tiles (of none where tiles is null), fetched one by one in the order of their
// addresses: the hardware's own prefetcher follows that, and does not follow the products, which
// read several tiles at once.
class Lines {
 public:
  Lines(const char* const* tiles, int count, int tile_bytes)
      : tile_(tiles), last_(tiles != nullptr ? tiles + count : nullptr), bytes_(tile_bytes) {}
  void fetch() {
    if (tile_ == last_) return;
    __builtin_prefetch(*tile_ + at_, 0, 2);
    at_ += 64;
    if (at_ < bytes_) return;
    at_ = 0;
    ++tile_;
  }

 private:
  const char* const* tile_;
  const char* const* last_;
  int bytes_, at_ = 0;
};

// scores[MR][NT tiles of 16] = query[MR][D] . K; tiles[n]: [D/P][16][P]. With kFetch, as many bytes
// of lines are fetched as are read.
template <class E, int MR, int NT, bool kFetch>
inline void score_block(const typename E::Arith* query, int head_size,
                        const typename E::Storage* const* tiles, float* scores, Lines* lines) {
  constexpr int kStride = kTileRows * E::kPack;
  constexpr int kFetched = (NT * kStride * sizeof(typename E::Storage) + 63) / 64;
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
    }
    if constexpr (kFetch) {
#pragma GCC unroll 8
      for (int n = 0; n < kFetched; ++n) lines->fetch();
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
    for (int n = 0; n < NT; ++n) store(scores + m * kPanelColumns + n * kTileRows, acc[m][n]);
  }
}

// acc[MR][16 * NV dimensions] = acc * correction + probs[MR][16 * tiles] . V, where tiles[t] is
// [16/P][D][P]. With kFetch, as many bytes of lines are fetched as are read.
template <class E, int MR, int NV, bool kFetch>
inline void value_block(const typename E::Arith* probs, const typename E::Storage* const* tiles,
                        int num_tiles, int dim, int head_size, const float* correction, float* acc,
                        Lines* lines) {
  constexpr int kFetched = (NV * 16 * E::kPack * sizeof(typename E::Storage) + 63) / 64;
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
      if constexpr (kFetch) {
#pragma GCC unroll 8
        for (int n = 0; n < kFetched; ++n) lines->fetch();
      }
#pragma GCC unroll 8
      for (int m = 0; m < MR; ++m) {
        const typename E::Left a = E::left(p + m * kPanelColumns);
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

template <int N>
struct Constant {
  static constexpr int value = N;
};
// Calls body with the constant equal to n, 1 <= n <= N.
template <int N, class Body>
inline void dispatch(int n, Body&& body) {
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

template <class E>
class VectorItem : Item<E> {
  using Base = Item<E>;
  using Base::args_, Base::head_size_, Base::rows_, Base::s_, Base::work_;
  using typename Base::Arith;
  using typename Base::Storage;

 public:
  VectorItem(const AttentionArgs& args, const WorkItem& work, Scratch<E>& scratch, Queue& queue)
      : Base(args, work, scratch, queue) {}

  void run() {
    if (rows_ <= kRowBlock) Base::unit_ = E::kUnit;
    Base::begin();
    edge_ = s_.edge;
    for (int kv = work_.kv_begin & ~(kTileRows - 1); kv < work_.kv_end; kv += kStepRows) step(kv);
    Base::end();
  }

 private:
  using Wide = typename E::Wide;
  static constexpr bool kQuantized = !std::is_same_v<E, Wide>;

  // Tiles of one step as the products see them: the cache itself, or an unpacked copy.
  template <class W>
  struct Tiles {
    const typename W::Storage* keys[kStepTiles];
    const typename W::Storage* values[kStepTiles];
    int count;
  };
  // Fetched while the scores are computed and while the values are weighed: memory never idles.
  struct Fetch {
    const char* values[kStepTiles];
    const char* next_keys[kStepTiles];
  };

  // Up to 64 KV rows from kv on.
  void step(int kv) {
    const int end = work_.kv_end;
    Tiles<E> tiles;
    Fetch fetch;
    tiles.count = kv + kStepRows <= end ? kStepTiles : (end - kv + kTileRows - 1) / kTileRows;
    for (int t = 0; t < kStepTiles; ++t) {
      const int row = t < tiles.count ? kv + t * kTileRows : kv;
      const Storage* key = Base::key_tile(row);
      const Storage* value = key + Base::value_offset();
      const char* next =
          Base::upcoming_keys(kv + t * kTileRows + kStepRows, kv + kStepRows, kTileRows);
      tiles.keys[t] = key;
      tiles.values[t] =
          t < tiles.count ? Base::usable_values(value, row, kTileRows, edge_) : nullptr;
      fetch.values[t] = reinterpret_cast<const char*>(value);
      fetch.next_keys[t] = next != nullptr ? next : reinterpret_cast<const char*>(key);
    }
    if constexpr (kQuantized) {
      // Each row block would decode the same codes again.
      if (rows_ > kRowBlock) {
        Tiles<Wide> wide;
        wide.count = tiles.count;
        unpack(tiles.keys, tiles.count, 0, wide.keys);
        unpack(tiles.values, tiles.count, 1, wide.values);
        return attend_rows<Wide>(kv, wide, nullptr);
      }
    }
    attend_rows<E>(kv, tiles, &fetch);
  }

  // Copies of quantized tiles of K (part 0) or V (1), in units of the item.
  void unpack(const Storage* const* tiles, int count, int part,
              const typename Wide::Storage** wide) const {
    const int tile = kTileRows * head_size_;
    for (int t = 0; t < count; ++t) {
      uint16_t* copy = s_.unpacked + (2 * t + part) * tile;
      E::unpack(tiles[t], tile, 1.f / Base::unit_, copy);
      wide[t] = copy;
    }
  }

  // Whether the codes of all tiles may be decoded in registers.
  bool decodes(const Storage* const* tiles, int count) const {
    for (int t = 0; t < count; ++t) {
      if (!E::decodes(tiles[t], kTileRows * head_size_)) return false;
    }
    return true;
  }

  template <class W>
  void attend_rows(int kv, const Tiles<W>& tiles, const Fetch* fetch) {
    for (int row = 0; row < rows_; row += kRowBlock) {
      const int count = rows_ - row < kRowBlock ? rows_ - row : kRowBlock;
      // Rows are in order of position: the last one of the block sees furthest.
      const int visible = s_.limit[row + count - 1] - kv;
      if (visible <= 0) continue;
      const int seen = (visible + kTileRows - 1) / kTileRows;
      const int used = seen < tiles.count ? seen : tiles.count;
      dispatch<kRowBlock>(count, [&](auto mr) {
        score<W, decltype(mr)::value>(row, used, tiles.keys, row == 0 ? fetch : nullptr);
      });
      const bool masked = s_.limit[row] < kv + used * kTileRows || s_.lower[row + count - 1] > kv;
      for (int m = 0; m < count; ++m) {
        s_.correction[m] =
            Base::softmax(row + m, s_.scores + m * kPanelColumns, s_.probs + m * kPanelColumns, kv,
                          used * kTileRows, masked);
      }
      dispatch<kRowBlock>(count, [&](auto mr) {
        weigh<W, decltype(mr)::value>(row, used, tiles.values, row == 0 ? fetch : nullptr);
      });
    }
  }

  template <class W, int MR>
  void score(int row, int tiles, const typename W::Storage* const* keys, const Fetch* fetch) {
    if constexpr (W::kUnit != 1.f) {
      if (!decodes(keys, tiles)) {
        const typename Wide::Storage* wide[kStepTiles];
        unpack(keys, tiles, 0, wide);
        return score<Wide, MR>(row, tiles, wide, nullptr);
      }
    }
    const Arith* q = s_.query + row * head_size_;
    Lines lines(fetch != nullptr ? fetch->values : nullptr, tiles, tile_bytes());
    int t = 0;
    for (; t + kScoreTiles <= tiles; t += kScoreTiles) {
      float* scores = s_.scores + t * kTileRows;
      if (fetch != nullptr) {
        score_block<W, MR, kScoreTiles, true>(q, head_size_, keys + t, scores, &lines);
      } else {
        score_block<W, MR, kScoreTiles, false>(q, head_size_, keys + t, scores, nullptr);
      }
    }
    for (; t < tiles; ++t) {
      score_block<W, MR, 1, false>(q, head_size_, keys + t, s_.scores + t * kTileRows, nullptr);
    }
  }

  template <class W, int MR>
  void weigh(int row, int tiles, const typename W::Storage* const* values, const Fetch* fetch) {
    if constexpr (W::kUnit != 1.f) {
      if (!decodes(values, tiles)) {
        const typename Wide::Storage* wide[kStepTiles];
        unpack(values, tiles, 1, wide);
        return weigh<Wide, MR>(row, tiles, wide, nullptr);
      }
    }
    if (fetch != nullptr) {
      Lines lines(fetch->next_keys, tiles, tile_bytes());
      weigh_dims<W, MR, true>(row, tiles, values, &lines);
    } else {
      weigh_dims<W, MR, false>(row, tiles, values, nullptr);
    }
  }

  template <class W, int MR, bool kFetch>
  void weigh_dims(int row, int tiles, const typename W::Storage* const* values, Lines* lines) {
    float* acc = s_.acc + row * head_size_;
    int dim = 0;
    for (; dim + 16 * kValueVectors <= head_size_; dim += 16 * kValueVectors) {
      value_block<W, MR, kValueVectors, kFetch>(s_.probs, values, tiles, dim, head_size_,
                                                s_.correction, acc, lines);
    }
    for (; dim < head_size_; dim += 16) {
      value_block<W, MR, 1, kFetch>(s_.probs, values, tiles, dim, head_size_, s_.correction, acc,
                                    lines);
    }
  }

  int tile_bytes() const { return kTileRows * head_size_ * static_cast<int>(sizeof(Storage)); }

  Storage* edge_ = nullptr;
};

}  // namespace
}  // namespace bmc::BMC_ISA_NAMESPACE
