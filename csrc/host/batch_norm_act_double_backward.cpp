#include "batch_norm_act.h"

namespace gradl1::host {
inline namespace GRADL1_ISA {
namespace {

// Phase 2: the sums over pixels become d_weight and the coefficients of phase 3.
template <class A, class P>
void finish(const BatchNormAct& r, const P& pass) {
    const std::int64_t channels = r.layout.channels;
    A* k = coefficients<A>(r);
    for (std::int64_t c = 0; c < channels; ++c) {
        double sum[kDoubleBackwardSums];
        pass.total(c, sum);
        const double d_weight = channel<A>(r).double_backward(
            c, sum, static_cast<const A*>(r.d_dweight), static_cast<const A*>(r.d_dbias), k + c, channels);
        static_cast<A*>(r.d_weight)[c] = static_cast<A>(d_weight);
        k[kSignInDdy * channels + c] = scalar_or_zero<A>(r.d_l1);
    }
}

// Phase 3: d_dy and d_x.
template <Activation Act, Mask From, bool Residual, class T, class A>
void apply(const BatchNormAct& r, int threads) {
    const T *dy = static_cast<const T*>(r.dy), *x = static_cast<const T*>(r.x), *v = static_cast<const T*>(r.d_dx);
    const Constants<A> q(r);
    Pass<DoubleBackwardApply<Act, From, Residual, T>, T, A> pass{
        r.layout,
        {dy, x, v},
        {static_cast<T*>(r.d_dy), static_cast<T*>(r.d_x)},
        coefficients<A>(r),
        slots(r),
        q.value};
    if constexpr (From == Mask::from_activated) pass.in[3] = static_cast<const T*>(r.activated);
    if constexpr (Residual) pass.in[3 + kReadsActivated<From>] = static_cast<const T*>(r.d_dresidual);
    pass.run(threads);
}

// Phase 1: the sums A, B, P, Q, S.
template <Activation Act, Mask From, class T, class A>
void sums(const BatchNormAct& r, int threads) {
    const T *dy = static_cast<const T*>(r.dy), *x = static_cast<const T*>(r.x), *v = static_cast<const T*>(r.d_dx);
    const Constants<A> q(r);
    Pass<DoubleBackwardSums<Act, From, T>, T, A> pass{r.layout, {dy, x, v}, {}, coefficients<A>(r), slots(r), q.value};
    if constexpr (From == Mask::from_activated) pass.in[3] = static_cast<const T*>(r.activated);
    pass.run(threads);
    finish<A>(r, pass);
}

template <Activation Act, class T, class A>
void double_backward(const BatchNormAct& r, int threads) {
    if constexpr (Act != Activation::none) {
        if (r.with_residual) {
            sums<Act, Mask::from_activated, T, A>(r, threads);
            if (r.d_dresidual) return apply<Act, Mask::from_activated, true, T, A>(r, threads);
            return apply<Act, Mask::from_activated, false, T, A>(r, threads);
        }
    }
    sums<Act, kFromX<Act>, T, A>(r, threads);
    apply<Act, kFromX<Act>, false, T, A>(r, threads);
}

}  // namespace

void batch_norm_act_double_backward(const BatchNormAct& r, int threads) {
    with_type(r.dtype, [&](auto type) {
        using T = decltype(type);
        using A = accumulator<T>;
        common_coefficients<A>(r);
        with_activation(r, [&](auto is) { double_backward<decltype(is)::act, T, A>(r, threads); });
    });
}

}  // namespace GRADL1_ISA
}  // namespace gradl1::host
