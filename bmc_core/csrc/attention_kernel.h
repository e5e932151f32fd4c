// The attention kernel: one template over element type, compiled once per instruction set.
//
// Work item = all query rows that share a KV head, so that K and V are read from memory once. Rows
// past a query's limit inside the last tile are computed and masked: BMC's redundant compute.
//
// No std:: function or container here or in what is included: see attention.h.
#pragma once

#include "vector_item.h"
#ifdef BMC_TILES
#include "tile_item.h"
#endif

namespace bmc::BMC_ISA_NAMESPACE {
namespace {

// The element that vector items compute with. Machines with AMX issue one vdpbf16ps every two
// cycles, so that unpacking to float is faster there (docs/kernel-log.md).
template <class E>
struct VectorElement {
  using type = E;
};
#ifdef BMC_TILES
template <class Format, class Values>
struct VectorElement<Fp8<Format, Values, BFloatProducts>> {
  using type = Fp8<Format, Values, PairProducts>;
};
#endif

template <class E>
void attend_share(const AttentionArgs& args, int thread) {
  using V = typename VectorElement<E>::type;
  char* memory = args.scratch + thread * args.scratch_bytes;
  Scratch<E> scratch;
  Scratch<V> vector_scratch;  // over the same memory: an item uses one of them
  scratch.carve(memory, args.plan.max_rows, args.head_size);
  vector_scratch.carve(memory, args.plan.max_rows, args.head_size);
#ifdef BMC_TILES
  TileConfig config;
#endif
  Queue queue(args);
  while (const WorkItem* item = queue.pop()) {
    const WorkItem& work = *item;
#ifdef BMC_TILES
    if constexpr (std::is_same_v<typename E::Arith, uint16_t>) {
      if (TileItem<E>::fits(args, work)) {
        TileItem<E>(args, work, scratch, queue).run(config);
        continue;
      }
    }
#endif
    VectorItem<V>(args, work, vector_scratch, queue).run();
  }
}

// Same: the element of a cache of the query's type; Values, Products: of one of fp8.
template <class Same, class Values, class Products>
void attend_cache(const AttentionArgs& args, int thread) {
  switch (args.cache_type) {
    case CacheType::kSameAsQuery:
      return attend_share<Same>(args, thread);
    case CacheType::kE4M3:
      return attend_share<Fp8<E4M3, Values, Products>>(args, thread);
    case CacheType::kE5M2:
      return attend_share<Fp8<E5M2, Values, Products>>(args, thread);
  }
}

void attend_share_of(const AttentionArgs& args, int thread) {
  switch (args.dtype) {
    case DType::kFloat32:
      attend_cache<Float32, FloatValues, PairProducts>(args, thread);
      break;
    case DType::kFloat16:
      attend_cache<Float16, HalfValues, PairProducts>(args, thread);
      break;
    case DType::kBFloat16:
      attend_cache<BFloat16, BFloatValues, BFloatProducts>(args, thread);
      break;
  }
}

void attend(const AttentionArgs& args) {
  if (args.num_threads == 1) return attend_share_of(args, 0);
#pragma omp parallel num_threads(args.num_threads)
  {
    attend_share_of(args, omp_get_thread_num());
  }
}

int64_t scratch_bytes(int32_t max_rows, int32_t head_size) {
  Scratch<Float32> plain;
  Scratch<Fp8<E4M3, FloatValues, PairProducts>> quantized;
  const int64_t widest = plain.carve(nullptr, max_rows, head_size);
  const int64_t unpacked = quantized.carve(nullptr, max_rows, head_size);
  return widest > unpacked ? widest : unpacked;
}

}  // namespace
}  // namespace bmc::BMC_ISA_NAMESPACE
