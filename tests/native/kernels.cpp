// The kernels of csrc/isa_amx_bf16.cpp over emulated matrix registers, as the only instruction set
// of the module that they are linked into (tests/support/emulation.py).
#define BMC_ISA_NAMESPACE emulated_tiles
#define BMC_TILES
#include <omp.h>

#include "emulated_tiles.h"
// The element types and the kernel stand on the vector type above.
#include "attention_kernel.h"
#include "cpu_features.h"

namespace bmc {

std::vector<const KernelTable*> usable_kernels() {
  static const KernelTable table = {"emulated_tiles", emulated_tiles::scratch_bytes,
                                    emulated_tiles::attend};
  return {&table};
}

}  // namespace bmc
