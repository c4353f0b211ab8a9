#include "batch_norm_act.h"

namespace gradl1::host {
inline namespace GRADL1_ISA {
namespace {

// Phase 2: the sums over pixels become dweight = B, dbias = A, l1 and the coefficients of phase 3.
template <class A, class P>
void finish(const BatchNormAct& r, const P& pass) {
    double l1 = 0;
    for (std::int64_t c = 0; c < r.layout.channels; ++c) {
        double sum[kBackwardSums];
        pass.total(c, sum);
        l1 += sum[kSumMagnitude];
        channel<A>(r).backward(c, sum, coefficients<A>(r) + c, r.layout.channels);
        static_cast<A*>(r.dbias)[c] = static_cast<A>(sum[kSumG]);
        static_cast<A*>(r.dweight)[c] = static_cast<A>(sum[kSumGd] * static_cast<const A*>(r.rstd)[c]);
    }
    if (r.l1) *static_cast<A*>(r.l1) = static_cast<A>(l1);
}

// Phase 3: dx = gamma * r * (g - A / M - xh * B / M), where `gradient` is dy, or g with an open mask.
template <Activation Act, Mask From, bool Ends, class T, class A>
void apply(const BatchNormAct& r, const void* gradient, int threads) {
    const T *dy = static_cast<const T*>(gradient), *x = static_cast<const T*>(r.x);
    T* dx = static_cast<T*>(r.dx);
    const A* k = coefficients<A>(r);
    const Constants<A> q(r);
    Pass<BackwardApply<Act, From, Ends, T>, T, A>{r.layout, {dy, x}, {dx}, k, slots(r), q.value}.run(threads);
}

// Phase 1: the sums. With a residual behind a mask or behind ends it writes g too, which the residual wants
// anyway, and phase 3 reads it: what gives the mask is read once and nothing is masked twice.
template <Activation Act, bool Ends, class T, class A>
void backward(const BatchNormAct& r, int threads) {
    const T *dy = static_cast<const T*>(r.dy), *x = static_cast<const T*>(r.x);
    const A* k = coefficients<A>(r);
    const Constants<A> q(r);
    if constexpr (Act != Activation::none || Ends) {
        if (r.with_residual) {
            Pass<BackwardSums<Act, Mask::from_activated, Ends, T>, T, A> pass{
                r.layout,
                {dy, x, static_cast<const T*>(r.activated)},
                {static_cast<T*>(r.dresidual)},
                k,
                slots(r),
                q.value};
            pass.run(threads);
            finish<A>(r, pass);
            return apply<Activation::none, Mask::open, false, T, A>(r, r.dresidual, threads);
        }
    }
    Pass<BackwardSums<Act, kFromX<Act>, Ends, T>, T, A> pass{r.layout, {dy, x}, {}, k, slots(r), q.value};
    pass.run(threads);
    finish<A>(r, pass);
    apply<Act, kFromX<Act>, Ends, T, A>(r, r.dy, threads);
}

}  // namespace

void batch_norm_act_backward(const BatchNormAct& r, int threads) {
    with_type(r.dtype, [&](auto type) {
        using T = decltype(type);
        using A = accumulator<T>;
        common_coefficients<A>(r);
        with_activation(r, [&](auto is) {
            if constexpr (decltype(is)::act != Activation::quantized) {
                if (r.d_ends) return backward<decltype(is)::act, true, T, A>(r, threads);
            }
            backward<decltype(is)::act, false, T, A>(r, threads);
        });
    });
}

}  // namespace GRADL1_ISA
}  // namespace gradl1::host
