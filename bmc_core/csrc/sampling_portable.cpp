#define BMC_ISA_NAMESPACE portable
#include <omp.h>

#include "simd_portable.h"
// The kernels stand on the vector type above.
#include "sampling_kernel.h"

namespace bmc {

const SamplingKernels& sampling_portable() {
  static const SamplingKernels kernels = {portable::verify, portable::keep_top};
  return kernels;
}

}  // namespace bmc
