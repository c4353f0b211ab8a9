// batch_norm_act: y = q(act(x * scale + shift + residual)) and its two backward passes, element by element.
//
// docs/mathematics.md derives them ("Batch norm, in training"); its names are used here: g = mask * dy,
// v = d_dx, the sums A, B, P, Q, S, and M pixels of a channel. Here d = x - mean replaces xh = d * r; the
// factor r is in the coefficients, which channels.h computes. The mask is recomputed from x by the very
// operations of the forward pass, or read from the output of the activation where a residual was added.
// Comparisons treat NaN as the reference does.
#pragma once

#include "fake_quantize.h"

namespace gradl1 {

// `quantized` is any of the other three followed by fake quantization. The range of the activation, infinite
// where it has no bound, is then a constant like the scale: one set of kernels serves all three.
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

// The mask, from the output of the activation: 0 at its bounds and, if quantized, where the code was clamped
// and where the output is NaN.
template <Activation Act, class A>
GRADL1_FN bool mask_of(A activated, const A* q) {
    if constexpr (Act == Activation::relu) return !(activated <= A(0));
    if constexpr (Act == Activation::relu6) return (activated > A(0)) & (activated < A(6));
    if constexpr (Act == Activation::quantized) {
        return (activated > q[kLow]) & (activated < q[kHigh]) & mask_of_code(code_of(activated, q), q);
    }
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

// Coefficients of the forward pass: scale = gamma * r, shift = beta - mean * gamma * r.
enum ForwardCoefficient { kScaleOfX, kShift, kForwardCoefficients };

// in: x, residual if any.  out: y, and what was quantized where a residual was added.
// sums: the ends of y, if they are wanted; there is no quantizer then.
template <Activation Act, bool Residual, bool Ends, class T>
struct Normalise : Body<1 + Residual, 1 + (Residual && Act == Activation::quantized), kForwardCoefficients,
                        Ends * kEndSums, kConstants<Act>, Ends> {
    template <class A>
    static GRADL1_FN void apply(const A* in, const A* k, A* out, A* sum) {
        const A* q = k + kForwardCoefficients;
        // Step 1: normalise, add, activate.
        A z = in[0] * k[kScaleOfX] + k[kShift];
        if constexpr (Residual) z += in[1];
        out[0] = activate<Act>(z, q);
        // Step 2: measure or quantize what is stored.
        if constexpr (Ends) extend(rounded<T>(out[0]), sum);
        if constexpr (Act == Activation::quantized) {
            const A activated = rounded<T>(out[0]);
            if constexpr (Residual) out[1] = activated;
            FakeQuantizeForward::apply(&activated, q, out, static_cast<A*>(nullptr));
        }
    }
};

// Coefficients with which the backward passes recompute the forward; each pass adds its own behind them.
enum BackwardCoefficient { kMean, kNormScale, kNormShift, kOwn };

// Where the mask is known from: x, or the output of the activation.
enum class Mask { open, from_x, from_activated };

template <Mask From>
constexpr int kReadsActivated = From == Mask::from_activated;

// g, which is `gradient` where the mask is 1 and 0 elsewhere.
// T: the type in which the output of the activation is stored, whose rounding decides whether it is 0 or 6.
// q: the constants, if any.
template <Activation Act, Mask From, class T, class A>
GRADL1_FN A masked(A gradient, A x, A activated, const A* k, const A* q) {
    if constexpr (From == Mask::from_activated) return mask_of<Act>(activated, q) ? gradient : A(0);
    if constexpr (From == Mask::from_x) {
        return mask_of<Act>(rounded<T>(x * k[kNormScale] + k[kNormShift]), q) ? gradient : A(0);
    }
    return gradient;
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

// Sums of the backward pass: A = sum g, B / r = sum g * d, l1 = sum |dy|.
enum BackwardSum { kSumG, kSumGd, kSumMagnitude, kBackwardSums };

// in: dy, x, activated if it gives the mask.  out: g, where a residual wants it.
template <Activation Act, Mask From, bool Ends, class T>
struct BackwardSums
    : Body<2 + kReadsActivated<From>, kReadsActivated<From>, kOwn, kBackwardSums, kBackwardConstants<Act, Ends>> {
    template <class A>
    static GRADL1_FN void apply(const A* in, const A* k, A* out, A* sum) {
        const A* q = k + kOwn;
        const A activated = in[2 * kReadsActivated<From>];
        const A dy = cotangent<Act, From, Ends, T>(in[0], in[1], activated, k, q);
        const A g = masked<Act, From, T>(dy, in[1], activated, k, q);
        if constexpr (From == Mask::from_activated) out[0] = g;
        sum[kSumG] += g;
        sum[kSumGd] += g * (in[1] - k[kMean]);
        sum[kSumMagnitude] += magnitude(dy);
    }
};

// Zero where the factor is: in evaluation, where it is, an infinite value must not make a NaN.
template <class A>
GRADL1_FN A times(A factor, A value) {
    return factor != A(0) ? factor * value : A(0);
}

// Own coefficients of BackwardApply: gamma * r, A / M, r * B / M.
enum BackwardApplyCoefficient { kGammaR = kOwn, kMeanOfG, kSlopeOfD, kBackwardApplyCoefficients };

// dx = gamma * r * (g - A / M - xh * B / M).
// in: dy (or g, with an open mask), x.
template <Activation Act, Mask From, bool Ends, class T>
struct BackwardApply : Body<2, 1, kBackwardApplyCoefficients, 0, kBackwardConstants<Act, Ends>> {
    template <class A>
    static GRADL1_FN void apply(const A* in, const A* k, A* out, A*) {
        const A* q = k + kBackwardApplyCoefficients;
        const A dy = cotangent<Act, From, Ends, T>(in[0], in[1], A(0), k, q);
        const A g = masked<Act, From, T>(dy, in[1], A(0), k, q);
        const A d = in[1] - k[kMean];
        out[0] = ((g - k[kMeanOfG]) - times(k[kSlopeOfD], d)) * k[kGammaR];
    }
};

// Sums of the double backward pass: A = sum g, B / r = sum g * d, P = sum v, Q / r = sum v * d, S = sum g * v.
enum DoubleBackwardSum { kSumA, kSumBd, kSumP, kSumQd, kSumS, kDoubleBackwardSums };

// in: dy, x, d_dx, activated if it gives the mask.
template <Activation Act, Mask From, class T>
struct DoubleBackwardSums : Body<3 + kReadsActivated<From>, 0, kOwn, kDoubleBackwardSums, kConstants<Act>> {
    template <class A>
    static GRADL1_FN void apply(const A* in, const A* k, A*, A* sum) {
        const A g = masked<Act, From, T>(in[0], in[1], in[2 + kReadsActivated<From>], k, k + kOwn);
        const A v = in[2], d = in[1] - k[kMean];
        sum[kSumA] += g;
        sum[kSumBd] += g * d;
        sum[kSumP] += v;
        sum[kSumQd] += v * d;
        sum[kSumS] += g * v;
    }
};

// Own coefficients of DoubleBackwardApply: those of sign(dy), v, d and 1 in d_dy, and of d, 1, g and v in d_x.
enum DoubleCoefficient {
    kSignInDdy = kOwn, kVInDdy, kDInDdy, kOneInDdy,
    kDInDx, kOneInDx, kGInDx, kVInDx,
    kDoubleCoefficients
};

// d_dy = d_l1 * sign(dy) + mask * (gamma * r * (v - P / M - xh * Q / M) + G_gamma * xh + G_beta + d_dresidual)
// d_x  = gamma * r^2 / M * (xh * (A P / M - S + 3 B Q / M) + Q * (A / M - g) + B * (P / M - v))
//        + G_gamma * r * (g - A / M - xh * B / M)
// in: dy, x, d_dx, activated if it gives the mask, d_dresidual if it arrived.  out: d_dy, d_x.
template <Activation Act, Mask From, bool Residual, class T>
struct DoubleBackwardApply : Body<3 + kReadsActivated<From> + Residual, 2, kDoubleCoefficients, 0, kConstants<Act>> {
    template <class A>
    static GRADL1_FN void apply(const A* in, const A* k, A* out, A*) {
        constexpr int last = 2 + kReadsActivated<From>;
        const A* q = k + kDoubleCoefficients;
        const A dy = in[0], v = in[2], d = in[1] - k[kMean];
        const A g = masked<Act, From, T>(dy, in[1], in[last], k, q);
        A d_g = (k[kVInDdy] * v + times(k[kDInDdy], d)) + k[kOneInDdy];
        if constexpr (Residual) d_g += in[last + Residual];
        out[0] = k[kSignInDdy] * sign_of(dy) + masked<Act, From, T>(d_g, in[1], in[last], k, q);
        out[1] = k[kGInDx] * g + ((times(k[kDInDx], d) + k[kOneInDx]) + times(k[kVInDx], v));
    }
};

}  // namespace gradl1
