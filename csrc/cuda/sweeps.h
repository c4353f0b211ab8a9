// The sweeps on the GPU.
#pragma once

#include "../engine.h"

namespace gradl1::cuda {

void tap_backward(const Tap&, Where);
void tap_double_backward(const Tap&, Where);
void fake_quantize_forward(const FakeQuantize&, Where);
void fake_quantize_backward(const FakeQuantize&, Where);
void fake_quantize_double_backward(const FakeQuantize&, Where);
void l1_norm(const L1Norm&, Where);
void l1_norm_backward(const L1Norm&, Where);
void batch_norm_act_forward(const BatchNormAct&, Where);
void batch_norm_act_backward(const BatchNormAct&, Where);
void batch_norm_act_double_backward(const BatchNormAct&, Where);

std::int64_t l1_scratch_bytes(const Piece* pieces, std::int64_t count);

}  // namespace gradl1::cuda
