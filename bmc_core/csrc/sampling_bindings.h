// What bindings.cpp and sampling_bindings.cpp know of each other.
#pragma once

#include <pybind11/pybind11.h>

#include "sampling.h"

namespace bmc {

// The name of the instruction set in use.
const char* selected_isa();

void bind_sampling(pybind11::module_& m);

}  // namespace bmc
