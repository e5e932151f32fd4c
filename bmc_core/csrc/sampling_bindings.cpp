// The part of bmc_core._native that draws tokens: addresses, shapes and strides in; exceptions out.
// What a tensor may be is checked in bmc_core/sampling.py; here everything that a wrong value could
// turn into a wild address is checked again.
#include "sampling_bindings.h"

#include <omp.h>

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

namespace py = pybind11;

namespace bmc {
namespace {

const SamplingKernels& kernels() {
#ifdef BMC_X86
  const std::string isa = selected_isa();
  if (isa == "avx2") return sampling_avx2();
  if (isa != "portable") return sampling_avx512();
#endif
  return sampling_portable();
}

// Of one thread: a row's values, those that may be kept, and the largest of each block twice.
int64_t scratch_floats(int64_t vocab) {
  const int64_t blocks = (vocab + kNoiseBlock - 1) / kNoiseBlock;
  return 2 * blocks * kNoiseBlock + 2 * ((blocks + 15) / 16 * 16);
}

// Kept from step to step: a row's values are half a MiB, new memory for them would cost as much as
// the work.
float* scratch(int64_t floats) {
  struct Free {
    void operator()(float* p) const { std::free(p); }
  };
  static thread_local std::unique_ptr<float, Free> memory;
  static thread_local int64_t size = 0;
  if (floats > size) {
    const size_t bytes = (static_cast<size_t>(floats) * sizeof(float) + 63) / 64 * 64;
    size = 0;
    memory.reset(static_cast<float*>(std::aligned_alloc(64, bytes)));
    if (!memory) throw std::bad_alloc();
    size = floats;
  }
  return memory.get();
}

[[noreturn]] void refuse(const std::string& name, int64_t value, const std::string& allowed) {
  throw std::invalid_argument(name + " is " + std::to_string(value) + "; allowed: " + allowed);
}

LogitRows logit_rows(uintptr_t data, int64_t stride, int64_t rows, int64_t vocab, int dtype) {
  if (dtype < 0 || dtype > 2) refuse("dtype code", dtype, "0 to 2");
  if (rows < 0) refuse("number of rows", rows, "not negative");
  if (vocab < 1 || vocab > kMaxVocab)
    refuse("vocabulary", vocab, "1 to " + std::to_string(kMaxVocab));
  return {reinterpret_cast<const void*>(data), stride, rows, static_cast<int32_t>(vocab),
          static_cast<DType>(dtype)};
}

RequestSettings settings_of(uintptr_t temperature, uintptr_t top_k, uintptr_t top_p) {
  return {reinterpret_cast<const float*>(temperature), reinterpret_cast<const int32_t*>(top_k),
          reinterpret_cast<const float*>(top_p)};
}

// 1 or all, as in grow_in_place.cpp.
int threads_for(int64_t tasks) { return tasks > 1 ? omp_get_max_threads() : 1; }

void check_row(const char* name, int32_t row, int64_t rows) {
  if (row < 0 || row >= rows)
    refuse(std::string(name) + " row", row, "0 to " + std::to_string(rows - 1));
}

// The number of draft tokens of each request; checks all that is used as an index.
std::vector<int32_t> draft_counts(const VerifyArgs& args, int64_t requests, int64_t drafts) {
  std::vector<int32_t> counts(static_cast<size_t>(requests));
  int32_t before = 0;
  for (int64_t r = 0; r < requests; ++r) {
    const int32_t end = args.draft_ends[r];
    if (end < before || end > drafts || end - before >= args.width) {
      refuse("end of the draft tokens of request " + std::to_string(r), end,
             std::to_string(before) + " to " +
                 std::to_string(std::min(drafts, before + args.width - 1)));
    }
    for (int32_t i = before; i < end; ++i)
      check_row("target", args.target_rows[i], args.logits.count);
    check_row("bonus", args.bonus_rows[r], args.logits.count);
    counts[static_cast<size_t>(r)] = end - before;
    before = end;
  }
  if (before != drafts) refuse("end of all draft tokens", before, std::to_string(drafts));
  return counts;
}

// Earlier positions first, so that those behind a rejected token are rarely begun.
std::vector<DrawTask> tasks_of(const std::vector<int32_t>& counts, int64_t width) {
  std::vector<DrawTask> tasks;
  for (int32_t position = 0; position < width; ++position)
    for (size_t r = 0; r < counts.size(); ++r)
      if (position <= counts[r]) tasks.push_back({static_cast<int32_t>(r), position});
  return tasks;
}

void verify(uintptr_t logits, int64_t stride, int64_t rows, int64_t vocab, int dtype,
            uintptr_t temperature, uintptr_t top_k, uintptr_t top_p, int64_t requests,
            uintptr_t target_rows, uintptr_t bonus_rows, uintptr_t draft_ends,
            uintptr_t draft_tokens, uintptr_t draft_probs, int64_t drafts, uintptr_t seeds,
            uintptr_t tokens, int64_t width) {
  VerifyArgs args{};
  args.logits = logit_rows(logits, stride, rows, vocab, dtype);
  args.settings = settings_of(temperature, top_k, top_p);
  args.target_rows = reinterpret_cast<const int32_t*>(target_rows);
  args.bonus_rows = reinterpret_cast<const int32_t*>(bonus_rows);
  args.draft_ends = reinterpret_cast<const int32_t*>(draft_ends);
  args.draft_tokens = reinterpret_cast<const int32_t*>(draft_tokens);
  args.draft_probs = reinterpret_cast<const float*>(draft_probs);
  args.seeds = reinterpret_cast<const int64_t*>(seeds);
  args.tokens = reinterpret_cast<int32_t*>(tokens);
  args.width = width;
  if (requests < 0 || drafts < 0 || width < 1)
    throw std::invalid_argument("requests, draft tokens and width are " + std::to_string(requests) +
                                ", " + std::to_string(drafts) + " and " + std::to_string(width) +
                                "; allowed: 0, 0, 1 and more");
  if (seeds == 0 && temperature != 0)
    throw std::invalid_argument("seeds are missing; allowed: without temperatures alone");
  py::gil_scoped_release release;
  std::vector<int32_t> ends = draft_counts(args, requests, drafts);
  const std::vector<DrawTask> tasks = tasks_of(ends, width);
  int64_t next = 0;
  args.tasks = tasks.data();
  args.num_tasks = static_cast<int64_t>(tasks.size());
  args.ends = ends.data();
  args.next_task = &next;
  args.num_threads = threads_for(args.num_tasks);
  args.scratch_floats = scratch_floats(vocab);
  args.scratch = scratch(args.scratch_floats * args.num_threads);
  kernels().verify(args);
  for (int64_t r = 0; r < requests; ++r) {
    const int64_t used = ends[static_cast<size_t>(r)] + 1;
    std::fill(args.tokens + r * width + used, args.tokens + (r + 1) * width, -1);
  }
}

void keep_top(uintptr_t logits, int64_t stride, int64_t rows, int64_t vocab, uintptr_t top_k,
              uintptr_t top_p) {
  int64_t next = 0;
  KeepTopArgs args{};
  args.logits = logit_rows(logits, stride, rows, vocab, static_cast<int>(DType::kFloat32));
  args.settings = settings_of(0, top_k, top_p);
  args.next_row = &next;
  args.num_threads = threads_for(rows);
  args.scratch_floats = scratch_floats(vocab);
  args.scratch = scratch(args.scratch_floats * args.num_threads);
  py::gil_scoped_release release;
  kernels().keep_top(args);
}

}  // namespace

void bind_sampling(py::module_& m) {
  m.def("verify", &verify);
  m.def("keep_top", &keep_top);
}

}  // namespace bmc
