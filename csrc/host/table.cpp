// The sweeps of one instruction set, as the dispatcher wants them.
#include "sweeps.h"

#define GRADL1_JOIN_(a, b) a##b
#define GRADL1_JOIN(a, b) GRADL1_JOIN_(a, b)
#define GRADL1_TEXT_(a) #a
#define GRADL1_TEXT(a) GRADL1_TEXT_(a)

namespace gradl1::host {

extern const Kernels GRADL1_JOIN(kernels_, GRADL1_ISA);
const Kernels GRADL1_JOIN(kernels_, GRADL1_ISA) = {
    GRADL1_TEXT(GRADL1_ISA),
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
};

}  // namespace gradl1::host
