// Which kernels this machine can run: CPUID for the instructions, XGETBV for the operating system's
// saving of their registers. Compiled without any SIMD flag.
#pragma once

#include <vector>

#include "attention.h"

namespace bmc {

// Best first. Always ends with the portable kernels.
std::vector<const KernelTable*> usable_kernels();

}  // namespace bmc
