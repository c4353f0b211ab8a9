// The engines of this build, and what each tells about itself.
#pragma once

#include <pybind11/pybind11.h>

#include "engine.h"

namespace gradl1 {

const Engine& host_engine();
const Engine& cuda_engine();

void define_host(pybind11::module_& m);

}  // namespace gradl1
