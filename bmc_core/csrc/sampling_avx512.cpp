#define BMC_ISA_NAMESPACE avx512
#include <omp.h>

#include "simd_avx512.h"
// The kernels stand on the vector type above.
#include "sampling_kernel.h"

namespace bmc {

const SamplingKernels& sampling_avx512() {
  static const SamplingKernels kernels = {avx512::verify, avx512::keep_top};
  return kernels;
}

}  // namespace bmc
