// batch_norm_act, channel by channel: from sums over pixels to coefficients of the elementwise pass.
//
// Names are those of docs/mathematics.md, "Batch norm, in training": r = 1 / std, gamma = weight, M pixels,
// the sums A, B, P, Q, S. Sums arrive as double, coefficients leave in the accumulation type A. An absent
// vector is a null pointer and counts as ones (weight) or zeros (the others).
#pragma once

#include "batch_norm_act.h"

namespace gradl1 {

template <class A>
GRADL1_FN double value_or(const A* values, std::int64_t c, double absent) {
    return values ? static_cast<double>(values[c]) : absent;
}

// The affine map of the forward pass. The backward passes recompute masks with it, so it is computed
// from the saved statistics in one type and one order.
template <class A>
GRADL1_FN void affine(A mean, A rstd, const A* weight, const A* bias, std::int64_t c, A* scale, A* shift) {
    *scale = weight ? weight[c] * rstd : rstd;
    const A product = mean * *scale;
    *shift = (bias ? bias[c] : A(0)) - product;
}

// mean and r from sum (x - k) and sum (x - k)^2: var = E[(x - k)^2] - E[x - k]^2.
template <class A>
GRADL1_FN void statistics(const double* sum, double k, double pixels, double eps, A* mean, A* rstd) {
    const double offset = sum[0] / pixels;
    const double variance = sum[1] / pixels - offset * offset;
    *mean = static_cast<A>(k + offset);
    *rstd = static_cast<A>(1.0 / sqrt((variance < 0 ? 0.0 : variance) + eps));
}

// What a body needs of the quantizer behind the activation: its scale, zero point and codes, and the range of
// the activation.
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

    // dx = gamma * r * (g - A / M - d * r * B / M): the own coefficients of BackwardApply from the sums of
    // BackwardSums.
    GRADL1_FN void backward(std::int64_t c, const double* sum, A* k, std::int64_t stride) const {
        const double r = rstd[c], gamma = value_or(weight, c, 1), m = pixels;
        k[kGammaR * stride] = static_cast<A>(gamma * r);
        k[kMeanOfG * stride] = static_cast<A>(training ? sum[kSumG] / m : 0);
        k[kSlopeOfD * stride] = static_cast<A>(training ? r * r * sum[kSumGd] / m : 0);
    }

    // The own coefficients of DoubleBackwardApply but that of sign(dy), from the sums of DoubleBackwardSums.
    // In evaluation the mean and r are constants, and the terms with M vanish. Returns
    // d_weight = r * (S - A P / M - B Q / M).
    GRADL1_FN double double_backward(
        std::int64_t c, const double* sum, const A* d_dweight, const A* d_dbias, A* k, std::int64_t stride
    ) const {
        const double r = rstd[c], gamma = value_or(weight, c, 1), m = pixels;
        const double a = sum[kSumA], b = r * sum[kSumBd], p = sum[kSumP], q = r * sum[kSumQd], s = sum[kSumS];
        const double g_gamma = value_or(d_dweight, c, 0), g_beta = value_or(d_dbias, c, 0);
        const double f = gamma * r * r / m;
        // d_dy before the mask: gamma r v + r (G_gamma - gamma r Q / M) d + (G_beta - gamma r P / M)
        k[kVInDdy * stride] = static_cast<A>(gamma * r);
        k[kDInDdy * stride] = static_cast<A>(r * (g_gamma - (training ? gamma * r * q / m : 0)));
        k[kOneInDdy * stride] = static_cast<A>(g_beta - (training ? gamma * r * p / m : 0));
        // d_x, with f = gamma r^2 / M: r (f (A P / M - S + 3 B Q / M) - G_gamma r B / M) d
        //   + (f (Q A + B P) / M - G_gamma r A / M) + (G_gamma r - f Q) g - f B v
        k[kDInDx * stride] =
            static_cast<A>(training ? r * (f * (a * p / m - s + 3 * b * q / m) - g_gamma * r * b / m) : 0);
        k[kOneInDx * stride] = static_cast<A>(training ? f * (q * a + b * p) / m - g_gamma * r * a / m : 0);
        k[kGInDx * stride] = static_cast<A>(g_gamma * r - (training ? f * q : 0));
        k[kVInDx * stride] = static_cast<A>(training ? -f * b : 0);
        return r * (training ? s - a * p / m - b * q / m : s);
    }
};

}  // namespace gradl1
