// batch_norm_act: y = act(x * scale + shift + residual) and its two backward sweeps, element by element.
//
// The derivation stands in backends/reference/batch_norm_act.py. Here d = x - mean replaces
// xh = d * rstd; the factor is in the coefficients of channels.h. The mask of the activation is
// recomputed from x by the very operations of the forward pass, or read from y where a residual
// was added. Comparisons treat NaN as the reference does.
#pragma once

#include "body.h"

namespace gradl1 {

enum class Activation { none, relu, relu6 };

template <Activation Act, class A>
GRADL1_FN A activate(A z) {
    if constexpr (Act != Activation::none) z = z < A(0) ? A(0) : z;
    if constexpr (Act == Activation::relu6) z = z > A(6) ? A(6) : z;
    return z;
}

template <Activation Act, class A>
GRADL1_FN bool passes(A y) {
    if constexpr (Act == Activation::relu) return !(y <= A(0));
    if constexpr (Act == Activation::relu6) return (y > A(0)) & (y < A(6));
    return true;
}

// sums: x - k, (x - k)^2 for any k near the mean.
struct Moments : Body<1, 0, 1, 2> {
    template <class A>
    static GRADL1_FN void apply(const A* in, const A* k, A*, A* sum) {
        const A d = in[0] - k[0];
        sum[0] += d;
        sum[1] += d * d;
    }
};

// in: x, residual if any.  k: scale, shift.
template <Activation Act, bool Residual>
struct Normalise : Body<1 + Residual, 1, 2, 0> {
    template <class A>
    static GRADL1_FN void apply(const A* in, const A* k, A* out, A*) {
        A z = in[0] * k[0] + k[1];
        if constexpr (Residual) z += in[1];
        out[0] = activate<Act>(z);
    }
};

// Where the slope of the activation is known from.
enum class Mask { open, from_x, from_y };

// T: the type in which y was stored, whose rounding decides whether it is 0 or 6.
template <Activation Act, Mask From, class T, class A>
GRADL1_FN A masked(A g, A x, A y, A scale, A shift) {
    if constexpr (From == Mask::from_y) return passes<Act>(y) ? g : A(0);
    if constexpr (From == Mask::from_x) {
        return passes<Act>(static_cast<A>(widen(Narrow<T>::from(x * scale + shift)))) ? g : A(0);
    }
    return g;
}

// Coefficients shared by the backward sweeps: the first three of each.
enum BackwardCoefficient { kMean, kNormScale, kNormShift, kOwn };

// in: dy, x, y if it gives the mask.  out: g, where a residual wants it.  sums: g, g * d, |dy|.
template <Activation Act, Mask From, class T>
struct BackwardSums : Body<2 + (From == Mask::from_y), From == Mask::from_y, 3, 3> {
    template <class A>
    static GRADL1_FN void apply(const A* in, const A* k, A* out, A* sum) {
        const A y = From == Mask::from_y ? in[2 * (From == Mask::from_y)] : A(0);
        const A g = masked<Act, From, T>(in[0], in[1], y, k[kNormScale], k[kNormShift]);
        if constexpr (From == Mask::from_y) out[0] = g;
        sum[0] += g;
        sum[1] += g * (in[1] - k[kMean]);
        sum[2] += magnitude(in[0]);
    }
};

// Zero where the factor is: in evaluation, where it is, an infinite value must not make a NaN.
template <class A>
GRADL1_FN A times(A factor, A value) {
    return factor != A(0) ? factor * value : A(0);
}

// in: dy (or g, with an open mask), x.  k: ..., factor, mean of g, slope.
template <Activation Act, Mask From, class T>
struct BackwardApply : Body<2, 1, 6, 0> {
    template <class A>
    static GRADL1_FN void apply(const A* in, const A* k, A* out, A*) {
        const A g = masked<Act, From, T>(in[0], in[1], A(0), k[kNormScale], k[kNormShift]);
        out[0] = ((g - k[kOwn + 1]) - times(k[kOwn + 2], in[1] - k[kMean])) * k[kOwn];
    }
};

// in: dy, x, d_dx, y if it gives the mask.  sums: g, g * d, v, v * d, g * v.
template <Activation Act, Mask From, class T>
struct DoubleBackwardSums : Body<3 + (From == Mask::from_y), 0, 3, 5> {
    template <class A>
    static GRADL1_FN void apply(const A* in, const A* k, A*, A* sum) {
        const A y = From == Mask::from_y ? in[2 + (From == Mask::from_y)] : A(0);
        const A g = masked<Act, From, T>(in[0], in[1], y, k[kNormScale], k[kNormShift]);
        const A d = in[1] - k[kMean];
        sum[0] += g;
        sum[1] += g * d;
        sum[2] += in[2];
        sum[3] += in[2] * d;
        sum[4] += g * in[2];
    }
};

// Own coefficients of DoubleBackwardApply.
enum DoubleCoefficient { kDl1Term = kOwn, kGv, kGd, kG1, kXd, kX1, kXg, kXv, kDoubleCoefficients };

// in: dy, x, d_dx, y if it gives the mask, d_dresidual if it arrived.  out: d_dy, d_x.
template <Activation Act, Mask From, bool Residual, class T>
struct DoubleBackwardApply : Body<3 + (From == Mask::from_y) + Residual, 2, kDoubleCoefficients, 0> {
    template <class A>
    static GRADL1_FN void apply(const A* in, const A* k, A* out, A*) {
        constexpr int last = 2 + (From == Mask::from_y);
        const A v = in[2], d = in[1] - k[kMean];
        const A g = masked<Act, From, T>(in[0], in[1], in[last], k[kNormScale], k[kNormShift]);
        A d_g = (k[kGv] * v + times(k[kGd], d)) + k[kG1];
        if constexpr (Residual) d_g += in[last + Residual];
        const A kept = masked<Act, From, T>(d_g, in[1], in[last], k[kNormScale], k[kNormShift]);
        out[0] = k[kDl1Term] * sign_of(in[0]) + kept;
        out[1] = k[kXg] * g + ((times(k[kXd], d) + k[kX1]) + times(k[kXv], v));
    }
};

}  // namespace gradl1
