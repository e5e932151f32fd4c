#define BMC_ISA_NAMESPACE amx_bf16
#define BMC_TILES  // items of many query rows are computed with matrix tiles
#include <omp.h>

#include "simd_avx512.h"
// The element types and the kernel stand on the vector type above.
#include "attention_kernel.h"

namespace bmc {

const KernelTable& kernels_amx_bf16() {
  static const KernelTable table = {"amx_bf16", amx_bf16::scratch_bytes, amx_bf16::attend};
  return table;
}

}  // namespace bmc
