// batch_norm_act: y = q(act(x * scale + shift + residual)) and its two backward sweeps, element by element.
//
// The derivation stands in backends/reference/batch_norm_act.py. Here d = x - mean replaces
// xh = d * rstd; the factor is in the coefficients of channels.h. The mask of the activation is
// recomputed from x by the very operations of the forward pass, or read from the output of the
// activation where a residual was added. Comparisons treat NaN as the reference does.
#pragma once

#include "fake_quantize.h"

namespace gradl1 {

// `quantized` is any of the other three with fake quantization behind it. Its ends, -inf and inf where
// the activation has none, are constants like the grid: one set of kernels serves all three.
enum class Activation { none, relu, relu6, quantized };

// Constants of quantized bodies; the first four are those of fake_quantize.
enum QuantizedConstant { kLow = kDl1, kHigh, kQuantizedConstants };

template <Activation Act>
constexpr int kConstants = Act == Activation::quantized ? int(kQuantizedConstants) : 0;

template <Activation Act, class A>
GRADL1_FN A activate(A z, const A* q) {
    if constexpr (Act == Activation::relu || Act == Activation::relu6) z = z < A(0) ? A(0) : z;
    if constexpr (Act == Activation::relu6) z = z > A(6) ? A(6) : z;
    if constexpr (Act == Activation::quantized) {
        z = z < q[kLow] ? q[kLow] : z;
        z = z > q[kHigh] ? q[kHigh] : z;
    }
    return z;
}

// a: what the activation gave, or was given. At an end of the activation nothing passes, and no NaN if quantized.
template <Activation Act, class A>
GRADL1_FN bool passes(A a, const A* q) {
    if constexpr (Act == Activation::relu) return !(a <= A(0));
    if constexpr (Act == Activation::relu6) return (a > A(0)) & (a < A(6));
    if constexpr (Act == Activation::quantized) return (a > q[kLow]) & (a < q[kHigh]) & inside(code_of(a, q), q);
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

// The value as it is, or would be, stored.
template <class T, class A>
GRADL1_FN A rounded(A value) {
    return static_cast<A>(widen(Narrow<T>::from(value)));
}

// in: x, residual if any.  k: scale, shift.  out: y, and what was quantized where a residual was added.
// sums: the ends of y, if they are wanted; there is no quantizer then.
template <Activation Act, bool Residual, bool Ends, class T>
struct Normalise
    : Body<1 + Residual, 1 + (Residual && Act == Activation::quantized), 2, Ends * kEndSums, kConstants<Act>, Ends> {
    template <class A>
    static GRADL1_FN void apply(const A* in, const A* k, A* out, A* sum) {
        A z = in[0] * k[0] + k[1];
        if constexpr (Residual) z += in[1];
        out[0] = activate<Act>(z, k + 2);
        if constexpr (Ends) extend(rounded<T>(out[0]), sum);
        if constexpr (Act == Activation::quantized) {
            const A activated = rounded<T>(out[0]);
            if constexpr (Residual) out[1] = activated;
            FakeQuantizeForward::apply(&activated, k + 2, out, static_cast<A*>(nullptr));
        }
    }
};

// Coefficients shared by the backward sweeps: the first three of each.
enum BackwardCoefficient { kMean, kNormScale, kNormShift, kOwn };

// Where the mask is known from: x, or the output of the activation.
enum class Mask { open, from_x, from_activated };

template <Mask From>
constexpr int kReadsActivated = From == Mask::from_activated;

// T: the type in which the output of the activation is stored, whose rounding decides whether it is 0 or 6.
// q: the constants, if any.
template <Activation Act, Mask From, class T, class A>
GRADL1_FN A masked(A g, A x, A activated, const A* k, const A* q) {
    if constexpr (From == Mask::from_activated) return passes<Act>(activated, q) ? g : A(0);
    if constexpr (From == Mask::from_x) {
        return passes<Act>(rounded<T>(x * k[kNormScale] + k[kNormShift]), q) ? g : A(0);
    }
    return g;
}

// dy plus what the ends of y give to it; y as it was stored: read, or recomputed by the operations of the forward pass.
template <Activation Act, Mask From, bool Ends, class T, class A>
GRADL1_FN A cotangent(A dy, A x, A activated, const A* k, const A* q) {
    if constexpr (Ends) {
        const A y = From == Mask::from_activated
                        ? activated
                        : rounded<T>(activate<Act>(x * k[kNormScale] + k[kNormShift], q));
        return add_share(dy, y, q);
    }
    return dy;
}

template <Activation Act, bool Ends>
constexpr int kBackwardConstants = Ends ? int(kEndConstants) : kConstants<Act>;

// in: dy, x, activated if it gives the mask.  out: g, where a residual wants it.  sums: g, g * d, |dy|.
template <Activation Act, Mask From, bool Ends, class T>
struct BackwardSums : Body<2 + kReadsActivated<From>, kReadsActivated<From>, 3, 3, kBackwardConstants<Act, Ends>> {
    template <class A>
    static GRADL1_FN void apply(const A* in, const A* k, A* out, A* sum) {
        const A activated = in[2 * kReadsActivated<From>];
        const A dy = cotangent<Act, From, Ends, T>(in[0], in[1], activated, k, k + 3);
        const A g = masked<Act, From, T>(dy, in[1], activated, k, k + 3);
        if constexpr (From == Mask::from_activated) out[0] = g;
        sum[0] += g;
        sum[1] += g * (in[1] - k[kMean]);
        sum[2] += magnitude(dy);
    }
};

// Zero where the factor is: in evaluation, where it is, an infinite value must not make a NaN.
template <class A>
GRADL1_FN A times(A factor, A value) {
    return factor != A(0) ? factor * value : A(0);
}

// in: dy (or g, with an open mask), x.  k: ..., factor, mean of g, slope.
template <Activation Act, Mask From, bool Ends, class T>
struct BackwardApply : Body<2, 1, 6, 0, kBackwardConstants<Act, Ends>> {
    template <class A>
    static GRADL1_FN void apply(const A* in, const A* k, A* out, A*) {
        const A dy = cotangent<Act, From, Ends, T>(in[0], in[1], A(0), k, k + 6);
        const A g = masked<Act, From, T>(dy, in[1], A(0), k, k + 6);
        out[0] = ((g - k[kOwn + 1]) - times(k[kOwn + 2], in[1] - k[kMean])) * k[kOwn];
    }
};

// in: dy, x, d_dx, activated if it gives the mask.  sums: g, g * d, v, v * d, g * v.
template <Activation Act, Mask From, class T>
struct DoubleBackwardSums : Body<3 + kReadsActivated<From>, 0, 3, 5, kConstants<Act>> {
    template <class A>
    static GRADL1_FN void apply(const A* in, const A* k, A*, A* sum) {
        const A g = masked<Act, From, T>(in[0], in[1], in[2 + kReadsActivated<From>], k, k + 3);
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

// in: dy, x, d_dx, activated if it gives the mask, d_dresidual if it arrived.  out: d_dy, d_x.
template <Activation Act, Mask From, bool Residual, class T>
struct DoubleBackwardApply : Body<3 + kReadsActivated<From> + Residual, 2, kDoubleCoefficients, 0, kConstants<Act>> {
    template <class A>
    static GRADL1_FN void apply(const A* in, const A* k, A* out, A*) {
        constexpr int last = 2 + kReadsActivated<From>;
        const A* q = k + kDoubleCoefficients;
        const A v = in[2], d = in[1] - k[kMean];
        const A g = masked<Act, From, T>(in[0], in[1], in[last], k, q);
        A d_g = (k[kGv] * v + times(k[kGd], d)) + k[kG1];
        if constexpr (Residual) d_g += in[last + Residual];
        const A kept = masked<Act, From, T>(d_g, in[1], in[last], k, q);
        out[0] = k[kDl1Term] * sign_of(in[0]) + kept;
        out[1] = k[kXg] * g + ((times(k[kXd], d) + k[kX1]) + times(k[kXv], v));
    }
};

}  // namespace gradl1
