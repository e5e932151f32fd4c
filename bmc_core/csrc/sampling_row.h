// One row of logits in scratch: its values, and the largest of each block.
//
// No std:: function or container here or in what is included: see attention.h.
#pragma once

#include "sampling.h"
#include "sampling_vectors.h"
#include "vector_math.h"

namespace bmc::BMC_ISA_NAMESPACE {
namespace {

constexpr float kLeastFloat = -__FLT_MAX__;

struct FloatLogits {
  using Value = float;
  static constexpr float kLowest = kNegativeInfinity;
  static F32x16 widen(const Value* p) { return load(p); }
};
struct HalfLogits {
  using Value = uint16_t;
  static constexpr uint16_t kLowest = 0xfc00;
  static F32x16 widen(const Value* p) { return load_half(p); }
};
struct BFloatLogits {
  using Value = uint16_t;
  static constexpr uint16_t kLowest = 0xff80;
  static F32x16 widen(const Value* p) { return load_bfloat(p); }
};

// Sixteen logits from index i on; -inf behind the vocabulary.
template <class E>
inline F32x16 widen_at(const typename E::Value* logits, int64_t i, int32_t vocab) {
  if (i + 16 <= vocab) return E::widen(logits + i);
  typename E::Value last[16];
  for (int64_t lane = 0; lane < 16; ++lane)
    last[lane] = i + lane < vocab ? logits[i + lane] : E::kLowest;
  return E::widen(last);
}

struct Row {
  float* values;      // [blocks x kNoiseBlock] logits / temperature; -inf behind the vocabulary
  float* candidates;  // the same room, for those that may be kept
  float* block_max;   // [blocks], -inf up to a multiple of 16
  float* block_candidates;
  int64_t blocks;
  int32_t vocab;
  float best;  // the largest value; -inf where there is none

  Row(float* scratch, int32_t vocab_size) : vocab(vocab_size), best(kNegativeInfinity) {
    blocks = (vocab + kNoiseBlock - 1) / kNoiseBlock;
    const int64_t rounded = (blocks + 15) / 16 * 16;
    values = scratch;
    candidates = values + blocks * kNoiseBlock;
    block_max = candidates + blocks * kNoiseBlock;
    block_candidates = block_max + rounded;
    for (int64_t b = blocks; b < rounded; ++b) block_max[b] = kNegativeInfinity;
  }

  // One block: stores its values if asked to, returns the largest. A NaN is never the largest.
  template <class E, bool kStore>
  float load_block(const typename E::Value* logits, int64_t block, float temperature) {
    const F32x16 divisor = set1(temperature);
    const int64_t begin = block * kNoiseBlock, end = begin + kNoiseBlock;
    const auto take = [&](int64_t i, F32x16 most) {
      F32x16 value = end <= vocab ? E::widen(logits + i) : widen_at<E>(logits, i, vocab);
      if (temperature != 1.f) value = div(value, divisor);
      if constexpr (kStore) store(values + i, value);
      return max(value, most);
    };
    F32x16 even = set1(kNegativeInfinity), odd = even;
    for (int64_t i = begin; i < end; i += 32) {
      even = take(i, even);
      odd = take(i + 16, odd);
    }
    return reduce_max(max(even, odd));
  }

  template <class E, bool kStore>
  void load_all(const typename E::Value* logits, float temperature) {
    best = kNegativeInfinity;
    for (int64_t b = 0; b < blocks; ++b) {
      block_max[b] = load_block<E, kStore>(logits, b, temperature);
      best = block_max[b] > best ? block_max[b] : best;
    }
  }

  // The first of the largest values; 0 where there is none. Needs the values of their block alone.
  int32_t first_of_best(int64_t block) const {
    const F32x16 most = set1(best);
    for (int64_t i = block * kNoiseBlock; i < (block + 1) * kNoiseBlock; i += 16) {
      const uint32_t lanes = equal(load(values + i), most);
      if (lanes != 0) return static_cast<int32_t>(i) + __builtin_ctz(lanes);
    }
    return 0;
  }

  int64_t block_of_best() const {
    for (int64_t b = 0; b < blocks; ++b)
      if (block_max[b] == best) return b;
    return 0;
  }

  int32_t argmax() const { return best == kNegativeInfinity ? 0 : first_of_best(block_of_best()); }
};

// The first of the largest logits, and no value stored but those of its block.
template <class E>
int32_t argmax_of(Row& row, const typename E::Value* logits) {
  row.load_all<E, false>(logits, 1.f);
  if (row.best == kNegativeInfinity) return 0;
  const int64_t block = row.block_of_best();
  row.load_block<E, true>(logits, block, 1.f);
  return row.first_of_best(block);
}

}  // namespace
}  // namespace bmc::BMC_ISA_NAMESPACE
