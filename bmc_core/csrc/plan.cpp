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

Plan::Use::Use(Plan& plan) : plan_(plan) {
  if (plan.in_use_.exchange(true, std::memory_order_acquire)) {
    throw std::runtime_error(
        "the batch is in use by another thread; make one AttentionBatch for each thread");
  }
}

Plan::Plan(const PlanInput& input)
    : block_size_(input.block_size),
      num_kv_heads_(input.num_kv_heads),
      group_size_(0),
      window_(input.window),
      causal_(input.causal) {
  if (block_size_ <= 0 || block_size_ % kTileRows != 0 || block_size_ > kMaxSeqLen) {
    throw std::invalid_argument("block_size is " + str(block_size_) + "; allowed: multiples of " +
                                str(kTileRows) + " up to " + str(kMaxSeqLen));
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
  if (input.num_tokens > kMaxSeqLen) {
    throw std::invalid_argument("query has " + str(input.num_tokens) + " rows; allowed: up to " +
                                str(kMaxSeqLen) + " (MAX_SEQ_LEN)");
  }
  const int64_t in_table = std::min<int64_t>(input.table_width, kMaxSeqLen) * block_size_;
  const int64_t most_rows = std::min<int64_t>(in_table, kMaxSeqLen);
  for (int64_t seq = 0; seq < input.num_seqs; ++seq) {
    const int64_t query_len = static_cast<int64_t>(query_start_[seq + 1]) - query_start_[seq];
    const int64_t seq_len = seq_lens_[seq];
    if (query_len < 0) {
      throw std::invalid_argument("query_start_loc decreases at sequence " + str(seq));
    }
    if (seq_len < 0 || seq_len > most_rows) {
      throw std::invalid_argument(
          "seq_lens[" + str(seq) + "] is " + str(seq_len) + "; allowed: 0 to " + str(most_rows) +
          (most_rows == kMaxSeqLen ? " (MAX_SEQ_LEN)" : " (block table width x block size)"));
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
  }
  // Before anything is sized by it: one wrong number here would be a plan of gigabytes.
  if (query_start_.back() != input.num_tokens) {
    throw std::invalid_argument("query's rows is " + str(input.num_tokens) + "; allowed: " +
                                str(query_start_.back()) + " (the end of query_start_loc)");
  }
  for (int64_t seq = 0; seq < input.num_seqs; ++seq) copy_blocks(input, seq);
  if (!blocks_.empty()) {
    const auto range = std::minmax_element(blocks_.begin(), blocks_.end());
    min_block_ = *range.first;
    max_block_ = *range.second;
  }
}

// The first KV row that the query at a position (counted within this step's query) may see.
int32_t Plan::first_seen(int64_t seq, int32_t query_position) const {
  const int32_t query_len = query_start_[seq + 1] - query_start_[seq];
  const int32_t position = seq_lens_[seq] - query_len + query_position;
  const int32_t in_window = window_ > 0 ? position + 1 - window_ : 0;
  return std::max(first_rows_[seq], in_window);
}

// Ids of the blocks from the first row that any query sees on: those before it may be anything.
void Plan::copy_blocks(const PlanInput& input, int64_t seq) {
  const bool idle = query_start_[seq + 1] == query_start_[seq];
  const int32_t begin = idle ? seq_lens_[seq] : first_seen(seq, 0);
  const int64_t first = begin / block_size_;
  block_start_.push_back(static_cast<int64_t>(blocks_.size()) - first);
  if (begin >= seq_lens_[seq]) return;
  const int64_t last = (seq_lens_[seq] - 1) / block_size_;
  const int32_t* row = input.block_table + seq * input.table_stride;
  blocks_.insert(blocks_.end(), row + first, row + last + 1);
}

void Plan::make_items(int32_t wanted_threads) {
  struct Draft {
    WorkItem item;
    int64_t cost;
  };
  std::vector<Draft> drafts;
  int64_t total = 0;
  // An item is one block of query rows: more heads than that are several items of equal size.
  const int32_t parts = (group_size_ + kQueryBlockRows - 1) / kQueryBlockRows;
  const int32_t heads = (group_size_ + parts - 1) / parts;
  const int32_t positions = std::max(1, kQueryBlockRows / heads);
  for (size_t seq = 0; seq < seq_lens_.size(); ++seq) {
    const int32_t query_len = query_start_[seq + 1] - query_start_[seq];
    const int32_t context = seq_lens_[seq] - query_len;
    for (int32_t begin = 0; begin < query_len; begin += positions) {
      const int32_t count = std::min(positions, query_len - begin);
      const int32_t end = causal_ ? context + begin + count : seq_lens_[seq];
      const int32_t seen = first_seen(seq, begin);
      // Rows of a block that was not copied must not be looked up.
      const int32_t kv_begin = seen < end ? seen : 0, kv_end = seen < end ? end : 0;
      max_rows_ = std::max(max_rows_, count * heads);
      for (int32_t head = 0; head < group_size_; head += heads) {
        const int32_t head_count = std::min(heads, group_size_ - head);
        const int64_t per_row = kStreamRows + static_cast<int64_t>(count) * head_count;
        const int64_t cost = per_row * (kv_end - kv_begin);
        for (int32_t kv_head = 0; kv_head < num_kv_heads_; ++kv_head) {
          drafts.push_back({{static_cast<int32_t>(seq), kv_head, head, head_count, begin, count,
                             kv_begin, kv_end, -1, 0},
                            cost});
        }
        total += cost * num_kv_heads_;
      }
    }
  }
  // 1 or all, never a number between: libgomp ends the threads that a smaller team leaves over, and
  // the next full team (torch's own operations use the same pool) starts them again.
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
    split_groups_.push_back(
        {static_cast<int32_t>(shares), num_partial_rows_, static_cast<int32_t>(shares)});
    num_partial_rows_ += shares * item.query_count * item.head_count;
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
