#include "batch_norm_act.h"

namespace gradl1::host {
inline namespace GRADL1_ISA {
namespace {

// Phase 1, in training: the statistics, from sums in float64, where the square of a float32 is exact. Each
// channel is shifted by its first value, so that a mean far from zero costs no digits.
template <class T, class A>
void measure(const BatchNormAct& r, int threads) {
    const std::int64_t channels = r.layout.channels;
    const T* x = static_cast<const T*>(r.x);
    double* k = coefficients<double>(r);
    for (std::int64_t c = 0; c < channels; ++c) {
        const double first = static_cast<double>(widen(x[c * r.layout.inner]));
        k[c] = first - first == 0 ? first : 0;  // an infinity would turn the mean into NaN
    }
    Pass<Moments, T, double> pass{r.layout, {x}, {}, k, slots(r), nullptr};
    pass.run(threads);
    for (std::int64_t c = 0; c < channels; ++c) {
        double sum[2];
        pass.total(c, sum);
        A *mean = static_cast<A*>(r.mean) + c, *rstd = static_cast<A*>(r.rstd) + c;
        statistics(sum, k[c], static_cast<double>(r.layout.pixels()), r.eps, mean, rstd);
    }
}

// Phase 1, in evaluation: the statistics are the running ones.
template <class A>
void adopt(const BatchNormAct& r) {
    for (std::int64_t c = 0; c < r.layout.channels; ++c) {
        static_cast<A*>(r.mean)[c] = static_cast<const A*>(r.running_mean)[c];
        const A variance = static_cast<const A*>(r.running_var)[c] + static_cast<A>(r.eps);
        static_cast<A*>(r.rstd)[c] = A(1) / std::sqrt(variance);
    }
}

// Phase 2: normalise, add the residual, activate, quantize.
template <Activation Act, bool Residual, bool Ends, class T, class A>
void apply(const BatchNormAct& r, int threads) {
    const T* x = static_cast<const T*>(r.x);
    const A *mean = static_cast<const A*>(r.mean), *rstd = static_cast<const A*>(r.rstd);
    A* k = coefficients<A>(r);
    const Constants<A> q(r);
    for (std::int64_t c = 0; c < r.layout.channels; ++c) {
        affine(mean[c], rstd[c], static_cast<const A*>(r.weight), static_cast<const A*>(r.bias), c, k + c,
               k + r.layout.channels + c);
    }
    Pass<Normalise<Act, Residual, Ends, T>, T, A> pass{r.layout, {x}, {static_cast<T*>(r.y)}, k, slots(r), q.value};
    if constexpr (Residual) pass.in[1] = static_cast<const T*>(r.residual);
    if constexpr (Residual && Act == Activation::quantized) pass.out[1] = static_cast<T*>(r.activated);
    pass.run(threads);
    if constexpr (Ends) pass.ends(static_cast<A*>(r.ends));
}

template <Activation Act, bool Residual, class T, class A>
void normalise(const BatchNormAct& r, int threads) {
    if constexpr (Act != Activation::quantized) {
        if (r.with_ends) return apply<Act, Residual, true, T, A>(r, threads);
    }
    apply<Act, Residual, false, T, A>(r, threads);
}

}  // namespace

void batch_norm_act_forward(const BatchNormAct& r, int threads) {
    with_type(r.dtype, [&](auto type) {
        using T = decltype(type);
        using A = accumulator<T>;
        if (r.training) {
            measure<T, A>(r, threads);
        } else {
            adopt<A>(r);
        }
        with_activation(r, [&](auto is) {
            if (r.with_residual) return normalise<decltype(is)::act, true, T, A>(r, threads);
            normalise<decltype(is)::act, false, T, A>(r, threads);
        });
    });
}

}  // namespace GRADL1_ISA
}  // namespace gradl1::host
