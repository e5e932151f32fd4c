// The plan of one step: which query rows meet which KV rows, split over threads. Built once per
// step, used by every layer of the same geometry. Knows nothing of tensors' contents or instruction
// sets.
#pragma once

#include <atomic>
#include <cstdint>
#include <vector>

#include "attention.h"

namespace bmc {

struct PlanInput {
  const int32_t* query_start;  // [num_seqs + 1]
  const int32_t* seq_lens;     // [num_seqs]
  const int32_t* first_rows;   // [num_seqs] rows before it are padding; null: none
  const int32_t* block_table;  // [num_seqs][table_width], rows table_stride apart
  int64_t num_seqs;
  int64_t num_tokens;  // query rows of the step: what query_start must end at
  int64_t table_width;
  int64_t table_stride;
  int32_t block_size;
  int32_t num_query_heads;
  int32_t num_kv_heads;
  int32_t window;  // 0: none
  bool causal;
  int32_t num_threads;
};

class Plan {
 public:
  // One call's use of a plan. The counters of split items are the plan's: a second call at the same
  // time would make both merge wrong shares, and every later one too.
  class Use {
   public:
    // Throws std::runtime_error where another thread uses the plan.
    explicit Use(Plan& plan);
    ~Use() { plan_.in_use_.store(false, std::memory_order_release); }
    Use(const Use&) = delete;
    Use& operator=(const Use&) = delete;

   private:
    Plan& plan_;
  };

  // Copies what it needs of the input. Throws std::invalid_argument naming what is wrong.
  explicit Plan(const PlanInput& input);

  PlanView view();
  int64_t num_tokens() const { return query_start_.back(); }
  int32_t min_block() const { return min_block_; }
  int32_t max_block() const { return max_block_; }
  int32_t block_size() const { return block_size_; }
  int32_t num_threads() const { return num_threads_; }  // 1 where the work is too small to share
  int64_t num_partial_rows() const { return num_partial_rows_; }
  const std::vector<WorkItem>& items() const { return items_; }

 private:
  void copy_sequences(const PlanInput& input);
  void copy_blocks(const PlanInput& input, int64_t seq);
  int32_t first_seen(int64_t seq, int32_t query_position) const;
  void make_items(int32_t wanted_threads);

  std::vector<int32_t> query_start_, seq_lens_, first_rows_, blocks_;
  std::vector<int64_t> block_start_;
  std::vector<WorkItem> items_;
  std::vector<SplitGroup> split_groups_;
  int32_t block_size_, num_kv_heads_, group_size_, window_, num_threads_ = 1;
  int32_t min_block_ = 0, max_block_ = -1, max_rows_ = 1;
  int64_t num_partial_rows_ = 0;
  bool causal_;
  std::atomic<bool> in_use_{false};
};

}  // namespace bmc
