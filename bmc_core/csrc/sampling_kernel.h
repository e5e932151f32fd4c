// The sampling kernels, compiled once per instruction set: threads take rows, early positions
// first, so that nothing behind a rejected draft token is computed unless a thread has no other
// work.
//
// No std:: function or container here or in what is included: see attention.h.
#pragma once

#include "sampling_draw.h"

namespace bmc::BMC_ISA_NAMESPACE {
namespace {

struct Verified {
  int32_t token;
  bool accepted;
};

// What a request asks of its rows.
struct Request {
  bool greedy;
  float temperature, top_p;
  int32_t top_k;

  Request(const RequestSettings& all, int32_t r)
      : greedy(all.temperature == nullptr || all.temperature[r] < kGreedyTemperature),
        temperature(greedy ? 1.f : all.temperature[r]),
        top_p(all.top_p == nullptr ? 1.f : all.top_p[r]),
        top_k(all.top_k == nullptr ? 0 : all.top_k[r]) {}
};

// Whether there is nothing to draw: no finite value, or one that no noise could reach.
inline bool is_settled(const Row& row) {
  return row.best == kNegativeInfinity || row.best == __builtin_inff();
}

// A draft token that was drawn from `draft_probs` is accepted with min(1, target / draft).
Verified verify_drawn(const Row& row, const Request& request, int32_t draft,
                      const float* draft_probs, uint64_t seed) {
  const Cut cut = select(row, request.top_k, request.top_p, true);
  cut_row(row, cut, row.values);
  const uint64_t key = mix(seed);
  if (draft >= 0 && draft < row.vocab && draft_probs[draft] > 0.f) {
    const double target = TokenMass{row.best}.of(row.values[draft]) / cut.mass;
    if (target >= uniform(noise_of(key, row.vocab)) * draft_probs[draft]) return {draft, true};
  }
  const int32_t token = recover(row, cut, draft_probs, uniform(noise_of(key, row.vocab + 1)));
  return {token < 0 ? row.argmax() : token, false};
}

template <class E>
Verified verify_task(const VerifyArgs& args, const DrawTask& task, Row& row) {
  const int64_t start = task.request == 0 ? 0 : args.draft_ends[task.request - 1];
  const int64_t place = start + task.position;
  const bool has_draft = place < args.draft_ends[task.request];
  const int64_t at = has_draft ? args.target_rows[place] : args.bonus_rows[task.request];
  const auto* logits =
      static_cast<const typename E::Value*>(args.logits.data) + at * args.logits.stride;
  const int32_t draft = has_draft ? args.draft_tokens[place] : -1;
  const Request request(args.settings, task.request);
  if (request.greedy) {
    const int32_t token = argmax_of<E>(row, logits);
    return {token, token == draft};
  }
  row.load_all<E, true>(logits, request.temperature);
  if (is_settled(row)) {
    const int32_t token = row.argmax();
    return {token, token == draft};
  }
  const uint64_t seed = static_cast<uint64_t>(args.seeds[place + task.request]);
  if (has_draft && args.draft_probs != nullptr) {
    return verify_drawn(row, request, draft, args.draft_probs + place * row.vocab, seed);
  }
  // A draft token that is certain is accepted where it is what would have been drawn without it:
  // with the probability that speculative sampling asks for, and the same tokens for a seed.
  const int32_t token = draw(row, select(row, request.top_k, request.top_p, false), seed);
  return {token, token == draft};
}

template <class E>
void verify_share(const VerifyArgs& args, int thread) {
  Row row(args.scratch + thread * args.scratch_floats, args.logits.vocab);
  for (;;) {
    const int64_t next = __atomic_fetch_add(args.next_task, 1, __ATOMIC_RELAXED);
    if (next >= args.num_tasks) return;
    const DrawTask task = args.tasks[next];
    int32_t* end = args.ends + task.request;
    int32_t accepted = __atomic_load_n(end, __ATOMIC_RELAXED);
    if (task.position > accepted) continue;
    const Verified found = verify_task<E>(args, task, row);
    args.tokens[task.request * args.width + task.position] = found.token;
    while (!found.accepted && task.position < accepted &&
           !__atomic_compare_exchange_n(end, &accepted, task.position, false, __ATOMIC_RELAXED,
                                        __ATOMIC_RELAXED)) {
    }
  }
}

template <class E>
void verify_all(const VerifyArgs& args) {
#pragma omp parallel num_threads(args.num_threads) if (args.num_threads > 1)
  verify_share<E>(args, omp_get_thread_num());
}

void verify(const VerifyArgs& args) {
  switch (args.logits.dtype) {
    case DType::kFloat32:
      return verify_all<FloatLogits>(args);
    case DType::kFloat16:
      return verify_all<HalfLogits>(args);
    case DType::kBFloat16:
      return verify_all<BFloatLogits>(args);
  }
}

void keep_top_share(const KeepTopArgs& args, int thread) {
  Row row(args.scratch + thread * args.scratch_floats, args.logits.vocab);
  for (;;) {
    const int64_t next = __atomic_fetch_add(args.next_row, 1, __ATOMIC_RELAXED);
    if (next >= args.logits.count) return;
    float* logits =
        const_cast<float*>(static_cast<const float*>(args.logits.data)) + next * args.logits.stride;
    const Request request(args.settings, static_cast<int32_t>(next));
    row.load_all<FloatLogits, true>(logits, 1.f);
    if (is_settled(row)) continue;
    cut_row(row, select(row, request.top_k, request.top_p, false), logits);
  }
}

void keep_top(const KeepTopArgs& args) {
#pragma omp parallel num_threads(args.num_threads) if (args.num_threads > 1)
  keep_top_share(args, omp_get_thread_num());
}

}  // namespace
}  // namespace bmc::BMC_ISA_NAMESPACE
