// The table of passes: the name of each, and the request that it takes.
//
// Whatever has one entry for each pass, on the host or on the GPU, is made from this table.
#pragma once

#define GRADL1_PASSES(PASS)                             \
    PASS(tap_backward, Tap)                             \
    PASS(tap_double_backward, Tap)                      \
    PASS(tap_ends, Tap)                                 \
    PASS(tap_add_ends_gradient, Tap)                    \
    PASS(fake_quantize_forward, FakeQuantize)           \
    PASS(fake_quantize_backward, FakeQuantize)          \
    PASS(fake_quantize_double_backward, FakeQuantize)   \
    PASS(l1_norm, L1Norm)                               \
    PASS(l1_norm_backward, L1Norm)                      \
    PASS(batch_norm_act_forward, BatchNormAct)          \
    PASS(batch_norm_act_backward, BatchNormAct)         \
    PASS(batch_norm_act_double_backward, BatchNormAct)
