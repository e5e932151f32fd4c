#include "plan.h"

#include <algorithm>
#include <stdexcept>
#include <string>

namespace bmc {
namespace {

// Cost of an item in units of "one query row over one KV row": streaming a KV row costs about as
// much as computing six query rows over it (memory bandwidth against FLOP/s; docs/kernel.md).
constexpr int64_t kStreamRows = 6;
constexpr int64_t kItemsPerThread = 4;      // enough that threads end together, few enough to merge
constexpr int32_t kMinSplitRows = 256;      // shorter shares cost more to merge than they balance
constexpr int64_t kMinParallelCost = 2048;  // below, waking threads costs more than the work

std::string str(int64_t x) { return std::to_string(x); }

int32_t round_down(int32_t x, int32_t to) { return x / to * to; }

}  // namespace

Plan::Plan(const PlanInput& input)
    : block_size_(input.block_size),
      num_kv_heads_(input.num_kv_heads),
      group_size_(0),
      window_(input.window),
      causal_(input.causal) {
  if (block_size_ <= 0 || block_size_ % kTileRows != 0) {
    throw std::invalid_argument("block_size is " + str(block_size_) + "; allowed: multiples of " +
                                str(kTileRows));
  }
  if (num_kv_heads_ <= 0 || input.num_query_heads <= 0 ||
      input.num_query_heads % num_kv_heads_ != 0) {
    throw std::invalid_argument("query heads (" + str(input.num_query_heads) +
                                ") must be a positive multiple of KV heads (" + str(num_kv_heads_) +
                                ")");
  }
  if (window_ < 0) {
    throw std::invalid_argument("sliding_window is " + str(window_) +
                                "; allowed: a positive number of rows, or none");
  }
  if (window_ > 0 && !causal_) {
    throw std::invalid_argument("sliding_window needs causal attention");
  }
  group_size_ = input.num_query_heads / num_kv_heads_;
  copy_sequences(input);
  make_items(std::max<int32_t>(1, input.num_threads));
}

void Plan::copy_sequences(const PlanInput& input) {
  query_start_.assign(input.query_start, input.query_start + input.num_seqs + 1);
  seq_lens_.assign(input.seq_lens, input.seq_lens + input.num_seqs);
  first_rows_.assign(input.num_seqs, 0);
  if (input.first_rows != nullptr) {
    first_rows_.assign(input.first_rows, input.first_rows + input.num_seqs);
  }
  if (query_start_[0] != 0) {
    throw std::invalid_argument("query_start_loc[0] is " + str(query_start_[0]) + "; allowed: 0");
  }
  for (int64_t seq = 0; seq < input.num_seqs; ++seq) {
    const int64_t query_len = static_cast<int64_t>(query_start_[seq + 1]) - query_start_[seq];
    const int64_t seq_len = seq_lens_[seq];
    if (query_len < 0) {
      throw std::invalid_argument("query_start_loc decreases at sequence " + str(seq));
    }
    if (seq_len < 0 || seq_len > input.table_width * block_size_) {
      throw std::invalid_argument("seq_lens[" + str(seq) + "] is " + str(seq_len) +
                                  "; allowed: 0 to " + str(input.table_width * block_size_) +
                                  " (block table width x block size)");
    }
    if (causal_ && query_len > seq_len) {
      throw std::invalid_argument("sequence " + str(seq) + " has " + str(query_len) +
                                  " query rows but only " + str(seq_len) +
                                  " KV rows; causal attention needs a KV row for each");
    }
    if (first_rows_[seq] < 0 || first_rows_[seq] > seq_len) {
      throw std::invalid_argument("first_rows[" + str(seq) + "] is " + str(first_rows_[seq]) +
                                  "; allowed: 0 to " + str(seq_len) + " (seq_lens[" + str(seq) +
                                  "])");
    }
    block_start_.push_back(static_cast<int64_t>(blocks_.size()));
    if (query_len == 0) continue;
    const int32_t* row = input.block_table + seq * input.table_stride;
    blocks_.insert(blocks_.end(), row, row + (seq_len + block_size_ - 1) / block_size_);
  }
  if (!blocks_.empty()) {
    const auto range = std::minmax_element(blocks_.begin(), blocks_.end());
    min_block_ = *range.first;
    max_block_ = *range.second;
  }
}

void Plan::make_items(int32_t wanted_threads) {
  struct Draft {
    WorkItem item;
    int64_t cost_per_row;
    int64_t cost;
  };
  std::vector<Draft> drafts;
  int64_t total = 0;
  const int32_t positions = std::max(1, kQueryBlockRows / group_size_);
  for (size_t seq = 0; seq < seq_lens_.size(); ++seq) {
    const int32_t query_len = query_start_[seq + 1] - query_start_[seq];
    const int32_t context = seq_lens_[seq] - query_len;
    for (int32_t begin = 0; begin < query_len; begin += positions) {
      const int32_t count = std::min(positions, query_len - begin);
      const int32_t end = causal_ ? context + begin + count : seq_lens_[seq];
      const int32_t in_window = window_ > 0 ? context + begin + 1 - window_ : 0;
      const int32_t first_seen = std::min(end, std::max(first_rows_[seq], in_window));
      const int64_t per_row = kStreamRows + static_cast<int64_t>(count) * group_size_;
      const int64_t cost = per_row * (end - first_seen);
      max_rows_ = std::max(max_rows_, count * group_size_);
      for (int32_t head = 0; head < num_kv_heads_; ++head) {
        drafts.push_back({{static_cast<int32_t>(seq), head, begin, count, first_seen, end, -1, 0},
                          per_row,
                          cost});
      }
      total += cost * num_kv_heads_;
    }
  }
  num_threads_ = total < kMinParallelCost ? 1 : wanted_threads;
  // No item may be so large that the thread that has it ends last by much.
  const int64_t most = num_threads_ == 1 ? total + 1 : total / (num_threads_ * kItemsPerThread) + 1;
  std::stable_sort(drafts.begin(), drafts.end(),
                   [](const Draft& a, const Draft& b) { return a.cost > b.cost; });
  for (const Draft& draft : drafts) {
    const WorkItem& item = draft.item;
    const int64_t rows = item.kv_end - item.kv_begin;
    const int64_t wanted = draft.cost > most ? (draft.cost + most - 1) / most : 1;
    const int64_t shares = std::max<int64_t>(1, std::min(wanted, rows / kMinSplitRows));
    if (shares == 1) {
      items_.push_back(item);
      continue;
    }
    const int32_t group = static_cast<int32_t>(split_groups_.size());
    split_groups_.push_back({static_cast<int32_t>(shares), static_cast<int32_t>(num_partial_rows_),
                             static_cast<int32_t>(shares)});
    num_partial_rows_ += shares * item.query_count * group_size_;
    int32_t begin = item.kv_begin;
    for (int32_t share = 0; share < shares; ++share) {
      WorkItem part = item;
      part.split_group = group;
      part.split_index = share;
      part.kv_begin = begin;
      const int32_t ideal = item.kv_begin + static_cast<int32_t>(rows * (share + 1) / shares);
      part.kv_end = share + 1 == shares ? item.kv_end : round_down(ideal, kStepRows);
      begin = part.kv_end;
      items_.push_back(part);
    }
  }
}

PlanView Plan::view() {
  return {items_.data(),
          static_cast<int64_t>(items_.size()),
          split_groups_.data(),
          query_start_.data(),
          seq_lens_.data(),
          first_rows_.data(),
          blocks_.data(),
          block_start_.data(),
          block_size_,
          group_size_,
          max_rows_,
          window_,
          causal_};
}

}  // namespace bmc
