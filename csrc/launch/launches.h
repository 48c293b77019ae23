#pragma once

#include <pybind11/pybind11.h>

namespace pk {

// Adds `Launches`, `Tape` and what belongs to them to the module.
void add_launching(pybind11::module_& m);

}  // namespace pk
