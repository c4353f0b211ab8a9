// The GPU's engine.
#include "../engines.h"
#include "shape.h"
#include "sweeps.h"

namespace gradl1 {
namespace cuda {

static std::int64_t scratch_bytes(const Layout& t) {
    return scratch_end(t) * 8;
}

static const Engine kEngine = {
    tap_backward,
    tap_double_backward,
    fake_quantize_forward,
    fake_quantize_backward,
    fake_quantize_double_backward,
    l1_norm,
    l1_norm_backward,
    batch_norm_act_forward,
    batch_norm_act_backward,
    batch_norm_act_double_backward,
    scratch_bytes,
    l1_scratch_bytes,
};

}  // namespace cuda

const Engine& cuda_engine() { return cuda::kEngine; }

}  // namespace gradl1
