// The native module bmc_core._native: addresses, shapes and strides in; exceptions out. What a
// tensor may be is checked in bmc_core/attention.py and checks.py; here everything that a wrong
// value could turn into a wild address is checked again. BoundLayer takes tensors, and refuses what
// those two must look at.
#include <omp.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <cstdlib>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

#include "cache_write.h"
#include "cpu_features.h"
#include "plan.h"
#include "grow_in_place.h"
#include "sampling_bindings.h"
#include "tensor_view.h"

namespace py = pybind11;

namespace bmc {
namespace {

const std::vector<const KernelTable*>& usable() {
  static const std::vector<const KernelTable*> kernels = usable_kernels();
  return kernels;
}

const KernelTable*& selected() {
  static const KernelTable* kernels = usable().front();
  return kernels;
}

std::vector<std::string> usable_names() {
  std::vector<std::string> names;
  for (const KernelTable* kernels : usable()) names.emplace_back(kernels->name);
  return names;
}

void select_isa(const std::string& name) {
  for (const KernelTable* kernels : usable()) {
    if (name == kernels->name) {
      selected() = kernels;
      return;
    }
  }
  std::string allowed;
  for (const std::string& n : usable_names()) allowed += (allowed.empty() ? "" : ", ") + n;
  throw std::invalid_argument("instruction set '" + name +
                              "' is not usable here; allowed: " + allowed);
}

// Aligned memory that grows and is kept: one per calling thread, reused by every layer and step.
class Workspace {
 public:
  char* reserve(int64_t bytes) {
    if (bytes > size_) {
      data_.reset(static_cast<char*>(std::aligned_alloc(64, (bytes + 63) / 64 * 64)));
      if (!data_) {
        size_ = 0;
        throw std::bad_alloc();
      }
      size_ = bytes;
    }
    return data_.get();
  }

 private:
  struct Free {
    void operator()(char* p) const { std::free(p); }
  };
  std::unique_ptr<char, Free> data_;
  int64_t size_ = 0;
};

// The codes that attention.py gives for dtypes; the kernels rely on there being no others.
DType dtype_of(int code) {
  switch (static_cast<DType>(code)) {
    case DType::kFloat32:
    case DType::kFloat16:
    case DType::kBFloat16:
      return static_cast<DType>(code);
  }
  throw std::invalid_argument("dtype code is " + std::to_string(code) + "; allowed: 0 to 2");
}

CacheType cache_type_of(int code) {
  switch (static_cast<CacheType>(code)) {
    case CacheType::kSameAsQuery:
    case CacheType::kE4M3:
    case CacheType::kE5M2:
      return static_cast<CacheType>(code);
  }
  throw std::invalid_argument("cache type code is " + std::to_string(code) + "; allowed: 0 to 2");
}

void check_rows(int32_t block_size, int32_t head_size) {
  if (block_size <= 0 || block_size % kTileRows != 0 || block_size > kMaxSeqLen) {
    throw std::invalid_argument("block_size is " + std::to_string(block_size) +
                                "; allowed: multiples of " + std::to_string(kTileRows) + " up to " +
                                std::to_string(kMaxSeqLen));
  }
  if (head_size < kMinHeadSize || head_size > kMaxHeadSize || head_size % 16 != 0) {
    throw std::invalid_argument("head size is " + std::to_string(head_size) +
                                "; allowed: " + std::to_string(kMinHeadSize) + " to " +
                                std::to_string(kMaxHeadSize) + " in steps of 16");
  }
}

std::unique_ptr<Plan> make_plan(uintptr_t query_start, uintptr_t seq_lens, uintptr_t first_rows,
                                uintptr_t block_table, int64_t num_seqs, int64_t num_tokens,
                                int64_t table_width, int64_t table_stride, int32_t block_size,
                                int32_t num_query_heads, int32_t num_kv_heads, int32_t window,
                                bool causal) {
  return std::unique_ptr<Plan>(new Plan(
      {reinterpret_cast<const int32_t*>(query_start), reinterpret_cast<const int32_t*>(seq_lens),
       reinterpret_cast<const int32_t*>(first_rows), reinterpret_cast<const int32_t*>(block_table),
       num_seqs, num_tokens, table_width, table_stride, block_size, num_query_heads, num_kv_heads,
       window, causal, omp_get_max_threads()}));
}

void attend(Plan& plan, int64_t num_tokens, uintptr_t query, int64_t query_stride_token,
            int64_t query_stride_head, uintptr_t out, int64_t out_stride_token,
            int64_t out_stride_head, uintptr_t cache, int64_t num_blocks,
            int64_t cache_stride_block, int64_t cache_stride_head, int32_t block_size,
            int32_t head_size, int dtype, int cache_type, float scale, float value_scale,
            float softcap, uintptr_t alibi_slopes, uintptr_t sinks) {
  check_rows(block_size, head_size);
  if (plan.num_tokens() != num_tokens || plan.block_size() != block_size) {
    throw std::invalid_argument("the plan is for " + std::to_string(plan.num_tokens()) +
                                " query rows and blocks of " + std::to_string(plan.block_size()) +
                                ", not for " + std::to_string(num_tokens) + " and " +
                                std::to_string(block_size));
  }
  const Plan::Use use(plan);
  if (plan.min_block() < 0 || plan.max_block() >= num_blocks) {
    const int32_t wrong = plan.min_block() < 0 ? plan.min_block() : plan.max_block();
    throw std::out_of_range("block table holds block id " + std::to_string(wrong) +
                            "; allowed: 0 to " + std::to_string(num_blocks - 1));
  }
  const KernelTable& kernels = *selected();
  AttentionArgs args;
  args.plan = plan.view();
  args.query = reinterpret_cast<const void*>(query);
  args.query_stride_token = query_stride_token;
  args.query_stride_head = query_stride_head;
  args.out = reinterpret_cast<void*>(out);
  args.out_stride_token = out_stride_token;
  args.out_stride_head = out_stride_head;
  args.cache = reinterpret_cast<const void*>(cache);
  args.cache_stride_block = cache_stride_block;
  args.cache_stride_head = cache_stride_head;
  args.head_size = head_size;
  args.dtype = dtype_of(dtype);
  args.cache_type = cache_type_of(cache_type);
  args.scale = scale;
  args.value_scale = value_scale;
  args.softcap = softcap;
  args.alibi_slopes = reinterpret_cast<const float*>(alibi_slopes);
  args.sinks = reinterpret_cast<const float*>(sinks);
  args.num_threads = plan.num_threads();
  args.scratch_bytes = kernels.scratch_bytes(args.plan.max_rows, head_size);
  const int64_t scratch = args.scratch_bytes * args.num_threads;
  const int64_t partials =
      plan.num_partial_rows() * (head_size + 2) * static_cast<int64_t>(sizeof(float));
  static thread_local Workspace workspace;
  args.scratch = workspace.reserve(scratch + partials);
  args.partials = reinterpret_cast<float*>(args.scratch + scratch);
  int64_t next_item = 0;
  args.next_item = &next_item;
  py::gil_scoped_release release;
  kernels.attend(args);
}

void write_rows(uintptr_t key, int64_t key_stride_token, int64_t key_stride_head, uintptr_t value,
                int64_t value_stride_token, int64_t value_stride_head, uintptr_t cache,
                int64_t cache_stride_block, int64_t cache_stride_head, uintptr_t slots,
                int64_t num_tokens, int64_t num_blocks, int32_t num_kv_heads, int32_t block_size,
                int32_t head_size, int dtype, int cache_type, float key_scale, float value_scale) {
  check_rows(block_size, head_size);
  const DType dtype_checked = dtype_of(dtype);
  const CacheType cache_type_checked = cache_type_of(cache_type);
  if (num_tokens < 0 || num_blocks < 0 || num_kv_heads < 0) {
    throw std::invalid_argument("tokens, blocks and KV heads are " + std::to_string(num_tokens) +
                                ", " + std::to_string(num_blocks) + " and " +
                                std::to_string(num_kv_heads) + "; allowed: not negative");
  }
  py::gil_scoped_release release;
  write_cache({reinterpret_cast<const void*>(key),
               reinterpret_cast<const void*>(value),
               key_stride_token,
               key_stride_head,
               value_stride_token,
               value_stride_head,
               reinterpret_cast<void*>(cache),
               cache_stride_block,
               cache_stride_head,
               reinterpret_cast<const int64_t*>(slots),
               num_tokens,
               num_blocks,
               num_kv_heads,
               head_size,
               block_size,
               dtype_checked,
               cache_type_checked,
               key_scale,
               value_scale,
               omp_get_max_threads()});
}

const TensorViewer& viewer() {
  static const TensorViewer* torch_tensors = new TensorViewer();  // lives as long as torch
  return *torch_tensors;
}

// One layer's operator over one cache, for calls like one that attention.py has checked: a call
// answers false, and has done nothing, where it is not like that one.
class BoundLayer {
 public:
  // Null where the cache or the rows cannot be viewed (see TensorViewer).
  static std::unique_ptr<BoundLayer> bind(py::handle kv_cache, py::handle rows, int dtype,
                                          int cache_type, float scale, float key_scale,
                                          float value_scale, float softcap) {
    std::unique_ptr<BoundLayer> layer(new BoundLayer);
    TensorView first;
    if (!viewer().view(kv_cache, 4, &layer->cache_, &layer->cache_element_)) return nullptr;
    if (!viewer().view(rows, 3, &first, &layer->rows_element_)) return nullptr;
    const int64_t* strides = layer->cache_.strides;
    if (strides[3] != 1 || strides[2] != layer->cache_.shape[3]) return nullptr;
    check_rows(layer->block_size(), layer->head_size());
    layer->heads_ = first.shape[1];
    layer->dtype_ = dtype;
    layer->cache_type_ = cache_type;
    layer->scale_ = scale;
    layer->key_scale_ = key_scale;
    layer->value_scale_ = value_scale;
    layer->softcap_ = softcap;
    return layer;
  }

  // Of the first rows of `query` and `out`, `tokens` of them; the others are padding.
  bool attend(Plan& plan, int64_t tokens, py::handle query, py::handle kv_cache, py::handle out,
              py::handle slopes, py::handle sinks) const {
    TensorView q, o;
    uintptr_t slopes_at, sinks_at;
    if (!holds(kv_cache) || !view_rows(query, &q) || !view_rows(out, &o)) return false;
    if (plan.num_tokens() != tokens || q.shape[0] < tokens || o.shape[0] < tokens) return false;
    if (plan.block_size() != block_size() || !packed(o)) return false;
    if (!o.apart_from(cache_) || !o.apart_from(q)) return false;
    if (!per_head(slopes, o, &slopes_at) || !per_head(sinks, o, &sinks_at)) return false;
    bmc::attend(plan, tokens, q.begin, q.strides[0], q.strides[1], o.begin, o.strides[0],
                o.strides[1], cache_.begin, cache_.shape[0], cache_.strides[0], cache_.strides[1],
                block_size(), head_size(), dtype_, cache_type_, scale_, value_scale_, softcap_,
                slopes_at, sinks_at);
    return true;
  }

  // Rows past the slots are padding.
  bool write(py::handle key, py::handle value, py::handle kv_cache, py::handle slots) const {
    TensorView k, v, s;
    if (!holds(kv_cache) || !view_rows(key, &k) || !view_rows(value, &v)) return false;
    if (!viewer().view(slots, 1, kInt64, &s) || s.strides[0] != 1) return false;
    if (heads_ != cache_.shape[1] || v.shape[0] != k.shape[0]) return false;
    if (!k.apart_from(cache_) || !v.apart_from(cache_)) return false;
    const int64_t tokens = std::min(k.shape[0], s.shape[0]);
    write_rows(k.begin, k.strides[0], k.strides[1], v.begin, v.strides[0], v.strides[1],
               cache_.begin, cache_.strides[0], cache_.strides[1], s.begin, tokens, cache_.shape[0],
               heads_, block_size(), head_size(), dtype_, cache_type_, key_scale_, value_scale_);
    return true;
  }

 private:
  int32_t block_size() const { return static_cast<int32_t>(cache_.shape[2]); }
  int32_t head_size() const { return static_cast<int32_t>(cache_.shape[3] / 2); }

  bool holds(py::handle kv_cache) const {
    TensorView now;
    return viewer().view(kv_cache, 4, cache_element_, &now) && now.begin == cache_.begin &&
           std::equal(now.shape, now.shape + 4, cache_.shape) &&
           std::equal(now.strides, now.strides + 4, cache_.strides);
  }

  bool view_rows(py::handle rows, TensorView* view) const {
    return viewer().view(rows, 3, rows_element_, view) && view->shape[1] == heads_ &&
           view->shape[2] == head_size() && view->strides[2] == 1;
  }

  // Rows one after the other: in another order they may lie on each other.
  bool packed(const TensorView& rows) const {
    return rows.strides[1] == head_size() && rows.strides[0] == heads_ * head_size();
  }

  // The address of one value for each head; 0 for None.
  bool per_head(py::handle values, const TensorView& out, uintptr_t* address) const {
    *address = 0;
    if (values.is_none()) return true;
    TensorView view;
    if (!viewer().view(values, 1, kFloat32Element, &view) || view.shape[0] != heads_) return false;
    *address = view.begin;
    return view.strides[0] == 1 && out.apart_from(view);
  }

  TensorView cache_;
  ElementType cache_element_, rows_element_;
  int64_t heads_ = 0;
  int dtype_ = 0, cache_type_ = 0;
  float scale_ = 1, key_scale_ = 1, value_scale_ = 1, softcap_ = 0;
};

void grow_in_place_checked(uintptr_t base, int64_t room, int64_t parts, int64_t valid,
                           int64_t old_stride, int64_t new_stride) {
  if (parts < 0 || valid < 0 || valid > old_stride || old_stride > new_stride ||
      (parts > 0 && new_stride > room / parts)) {
    throw std::invalid_argument(std::to_string(parts) + " parts of " + std::to_string(valid) +
                                " bytes, stride " + std::to_string(old_stride) + " to " +
                                std::to_string(new_stride) + ", room for " + std::to_string(room) +
                                "; allowed: bytes <= old stride <= new stride <= room / parts");
  }
  py::gil_scoped_release release;
  grow_in_place(reinterpret_cast<char*>(base), parts, valid, old_stride, new_stride,
                omp_get_max_threads());
}

}  // namespace

const char* selected_isa() { return selected()->name; }

}  // namespace bmc

PYBIND11_MODULE(_native, m) {
  using namespace bmc;
  m.doc() = "Native kernels of bmc_core; use bmc_core.attention, which checks what it passes on.";
  m.def("usable_isas", &usable_names, "Instruction sets that this machine can run, best first.");
  m.def("isa", [] { return std::string(selected()->name); });
  m.def("select_isa", &select_isa);
  m.def("num_threads", [] { return omp_get_max_threads(); });
  // Local, so that another build of this module may be loaded beside it
  // (tests/support/emulation.py).
  py::class_<Plan>(m, "Plan", py::module_local())
      .def(py::init(&make_plan))
      .def_property_readonly("num_tokens", &Plan::num_tokens)
      .def("work_items", [](const Plan& plan) {
        std::vector<py::tuple> rows;
        for (const WorkItem& item : plan.items()) {
          rows.push_back(py::make_tuple(item.seq, item.kv_head, item.query_begin, item.query_count,
                                        item.kv_begin, item.kv_end, item.head_begin,
                                        item.head_count, item.split_group));
        }
        return rows;
      });
  py::class_<BoundLayer>(m, "BoundLayer", py::module_local())
      .def("attend", &BoundLayer::attend)
      .def("write", &BoundLayer::write);
  m.def("bind", &BoundLayer::bind);
  m.def("attend", &attend);
  m.def("write", &write_rows);
  m.def("grow_in_place", &grow_in_place_checked);
  bind_sampling(m);
}
