// The Python module. Each half, `host` and `cuda`, has two functions for each pass of the table:
//
//     name(where, settings, **memory)   runs the pass; memory is (address, bytes), or None
//     prepare_name(settings)            returns a function of (where, **memory) that takes addresses, or 0
//
// `where` is (threads, 0) on the host and (device, stream) on a GPU. The module knows no torch.
#include <pybind11/pybind11.h>

#include "engines.h"
#include "host/binding.h"
#include "prepared.h"

namespace gradl1 {
namespace {

template <class Pass>
void expect_known(const py::dict& memory) {
    for (const auto& entry : memory) {
        const auto name = entry.first.cast<std::string>();
        bool known = false;
        for (const char* field : Pass::fields) known = known || name == field;
        if (!known) throw py::type_error(std::string(Pass::name) + " has no field " + name);
    }
}

template <class Pass>
void define_pass(py::module_& m, const Engine& e) {
    m.def(Pass::name, [&e](const py::tuple& where, const py::dict& settings, const py::kwargs& memory) {
        const PreparedPass<Pass> prepared(e, settings);
        expect_known<Pass>(memory);
        auto request = prepared.request;
        Pass::read(request, Spans(memory, e.in_host_memory));
        check_addresses(request);
        launch(e.*Pass::function, request, where_of(where.ptr()));
    });
    m.def((std::string("prepare_") + Pass::name).c_str(),
          [&e](const py::dict& settings) { return prepare<Pass>(e, settings); });
}

void define_engine(py::module_ m, const Engine& e) {
#define GRADL1_PASS(name, Request) define_pass<pass::name>(m, e);
    GRADL1_PASSES(GRADL1_PASS)
#undef GRADL1_PASS
    m.def("scratch_bytes", [&e](const py::tuple& layout) { return e.scratch_bytes(layout_of(layout)); });
    m.def("l1_norm_scratch_bytes", [&e](const py::dict& settings) {
        return Prepared<L1Norm>(e, settings).request.scratch_bytes;
    });
    m.attr("in_host_memory") = e.in_host_memory;  // where scratch need not be given
}

}  // namespace
}  // namespace gradl1

PYBIND11_MODULE(_gradl1, m) {
    using namespace gradl1;
    m.attr("sources") = GRADL1_SOURCES;
    m.attr("compiler") = GRADL1_COMPILER;
    m.attr("cuda_compiler") = GRADL1_CUDA_COMPILER;
    m.attr("cuda_architectures") = GRADL1_CUDA_ARCHITECTURES;
#if defined(GRADL1_HAS_HOST)
    define_engine(m.def_submodule("host"), host_engine());
    define_host(m);
#endif
#if defined(GRADL1_HAS_CUDA)
    define_engine(m.def_submodule("cuda"), cuda_engine());
#endif
}
