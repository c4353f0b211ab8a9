// batch_norm_act, channel by channel: from sums over pixels to coefficients of the elementwise pass.
//
// Sums arrive as double, coefficients leave in the accumulation type A. An absent vector is a null
// pointer and counts as ones (weight) or zeros (the others).
#pragma once

#include "batch_norm_act.h"

namespace gradl1 {

template <class A>
GRADL1_FN double value_or(const A* values, std::int64_t c, double absent) {
    return values ? static_cast<double>(values[c]) : absent;
}

// The affine map of the forward pass. The backward sweeps recompute masks with it, so it is computed
// from the saved statistics in one type and one order.
template <class A>
GRADL1_FN void affine(A mean, A rstd, const A* weight, const A* bias, std::int64_t c, A* scale, A* shift) {
    *scale = weight ? weight[c] * rstd : rstd;
    const A product = mean * *scale;
    *shift = (bias ? bias[c] : A(0)) - product;
}

template <class A>
GRADL1_FN void statistics(const double* sum, double k, double pixels, double eps, A* mean, A* rstd) {
    const double offset = sum[0] / pixels;
    const double variance = sum[1] / pixels - offset * offset;
    *mean = static_cast<A>(k + offset);
    *rstd = static_cast<A>(1.0 / sqrt((variance < 0 ? 0.0 : variance) + eps));
}

// What a body needs of the quantizer behind the activation: its grid, and the ends of the activation.
template <class A>
GRADL1_FN void quantized_constants(
    const A* scale, const A* zero_point, double code_min, double code_max, Activation activation, A* q
) {
    const A infinity = static_cast<A>(HUGE_VAL);
    q[kScale] = *scale;
    q[kZeroPoint] = *zero_point;
    q[kCodeMin] = static_cast<A>(code_min);
    q[kCodeMax] = static_cast<A>(code_max);
    q[kLow] = activation == Activation::none ? -infinity : A(0);
    q[kHigh] = activation == Activation::relu6 ? A(6) : infinity;
}

template <class A>
struct Channel {
    const A *weight, *bias, *mean, *rstd;
    double pixels;
    bool training;

    GRADL1_FN void common(std::int64_t c, A* k, std::int64_t stride) const {
        k[kMean * stride] = mean[c];
        affine(mean[c], rstd[c], weight, bias, c, k + kNormScale * stride, k + kNormShift * stride);
    }

    // sum: g, g * d.  Writes the own coefficients of BackwardApply.
    GRADL1_FN void backward(std::int64_t c, const double* sum, A* k, std::int64_t stride) const {
        const double r = rstd[c];
        k[kOwn * stride] = static_cast<A>(value_or(weight, c, 1) * r);
        k[(kOwn + 1) * stride] = static_cast<A>(training ? sum[0] / pixels : 0);
        k[(kOwn + 2) * stride] = static_cast<A>(training ? r * r * sum[1] / pixels : 0);
    }

    // sum: g, g * d, v, v * d, g * v.  Writes the own coefficients of DoubleBackwardApply but the
    // first; returns d_weight.
    GRADL1_FN double double_backward(
        std::int64_t c, const double* sum, const A* d_weight, const A* d_bias, A* k, std::int64_t stride
    ) const {
        const double r = rstd[c], gamma = value_or(weight, c, 1), m = pixels;
        const double a = sum[0], b = r * sum[1], p = sum[2], q = r * sum[3], s = sum[4];
        const double gg = value_or(d_weight, c, 0), gb = value_or(d_bias, c, 0);
        const double f = gamma * r * r / m;
        k[kGv * stride] = static_cast<A>(gamma * r);
        k[kGd * stride] = static_cast<A>(r * (gg - (training ? gamma * r * q / m : 0)));
        k[kG1 * stride] = static_cast<A>(gb - (training ? gamma * r * p / m : 0));
        k[kXd * stride] = static_cast<A>(training ? r * (f * (a * p / m - s + 3 * b * q / m) - gg * r * b / m) : 0);
        k[kX1 * stride] = static_cast<A>(training ? f * (q * a + b * p) / m - gg * r * a / m : 0);
        k[kXg * stride] = static_cast<A>(gg * r - (training ? f * q : 0));
        k[kXv * stride] = static_cast<A>(training ? -f * b : 0);
        return r * (training ? s - a * p / m - b * q / m : s);
    }
};

}  // namespace gradl1
