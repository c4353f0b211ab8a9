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

struct Taps {  // many tensors of one type
    DType dtype;
    const std::int64_t* numels;
    std::int64_t count;
    const void *x, *dy, *total;  // lists of addresses; one of dy may be 0
    const void* d_ends;
    void* ends;
    void* scratch;
    std::int64_t scratch_bytes;
};

// Address number i of a list.
GRADL1_FN void* at(const void* addresses, std::int64_t i) {
    return addresses ? reinterpret_cast<void*>(static_cast<const std::uintptr_t*>(addresses)[i]) : nullptr;
}

// The tap of tensor number i; passes over a tensor follow one another, so scratch serves all.
GRADL1_FN Tap tap_of(const Taps& r, std::int64_t i) {
    const std::int64_t sum = r.dtype == DType::float64 ? 8 : 4;
    Tap t{};
    t.dtype = r.dtype, t.layout = {1, 1, r.numels[i]};
    t.x = at(r.x, i), t.dy = at(r.dy, i), t.total = at(r.total, i);
    t.ends = static_cast<char*>(r.ends) + i * 4 * sum;
    t.d_ends = r.d_ends ? static_cast<const char*>(r.d_ends) + i * 2 * sum : nullptr;
    t.scratch = r.scratch, t.scratch_bytes = r.scratch_bytes;
    return t;
}

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
