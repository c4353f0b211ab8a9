// The table of passes. Whatever has one entry for each pass, or for each piece of memory that a pass takes, is
// made from it: the functions on the host and on the GPU, the engines, and the binding with its checks.
//
//   GRADL1_PASSES       PASS(name, Request): the passes, and which struct of requests.h each works on
//   GRADL1_SETTINGS_*   SETTING(name): the members of a request that do not change from call to call
//   GRADL1_FIELDS_*     FIELD(name, extent, presence): the memory of a pass, which Python gives by name;
//                       fields.h has the extents and the presences, which may depend on the fields before
#pragma once

#define GRADL1_PASSES(PASS)                             \
    PASS(tap_backward, Tap)                             \
    PASS(tap_double_backward, Tap)                      \
    PASS(tap_ends, Tap)                                 \
    PASS(tap_add_ends_gradient, Tap)                    \
    PASS(taps_ends, Taps)                               \
    PASS(taps_add_ends_gradients, Taps)                 \
    PASS(fake_quantize_forward, FakeQuantize)           \
    PASS(fake_quantize_backward, FakeQuantize)          \
    PASS(fake_quantize_double_backward, FakeQuantize)   \
    PASS(l1_norm, L1Norm)                               \
    PASS(l1_norm_backward, L1Norm)                      \
    PASS(batch_norm_act_forward, BatchNormAct)          \
    PASS(batch_norm_act_backward, BatchNormAct)         \
    PASS(batch_norm_act_double_backward, BatchNormAct)

#define GRADL1_SETTINGS_Tap(SETTING) SETTING(dtype) SETTING(layout)

#define GRADL1_FIELDS_tap_backward(FIELD) \
    FIELD(dy, tensor, needed)             \
    FIELD(l1, scalar, needed)             \
    FIELD(scratch, scratch, own_on_host)

#define GRADL1_FIELDS_tap_double_backward(FIELD) \
    FIELD(d_dx, tensor, optional)                \
    FIELD(d_l1, scalar, needed)                  \
    FIELD(dy, tensor, needed)                    \
    FIELD(d_dy, tensor, needed)

#define GRADL1_FIELDS_tap_ends(FIELD) \
    FIELD(x, tensor, needed)          \
    FIELD(ends, ends, needed)         \
    FIELD(scratch, scratch, own_on_host)

#define GRADL1_FIELDS_tap_add_ends_gradient(FIELD) \
    FIELD(dy, tensor, optional)                    \
    FIELD(x, tensor, needed)                       \
    FIELD(ends, ends, needed)                      \
    FIELD(d_ends, ends_gradient, needed)           \
    FIELD(total, tensor, needed)                   \
    FIELD(scratch, scratch, own_on_host)

// The passes of the same names over many tensors, one after the other.
#define GRADL1_SETTINGS_Taps(SETTING) SETTING(dtype) SETTING(numels)

#define GRADL1_FIELDS_taps_ends(FIELD) \
    FIELD(x, addresses, needed)        \
    FIELD(ends, all_ends, needed)      \
    FIELD(scratch, scratch, own_on_host)

#define GRADL1_FIELDS_taps_add_ends_gradients(FIELD) \
    FIELD(dy, addresses, optional)                   \
    FIELD(x, addresses, needed)                      \
    FIELD(ends, all_ends, needed)                    \
    FIELD(d_ends, all_ends_gradients, needed)        \
    FIELD(total, addresses, needed)                  \
    FIELD(scratch, scratch, own_on_host)

#define GRADL1_SETTINGS_FakeQuantize(SETTING) SETTING(dtype) SETTING(layout) SETTING(code_min) SETTING(code_max)

#define GRADL1_FIELDS_fake_quantize_forward(FIELD) \
    FIELD(x, tensor, needed)                       \
    FIELD(scale, vector, needed)                   \
    FIELD(zero_point, vector, needed)              \
    FIELD(y, tensor, needed)                       \
    FIELD(scratch, scratch, own_on_host)

#define GRADL1_FIELDS_fake_quantize_backward(FIELD) \
    FIELD(dy, tensor, needed)                       \
    FIELD(x, tensor, needed)                        \
    FIELD(scale, vector, needed)                    \
    FIELD(zero_point, vector, needed)               \
    FIELD(dx, tensor, needed)                       \
    FIELD(l1, scalar, optional)                     \
    FIELD(scratch, scratch, own_on_host)

#define GRADL1_FIELDS_fake_quantize_double_backward(FIELD) \
    FIELD(d_dx, tensor, optional)                          \
    FIELD(d_l1, scalar, r.d_dx ? optional : needed)        \
    FIELD(dy, tensor, needed)                              \
    FIELD(x, tensor, needed)                               \
    FIELD(scale, vector, needed)                           \
    FIELD(zero_point, vector, needed)                      \
    FIELD(d_dy, tensor, needed)                            \
    FIELD(scratch, scratch, own_on_host)

#define GRADL1_SETTINGS_L1Norm(SETTING) SETTING(pieces) SETTING(wide)

#define GRADL1_FIELDS_l1_norm(FIELD) \
    FIELD(norms, norms, needed)      \
    FIELD(scratch, scratch, own_on_host)

#define GRADL1_FIELDS_l1_norm_backward(FIELD) \
    FIELD(dy, norms, needed)

#define GRADL1_SETTINGS_BatchNormAct(SETTING)                                            \
    SETTING(dtype) SETTING(layout) SETTING(training) SETTING(eps) SETTING(activation)    \
    SETTING(with_residual) SETTING(quantized) SETTING(code_min) SETTING(code_max) SETTING(with_ends)

#define GRADL1_FIELDS_batch_norm_act_forward(FIELD)                     \
    FIELD(x, tensor, needed)                                            \
    FIELD(weight, vector, optional)                                     \
    FIELD(bias, vector, optional)                                       \
    FIELD(running_mean, vector, needed_if(!r.training))                 \
    FIELD(running_var, vector, needed_if(!r.training))                  \
    FIELD(residual, tensor, needed_if(r.with_residual))                 \
    FIELD(scale, scalar, needed_if(r.quantized))                        \
    FIELD(zero_point, scalar, needed_if(r.quantized))                   \
    FIELD(y, tensor, needed)                                            \
    FIELD(activated, tensor, needed_if(r.with_residual && r.quantized)) \
    FIELD(mean, vector, needed)                                         \
    FIELD(rstd, vector, needed)                                         \
    FIELD(ends, ends, needed_if(r.with_ends))                           \
    FIELD(scratch, scratch, own_on_host)

// The ends are of y without a quantizer.
#define GRADL1_FIELDS_batch_norm_act_backward(FIELD)               \
    FIELD(d_ends, ends_gradient, r.quantized ? refused : optional) \
    FIELD(ends, ends, needed_if(r.d_ends))                         \
    FIELD(dy, tensor, needed)                                      \
    FIELD(x, tensor, needed)                                       \
    FIELD(activated, tensor, needed_if(r.reads_activated()))       \
    FIELD(weight, vector, optional)                                \
    FIELD(bias, vector, optional)                                  \
    FIELD(mean, vector, needed)                                    \
    FIELD(rstd, vector, needed)                                    \
    FIELD(scale, scalar, needed_if(r.quantized))                   \
    FIELD(zero_point, scalar, needed_if(r.quantized))              \
    FIELD(dx, tensor, needed)                                      \
    FIELD(dweight, vector, needed)                                 \
    FIELD(dbias, vector, needed)                                   \
    FIELD(dresidual, tensor, needed_if(r.reads_activated()))       \
    FIELD(l1, scalar, optional)                                    \
    FIELD(scratch, scratch, own_on_host)

// Without a mask d_dresidual is one more term of d_dy, which the caller adds.
#define GRADL1_FIELDS_batch_norm_act_double_backward(FIELD)                \
    FIELD(d_dx, tensor, needed)                                            \
    FIELD(d_dweight, vector, optional)                                     \
    FIELD(d_dbias, vector, optional)                                       \
    FIELD(d_dresidual, tensor, r.reads_activated() ? optional : refused)   \
    FIELD(d_l1, scalar, optional)                                          \
    FIELD(dy, tensor, needed)                                              \
    FIELD(x, tensor, needed)                                               \
    FIELD(activated, tensor, needed_if(r.reads_activated()))               \
    FIELD(weight, vector, optional)                                        \
    FIELD(bias, vector, optional)                                          \
    FIELD(mean, vector, needed)                                            \
    FIELD(rstd, vector, needed)                                            \
    FIELD(scale, scalar, needed_if(r.quantized))                           \
    FIELD(zero_point, scalar, needed_if(r.quantized))                      \
    FIELD(d_dy, tensor, needed)                                            \
    FIELD(d_x, tensor, needed)                                             \
    FIELD(d_weight, vector, needed)                                        \
    FIELD(scratch, scratch, own_on_host)
