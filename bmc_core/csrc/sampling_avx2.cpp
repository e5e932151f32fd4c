#define BMC_ISA_NAMESPACE avx2
#include <omp.h>

#include "simd_avx2.h"
// The kernels stand on the vector type above.
#include "sampling_kernel.h"

namespace bmc {

const SamplingKernels& sampling_avx2() {
  static const SamplingKernels kernels = {avx2::verify, avx2::keep_top};
  return kernels;
}

}  // namespace bmc
