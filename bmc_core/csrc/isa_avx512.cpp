#define BMC_ISA_NAMESPACE avx512
#include <omp.h>

#include "simd_avx512.h"
// The element types and the kernel stand on the vector type above.
#include "attention_kernel.h"

namespace bmc {

const KernelTable& kernels_avx512() {
  static const KernelTable table = {"avx512", avx512::scratch_bytes, avx512::attend};
  return table;
}

}  // namespace bmc
