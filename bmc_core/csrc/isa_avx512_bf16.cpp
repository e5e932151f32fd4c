#define BMC_ISA_NAMESPACE avx512_bf16
#include <omp.h>

#include "simd_avx512.h"
// The element types and the kernel stand on the vector type above.
#include "attention_kernel.h"

namespace bmc {

const KernelTable& kernels_avx512_bf16() {
  static const KernelTable table = {"avx512_bf16", avx512_bf16::scratch_bytes, avx512_bf16::attend};
  return table;
}

}  // namespace bmc
