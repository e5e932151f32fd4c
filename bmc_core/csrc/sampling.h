// Drawing tokens from rows of logits: the types that the bindings and the kernels share.
//
// A row's token is the largest of (value + noise) among the tokens that top-k and top-p keep, where
// value is logit / temperature and the noise of a token is Gumbel's, made of the row's seed and the
// token's number alone: so a seed gives the same token however many rows are drawn with it, and on
// however many threads. At temperature 0 it is the largest logit.
//
// This header is included by translation units built for different instruction sets, so it holds
// only plain data: no function and no template that a linker could take from the wrong one.
#pragma once

#include <cstdint>

#include "attention.h"

namespace bmc {

constexpr int kNoiseBlock = 256;  // tokens whose largest value is known while noise is drawn
constexpr int32_t kMaxVocab = 1 << 28;
constexpr float kGreedyTemperature = 1e-5f;  // below it a request takes the largest logit

// Rows [rows, vocab], the last dimension contiguous.
struct LogitRows {
  const void* data;
  int64_t stride;  // elements
  int64_t count;
  int32_t vocab;
  DType dtype;
};

// What each request keeps of a row; null: nobody asks.
struct RequestSettings {
  const float* temperature;  // null: all take the largest logit
  const int32_t* top_k;      // below 1, or the whole vocabulary and more: all tokens
  const float* top_p;        // 1 and more: all tokens
};

// One row to draw a token from: the position behind `position` draft tokens of a request.
struct DrawTask {
  int32_t request, position;
};

struct VerifyArgs {
  LogitRows logits;
  RequestSettings settings;
  const DrawTask* tasks;  // earlier positions first
  int64_t num_tasks;
  const int32_t* target_rows;   // [draft tokens] row of the logits that verifies each
  const int32_t* bonus_rows;    // [requests] row behind the last draft token
  const int32_t* draft_ends;    // [requests] draft tokens of all requests up to this one
  const int32_t* draft_tokens;  // [draft tokens]
  const float* draft_probs;     // [draft tokens][vocab] what they were drawn from; null: certain
  const int64_t* seeds;         // [draft tokens + requests] a request's after the one before
  int32_t* tokens;              // [requests][width]
  int64_t width;                // most draft tokens of a request + 1
  int32_t* ends;                // [requests] in: draft tokens; out: those accepted
  int64_t* next_task;           // shared counter, 0 at the start
  float* scratch;               // num_threads x scratch_floats, 64-byte aligned
  int64_t scratch_floats;
  int num_threads;
};

struct KeepTopArgs {
  LogitRows logits;  // float32; what is not kept becomes -inf
  RequestSettings settings;
  int64_t* next_row;  // shared counter, 0 at the start
  float* scratch;     // as above
  int64_t scratch_floats;
  int num_threads;
};

struct SamplingKernels {
  void (*verify)(const VerifyArgs& args);
  void (*keep_top)(const KeepTopArgs& args);
};

const SamplingKernels& sampling_portable();
#ifdef BMC_X86
const SamplingKernels& sampling_avx2();
const SamplingKernels& sampling_avx512();
#endif

}  // namespace bmc
