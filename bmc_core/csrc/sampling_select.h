// Which tokens top-k and top-p keep, found by narrowing an interval of values instead of sorting:
// a pass weighs the values at or above eight pivots, and only those between two of them stay.
//
// Promises what sorting promises: top-k keeps all that equal the k-th largest value; top-p keeps,
// from the largest down, tokens while those before them have less than p of the probability; of
// equal values those of higher numbers come first, and the first token is always kept.
#pragma once

#include <math.h>

#include "sampling_row.h"

namespace bmc::BMC_ISA_NAMESPACE {
namespace {

constexpr int kPivots = 8;
constexpr int kFew = 48;          // values that are sorted instead
constexpr int64_t kChunk = 4096;  // values whose weights are summed in float
// e^-30 of the vocabulary's largest share is below what its sum can resolve.
constexpr float kNegligible = 30.f;

// What a row keeps: values above `least`, and those equal to it from token `ties_from` on.
struct Cut {
  float least = kLeastFloat;
  int32_t ties_from = 0;
  double mass = 0.;  // of what is kept, in units of the largest value's
};

struct TokenCount {
  F32x16 of(F32x16) const { return set1(1.f); }
  double of(float) const { return 1.; }
};

// Probability, in units of the largest value's.
struct TokenMass {
  float best;
  F32x16 of(F32x16 value) const { return exp2<5>(mul(sub(value, set1(best)), set1(kLog2e))); }
  double of(float value) const { return exp(static_cast<double>(value) - best); }
};

// Sums of the weights at or above each pivot. Values: -inf up to a multiple of 16.
template <class Weight>
void weigh(const float* values, int64_t count, Weight weight, const float* pivots, double* sums) {
  for (int p = 0; p < kPivots; ++p) sums[p] = 0.;
  for (int64_t begin = 0; begin < count; begin += kChunk) {
    const int64_t end = begin + kChunk < count ? begin + kChunk : count;
    F32x16 part[kPivots];
    for (int p = 0; p < kPivots; ++p) part[p] = set1(0.f);
    for (int64_t i = begin; i < end; i += 16) {
      const F32x16 value = load(values + i), share = weight.of(value);
      for (int p = 0; p < kPivots; ++p)
        part[p] = add_at_least(part[p], share, value, set1(pivots[p]));
    }
    for (int p = 0; p < kPivots; ++p) sums[p] += reduce_add(part[p]);
  }
}

void pad(float* values, int64_t count) {
  for (; count % 16 != 0; ++count) values[count] = kNegativeInfinity;
}

// Packs the values in [lo, hi) and returns how many there are; `out` may be where they are.
int64_t pack_between(const float* values, int64_t count, float lo, float hi, float* out) {
  const F32x16 low = set1(lo), high = set1(hi);
  int64_t packed = 0;
  for (int64_t i = 0; i < count; i += 16) {
    const F32x16 value = load(values + i);
    packed += pack_lanes(out + packed, value, at_least(value, low) & below(value, high));
  }
  pad(out, packed);
  return packed;
}

// Packs a row's values from `lo` on into its candidates.
int64_t pack_row(const Row& row, float lo) {
  const F32x16 low = set1(lo);
  int64_t packed = 0;
  for (int64_t b = 0; b < row.blocks; ++b) {
    if (row.block_max[b] < lo) continue;
    for (int64_t i = b * kNoiseBlock; i < (b + 1) * kNoiseBlock; i += 16) {
      const F32x16 value = load(row.values + i);
      packed += pack_lanes(row.candidates + packed, value, at_least(value, low));
    }
  }
  pad(row.candidates, packed);
  return packed;
}

void range_of(const float* values, int64_t count, float* least, float* most) {
  F32x16 low = set1(__builtin_inff()), high = set1(kNegativeInfinity);
  for (int64_t i = 0; i < count; i += 16) {
    const F32x16 value = load(values + i);
    const int lanes = count - i < 16 ? static_cast<int>(count - i) : 16;
    low = min(low, keep_lanes(value, 0, lanes, __builtin_inff()));
    high = max(high, value);
  }
  *most = reduce_max(high);
  *least = -reduce_max(sub(set1(0.f), low));
}

struct Found {
  float value;
  double above;   // weights of larger values
  int64_t count;  // how many equal it
};

template <class Weight>
Found search_few(float* values, int64_t count, Weight weight, double need, double above) {
  for (int64_t i = 1; i < count; ++i) {
    const float value = values[i];
    int64_t at = i;
    for (; at > 0 && values[at - 1] < value; --at) values[at] = values[at - 1];
    values[at] = value;
  }
  for (int64_t i = 0;;) {
    int64_t end = i + 1;
    while (end < count && values[end] == values[i]) ++end;
    const double share = static_cast<double>(end - i) * weight.of(values[i]);
    if (above + share >= need || end >= count) return {values[i], above, end - i};
    above += share;
    i = end;
  }
}

// The largest value such that the weights at or above it reach `need`; the least where all
// together do not. At least one value, all finite; they are lost.
template <class Weight>
Found search(float* values, int64_t count, Weight weight, double need) {
  double above = 0.;
  for (;;) {
    if (count <= kFew) return search_few(values, count, weight, need, above);
    float least, most, pivots[kPivots];
    range_of(values, count, &least, &most);
    if (least == most) return {most, above, count};
    const float step = most / kPivots - least / kPivots;  // their difference may be infinite
    const float lowest = nextafterf(least, most);
    for (int p = 0; p < kPivots; ++p) {
      const float pivot = least + step * static_cast<float>(p + 1);
      pivots[p] = pivot < lowest ? lowest : pivot > most ? most : pivot;
    }
    pivots[kPivots - 1] = most;  // so that every round loses a value
    double sums[kPivots];
    weigh(values, count, weight, pivots, sums);
    int p = kPivots - 1;
    while (p >= 0 && !(above + sums[p] >= need)) --p;
    if (p + 1 < kPivots) above += sums[p + 1];
    count = pack_between(values, count, p < 0 ? least : pivots[p],
                         p + 1 < kPivots ? pivots[p + 1] : __builtin_inff(), values);
  }
}

// Mass of the values from `least` on.
double mass_from(const Row& row, float least) {
  const TokenMass mass{row.best};
  const F32x16 low = set1(least);
  const float floor = row.best - kNegligible > least ? row.best - kNegligible : least;
  double sum = 0.;
  for (int64_t b = 0; b < row.blocks; ++b) {
    if (row.block_max[b] < floor) continue;
    F32x16 part = set1(0.f);
    for (int64_t i = b * kNoiseBlock; i < (b + 1) * kNoiseBlock; i += 16) {
      const F32x16 value = load(row.values + i);
      part = add_at_least(part, mass.of(value), value, low);
    }
    sum += reduce_add(part);
  }
  return sum;
}

// The token from which on `kept` values equal `value`.
int32_t last_ties(const Row& row, float value, int64_t kept) {
  const F32x16 tie = set1(value);
  for (int64_t i = row.blocks * kNoiseBlock - 16; i >= 0; i -= 16) {
    if (row.block_max[i / kNoiseBlock] < value) continue;
    uint32_t lanes = equal(load(row.values + i), tie);
    const int found = __builtin_popcount(lanes);
    if (found < kept) {
      kept -= found;
      continue;
    }
    for (int64_t skip = found - kept; skip > 0; --skip) lanes &= lanes - 1;
    return static_cast<int32_t>(i) + __builtin_ctz(lanes);
  }
  return 0;
}

// The k-th largest value.
float kth_largest(const Row& row, int32_t k) {
  float floor = kLeastFloat;
  const int64_t blocks =
      pack_between(row.block_max, row.blocks, kLeastFloat, __builtin_inff(), row.block_candidates);
  // k blocks whose largest reaches a value hold k values that do.
  if (blocks >= k) floor = search(row.block_candidates, blocks, TokenCount{}, k).value;
  return search(row.candidates, pack_row(row, floor), TokenCount{}, k).value;
}

// Top-p among the values from cut->least on.
void cut_top_p(const Row& row, float top_p, Cut* cut) {
  const double need = static_cast<double>(top_p) * mass_from(row, cut->least);
  // All tokens that are less likely than this have together less than 1 - p.
  const float unlikely = row.best + logf((1.f - top_p) / static_cast<float>(row.vocab)) - 0.01f;
  const float floor = unlikely > cut->least ? unlikely : cut->least;
  const TokenMass mass{row.best};
  const Found found = search(row.candidates, pack_row(row, floor), mass, need);
  const double each = mass.of(found.value);
  const double wanted = ceil((need - found.above) / each);
  const int64_t kept = !(wanted < static_cast<double>(found.count)) ? found.count
                       : wanted < 1.                                ? 1
                                                                    : static_cast<int64_t>(wanted);
  cut->least = found.value;
  cut->ties_from = kept < found.count ? last_ties(row, found.value, kept) : 0;
  cut->mass = found.above + static_cast<double>(kept) * each;
}

// What a row with a finite largest value keeps. The mass is known where asked for.
Cut select(const Row& row, int32_t top_k, float top_p, bool with_mass) {
  Cut cut;
  if (top_k >= 1 && top_k < row.vocab) cut.least = kth_largest(row, top_k);
  if (top_p < 1.f)
    cut_top_p(row, top_p, &cut);
  else if (with_mass)
    cut.mass = mass_from(row, cut.least);
  return cut;
}

}  // namespace
}  // namespace bmc::BMC_ISA_NAMESPACE
