// What the host half tells about itself, and the choice of its instruction set.
#pragma once

#include <pybind11/pybind11.h>

#include <string>

#include "kernels.h"
#include "pool.h"

namespace gradl1 {

inline void use_instruction_set(const std::string& name) {
    if (!host::use(name.c_str())) {
        throw pybind11::value_error("instruction set " + name + " is not built or cannot run here");
    }
}

inline pybind11::list instruction_sets() {
    pybind11::list names;
    for (const char* const* name = host::built(); *name; ++name) {
        if (host::runnable(*name)) names.append(*name);
    }
    return names;
}

inline void define_host(pybind11::module_& m) {
    m.def("instruction_sets", instruction_sets, "Those that this processor can run, the best first.");
    m.def("instruction_set", [] { return std::string(host::kernels().name); });
    m.def("use_instruction_set", use_instruction_set);
    m.def("has_team", host::has_team, "Whether the process has an OpenMP runtime to borrow threads from.");
}

}  // namespace gradl1
