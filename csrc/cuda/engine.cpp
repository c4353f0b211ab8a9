// The GPU's engine.
#include "../arithmetic/batch_norm_act.h"
#include "../engines.h"
#include "shape.h"
#include "sweeps.h"

namespace gradl1 {
namespace cuda {

static std::int64_t scratch_bytes(const Layout& t) {
    constexpr std::int64_t most_sums = 5, most_coefficients = kDoubleCoefficients, per_channel = 1;
    return ((most_chunks(t) * most_sums + most_coefficients + per_channel) * t.channels + kQuantizedConstants) * 8;
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
