// fake_quantize: y = s * (clamp(rint(x / s) + z, q_min, q_max) - z), straight-through: dx = mask * dy and
// d_dy = mask * d_dx + d_l1 * sign(dy), where the mask is 1 where the code was not clamped.
//
// Codes must equal the reference's bit for bit: one rounding per operation, no fused multiply-add,
// half to even, clamped in floating point. Comparisons are written so that NaN stays NaN.
#pragma once

#include "body.h"

namespace gradl1 {

// Coefficients of every pass.
enum FakeQuantizeCoefficient { kScale, kZeroPoint, kCodeMin, kCodeMax, kDl1 };

GRADL1_FN float divide(float a, float b) {
#if defined(__CUDA_ARCH__)
    return __fdiv_rn(a, b);
#else
    return a / b;
#endif
}

GRADL1_FN double divide(double a, double b) {
#if defined(__CUDA_ARCH__)
    return __ddiv_rn(a, b);
#else
    return a / b;
#endif
}

GRADL1_FN float round_to_even(float value) { return rintf(value); }
GRADL1_FN double round_to_even(double value) { return rint(value); }

template <class A>
GRADL1_FN A code_of(A x, const A* k) {
    return round_to_even(divide(x, k[kScale])) + k[kZeroPoint];
}

// The mask: whether a code is not clamped.
template <class A>
GRADL1_FN bool mask_of_code(A code, const A* k) {
    return (code >= k[kCodeMin]) & (code <= k[kCodeMax]);
}

// in: x.
struct FakeQuantizeForward : Body<1, 1, 4, 0> {
    template <class A>
    static GRADL1_FN void apply(const A* in, const A* k, A* out, A*) {
        A code = code_of(in[0], k);
        code = code < k[kCodeMin] ? k[kCodeMin] : code;
        code = code > k[kCodeMax] ? k[kCodeMax] : code;
        out[0] = (code - k[kZeroPoint]) * k[kScale];
    }
};

// in: dy, x.  sum: l1.
struct FakeQuantizeBackward : Body<2, 1, 4, 1> {
    template <class A>
    static GRADL1_FN void apply(const A* in, const A* k, A* out, A* sum) {
        out[0] = mask_of_code(code_of(in[1], k), k) ? in[0] : A(0);
        sum[0] += magnitude(in[0]);
    }
};

// in: dy, x, d_dx.  Without d_dx it is TapDoubleBackward.
struct FakeQuantizeDoubleBackward : Body<3, 1, 5, 0> {
    template <class A>
    static GRADL1_FN void apply(const A* in, const A* k, A* out, A*) {
        const A masked_d_dx = mask_of_code(code_of(in[1], k), k) ? in[2] : A(0);
        out[0] = k[kDl1] * sign_of(in[0]) + masked_d_dx;
    }
};

}  // namespace gradl1
