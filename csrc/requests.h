// What a pass works on: its settings and its memory. One struct serves the passes of one operation; passes.h
// lists what each pass takes and gives.
//
// Tensors are in the type of the request; vectors (weight, bias, mean, rstd and their gradients, scale, zero
// point, ends, scalars) are in the type of the sums. Null stands for absent.
#pragma once

#include <cstdint>

#include "arithmetic/batch_norm_act.h"

namespace gradl1 {

enum class DType { float32, float64, float16, bfloat16 };

struct Tap {
    DType dtype;
    Layout layout;
    const void *x, *dy, *d_dx, *d_l1, *d_ends;
    void *ends, *l1, *d_dy, *total;
    void* scratch;
    std::int64_t scratch_bytes;
};

struct FakeQuantize {
    DType dtype;
    Layout layout;
    double code_min, code_max;
    const void *x, *scale, *zero_point, *dy, *d_dx, *d_l1;
    void *y, *dx, *l1, *d_dy;
    void* scratch;
    std::int64_t scratch_bytes;
};

// Its double backward without d_dx, which is the tap's.
GRADL1_FN Tap without_d_dx(const FakeQuantize& r) {
    Tap t{};
    t.dtype = r.dtype, t.layout = {1, 1, r.layout.numel()};
    t.dy = r.dy, t.d_l1 = r.d_l1, t.d_dy = r.d_dy;
    return t;
}

struct Piece {  // one tensor among many
    DType dtype;
    std::int64_t numel;
    const void* x;
    void* v;  // d_dx, read by the double backward; dx, written by the backward
};

struct L1Norm {
    const Piece* pieces;
    std::int64_t count;
    bool wide;  // norms and dy are float64, else float32
    const void* dy;
    void* norms;
    void* scratch;
    std::int64_t scratch_bytes;
};

struct BatchNormAct {
    DType dtype;
    Layout layout;
    Activation activation;  // never `quantized`: the next line says that
    bool training, with_residual, quantized, with_ends;
    double eps, code_min, code_max;
    const void *x, *weight, *bias, *running_mean, *running_var, *residual, *scale, *zero_point;
    void *y, *activated, *mean, *rstd;
    void* ends;  // of y: its extremes and how often it has each
    const void *dy, *d_ends;
    void *dx, *dweight, *dbias, *dresidual, *l1;
    const void *d_dx, *d_dweight, *d_dbias, *d_dresidual, *d_l1;
    void *d_dy, *d_x, *d_weight;
    void* scratch;
    std::int64_t scratch_bytes;

    // Whether the output of the activation gives the mask or is what has ends; else both follow from x.
    GRADL1_FN bool reads_activated() const {
        return with_residual && (activation != Activation::none || quantized || d_ends);
    }
};

}  // namespace gradl1
