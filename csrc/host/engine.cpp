// The host's engine: each sweep goes to the instruction set in use.
#include "../engines.h"

#include <string>

#include "kernels.h"
#include "pool.h"

namespace gradl1 {
namespace {

template <auto Sweep, class Request>
void run(const Request& request, Where where) {
    (host::kernels().*Sweep)(request, static_cast<int>(where.first < 1 ? 1 : where.first));
}

using host::Kernels;

const Engine kEngine = {
    run<&Kernels::tap_backward, Tap>,
    run<&Kernels::tap_double_backward, Tap>,
    run<&Kernels::fake_quantize_forward, FakeQuantize>,
    run<&Kernels::fake_quantize_backward, FakeQuantize>,
    run<&Kernels::fake_quantize_double_backward, FakeQuantize>,
    run<&Kernels::l1_norm, L1Norm>,
    run<&Kernels::l1_norm_backward, L1Norm>,
    run<&Kernels::batch_norm_act_forward, BatchNormAct>,
    run<&Kernels::batch_norm_act_backward, BatchNormAct>,
    run<&Kernels::batch_norm_act_double_backward, BatchNormAct>,
    host::scratch_bytes,
    host::l1_scratch_bytes,
};

void use_instruction_set(const std::string& name) {
    if (!host::use(name.c_str())) {
        throw pybind11::value_error("instruction set " + name + " is not built or cannot run here");
    }
}

pybind11::list instruction_sets() {
    pybind11::list names;
    for (const char* const* name = host::built(); *name; ++name) {
        if (host::runnable(*name)) names.append(*name);
    }
    return names;
}

}  // namespace

const Engine& host_engine() { return kEngine; }

void define_host(pybind11::module_& m) {
    m.def("instruction_sets", instruction_sets, "Those that this processor can run, the best first.");
    m.def("instruction_set", [] { return std::string(host::kernels().name); });
    m.def("use_instruction_set", use_instruction_set);
    m.def("has_team", host::has_team, "Whether the process has an OpenMP runtime to borrow threads from.");
}

}  // namespace gradl1
