// The sweeps of one instruction set, named so that the others' can stand beside them.
#pragma once

#include "driver.h"
#include "kernels.h"

namespace gradl1::host {
inline namespace GRADL1_ISA {

void tap_backward(const Tap&, int threads);
void tap_double_backward(const Tap&, int threads);
void fake_quantize_forward(const FakeQuantize&, int threads);
void fake_quantize_backward(const FakeQuantize&, int threads);
void fake_quantize_double_backward(const FakeQuantize&, int threads);
void l1_norm(const L1Norm&, int threads);
void l1_norm_backward(const L1Norm&, int threads);
void batch_norm_act_forward(const BatchNormAct&, int threads);
void batch_norm_act_backward(const BatchNormAct&, int threads);
void batch_norm_act_double_backward(const BatchNormAct&, int threads);

// A tensor without channels: one channel, one plane.
GRADL1_FN Layout flat(std::int64_t numel) { return {1, 1, numel}; }

template <class A>
GRADL1_FN A scalar_or_zero(const void* value) {
    return value ? *static_cast<const A*>(value) : A(0);
}

}  // namespace GRADL1_ISA
}  // namespace gradl1::host
