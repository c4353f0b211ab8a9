// What the binding hands to host and device alike: checked pointers, sizes and options of each sweep.
//
// Vectors (weight, bias, mean, rstd and their gradients, scale, zero point, scalars) are in the type
// of the sums; tensors are in the type of the request. Null stands for absent.
#pragma once

#include <cstdint>

#include "arithmetic/batch_norm_act.h"

namespace gradl1 {

enum class DType { float32, float64, float16, bfloat16 };

struct Tap {  // every pass of one tensor
    DType dtype;
    Layout layout;
    const void *dy, *d_dx, *d_l1;
    void *out, *l1, *scratch;
    const void *x, *ends, *d_ends;
    void* out_ends;
};

struct FakeQuantize {
    DType dtype;
    Layout layout;
    double code_min, code_max;
    const void *x, *scale, *zero_point, *dy, *d_dx, *d_l1;
    void *out, *l1, *scratch;
};

// Its double backward without d_dx, which is the tap's.
GRADL1_FN Tap without_d_dx(const FakeQuantize& r) {
    Tap t{};
    t.dtype = r.dtype, t.layout = {1, 1, r.layout.numel()};
    t.dy = r.dy, t.d_l1 = r.d_l1, t.out = r.out;
    return t;
}

struct Piece {  // one tensor among many
    DType dtype;
    std::int64_t numel;
    const void* x;
    void* v;  // d_dx, read by the double backward; dx, written by the backward
};

struct L1Norm {  // out[i] and dy[i] are float64 if wide, else float32
    const Piece* pieces;
    std::int64_t count;
    bool wide;
    void *out, *scratch;
    const void* dy;
};

struct BatchNormAct {
    DType dtype;
    Layout layout;
    Activation activation;  // never `quantized`: a scale says that
    bool training, with_residual;
    double eps, code_min, code_max;
    const void *scale, *zero_point;
    const void *x, *activated, *weight, *bias, *mean, *rstd, *residual;
    const void *dy, *d_dx, *d_dweight, *d_dbias, *d_dresidual, *d_l1;
    void *out, *out2, *out_mean, *out_rstd, *dweight, *dbias, *l1, *scratch;
    const void *ends, *d_ends;  // of y: its extremes and how often it has each, the gradients of the extremes
    void* out_ends;

    GRADL1_FN bool masks() const { return activation != Activation::none || scale; }
};

}  // namespace gradl1
