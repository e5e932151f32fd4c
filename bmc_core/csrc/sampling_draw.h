// Tokens from what a row keeps: the largest of value + Gumbel noise, and what speculative sampling
// takes where it rejects a draft token.
//
// No std:: function or container here or in what is included: see attention.h.
#pragma once

#include "sampling_select.h"

namespace bmc::BMC_ISA_NAMESPACE {
namespace {

// In (0, 1), 53 bits of the noise.
inline double uniform(uint64_t noise) { return (static_cast<double>(noise >> 11) + 0.5) * 0x1p-53; }

inline double gumbel(uint64_t noise) { return -log(-log(uniform(noise))); }

// The least noise with which a value that is `behind` the score to beat might win: it must be that
// -log u < e^-behind, and -log u is no less than 1 - u.
inline uint64_t least_winning_noise(double behind) {
  const double reach = exp(-behind) * (1. + 1e-12);
  if (reach > 0.99) return 0;
  return ~(static_cast<uint64_t>(reach * 0x1p64) + 4096);
}

constexpr double kMostNoise = 37.5;  // 53 bits of u give no more

int32_t draw(const Row& row, const Cut& cut, uint64_t seed) {
  const uint64_t key = mix(seed);
  int32_t token = row.best == cut.least && cut.ties_from > 0 ? cut.ties_from : row.argmax();
  double value = row.best, noise = gumbel(noise_of(key, token));
  const F32x16 least = set1(cut.least);
  for (int64_t b = 0; b < row.blocks; ++b) {
    const double behind = value + noise - row.block_max[b];
    if (row.block_max[b] < cut.least || behind >= kMostNoise) continue;
    const uint64_t winning = least_winning_noise(behind);
    for (int64_t i = b * kNoiseBlock; i < (b + 1) * kNoiseBlock; i += 16) {
      uint32_t lanes = at_least(load(row.values + i), least);
      if (lanes == 0) continue;
      lanes &= noise_at_least(key, i, winning);
      for (; lanes != 0; lanes &= lanes - 1) {
        const int32_t other = static_cast<int32_t>(i) + __builtin_ctz(lanes);
        const float its = row.values[other];
        if (its == cut.least && other < cut.ties_from) continue;
        const double its_noise = gumbel(noise_of(key, other));
        // Not value + noise: the noise would be lost in a large value.
        if (its - value + its_noise <= noise) continue;
        token = other;
        value = its;
        noise = its_noise;
      }
    }
  }
  return token;
}

// Sets what is not kept to -inf; `out` is the row's values or as long as the vocabulary.
void cut_row(const Row& row, const Cut& cut, float* out) {
  const F32x16 least = set1(cut.least), nothing = set1(kNegativeInfinity);
  for (int64_t i = 0; i < row.vocab; i += 16) {
    const F32x16 value = load(row.values + i);
    float kept[16];
    store(kept, keep_at_least(value, least, nothing));
    if (i < cut.ties_from) {
      for (uint32_t ties = equal(value, least); ties != 0; ties &= ties - 1) {
        const int lane = __builtin_ctz(ties);
        if (i + lane < cut.ties_from) kept[lane] = kNegativeInfinity;
      }
    }
    const int64_t lanes = row.vocab - i < 16 ? row.vocab - i : 16;
    memcpy(out + i, kept, static_cast<size_t>(lanes) * sizeof(float));
  }
}

struct Probabilities : FloatLogits {
  static constexpr float kLowest = 0.f;
};

// How much more likely sixteen tokens are by the row than by the draft, where they are.
inline F32x16 excess(const Row& row, const TokenMass& mass, float unit, const float* draft_probs,
                     int64_t i) {
  const F32x16 target = mul(mass.of(load(row.values + i)), set1(unit));
  return max(sub(target, widen_at<Probabilities>(draft_probs, i, row.vocab)), set1(0.f));
}

// A token from max(target - draft, 0), of a row that was cut; u in (0, 1). -1 where there is none.
int32_t recover(const Row& row, const Cut& cut, const float* draft_probs, double u) {
  const TokenMass mass{row.best};
  const float unit = static_cast<float>(1. / cut.mass);
  double total = 0.;
  for (int64_t b = 0; b < row.blocks; ++b) {
    F32x16 part = set1(0.f);
    for (int64_t i = b * kNoiseBlock; i < (b + 1) * kNoiseBlock && i < row.vocab; i += 16)
      part = add(part, excess(row, mass, unit, draft_probs, i));
    row.candidates[b] = reduce_add(part);
    total += row.candidates[b];
  }
  double left = u * total;
  int32_t last = -1;  // where rounding leaves something of u over
  for (int64_t b = 0; b < row.blocks; ++b) {
    if (row.candidates[b] <= 0.f) continue;
    const bool within = left < row.candidates[b];
    if (!within) left -= row.candidates[b];
    float shares[16];
    for (int64_t i = b * kNoiseBlock; i < (b + 1) * kNoiseBlock && i < row.vocab; i += 16) {
      store(shares, excess(row, mass, unit, draft_probs, i));
      for (int lane = 0; lane < 16; ++lane) {
        if (shares[lane] <= 0.f || i + lane >= row.vocab) continue;
        last = static_cast<int32_t>(i) + lane;
        if (within && left < shares[lane]) return last;
        if (within) left -= shares[lane];
      }
    }
    if (within) return last;
  }
  return last;
}

}  // namespace
}  // namespace bmc::BMC_ISA_NAMESPACE
