// The host's engine: each sweep goes to the instruction set in use.
#include "../engines.h"

#include "kernels.h"

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

}  // namespace

const Engine& host_engine() { return kEngine; }

}  // namespace gradl1
