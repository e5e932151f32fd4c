#define BMC_ISA_NAMESPACE portable
#include <omp.h>

#include "simd_portable.h"
// The element types and the kernel stand on the vector type above.
#include "attention_kernel.h"

namespace bmc {

const KernelTable& kernels_portable() {
  static const KernelTable table = {"portable", portable::scratch_bytes, portable::attend};
  return table;
}

}  // namespace bmc
