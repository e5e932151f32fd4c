#define BMC_ISA_NAMESPACE avx2
#include <omp.h>

#include "simd_avx2.h"
// The element types and the kernel stand on the vector type above.
#include "attention_kernel.h"

namespace bmc {

const KernelTable& kernels_avx2() {
  static const KernelTable table = {"avx2", avx2::scratch_bytes, avx2::attend};
  return table;
}

}  // namespace bmc
