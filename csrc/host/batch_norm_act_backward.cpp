#include "batch_norm_act.h"

namespace gradl1::host {
inline namespace GRADL1_ISA {
namespace {

// The sums over pixels become dweight, dbias, l1 and the coefficients of the second pass.
template <class A, class P>
void finish(const BatchNormAct& r, const P& pass) {
    double l1 = 0;
    for (std::int64_t c = 0; c < r.layout.channels; ++c) {
        double sum[3];
        pass.total(c, sum);
        l1 += sum[2];
        channel<A>(r).backward(c, sum, coefficients<A>(r) + c, r.layout.channels);
        static_cast<A*>(r.dbias)[c] = static_cast<A>(sum[0]);
        static_cast<A*>(r.dweight)[c] = static_cast<A>(sum[1] * static_cast<const A*>(r.rstd)[c]);
    }
    if (r.l1) *static_cast<A*>(r.l1) = static_cast<A>(l1);
}

template <Activation Act, Mask From, bool Ends, class T, class A>
void apply(const BatchNormAct& r, const void* g, int threads) {
    const T *dy = static_cast<const T*>(g), *x = static_cast<const T*>(r.x);
    T* out = static_cast<T*>(r.out);
    const A* k = coefficients<A>(r);
    const Constants<A> q(r);
    Pass<BackwardApply<Act, From, Ends, T>, T, A>{r.layout, {dy, x}, {out}, k, slots(r), q.value}.run(threads);
}

// With a residual behind a mask or behind ends the first pass writes the masked gradient, which the residual
// wants anyway, and the second reads it: what gives the mask is read once and nothing is masked twice.
template <Activation Act, bool Ends, class T, class A>
void sweep(const BatchNormAct& r, int threads) {
    const T *dy = static_cast<const T*>(r.dy), *x = static_cast<const T*>(r.x);
    const A* k = coefficients<A>(r);
    const Constants<A> q(r);
    if constexpr (Act != Activation::none || Ends) {
        if (r.with_residual) {
            Pass<BackwardSums<Act, Mask::from_activated, Ends, T>, T, A> pass{
                r.layout, {dy, x, static_cast<const T*>(r.activated)}, {static_cast<T*>(r.out2)}, k, slots(r), q.value};
            pass.run(threads);
            finish<A>(r, pass);
            return apply<Activation::none, Mask::open, false, T, A>(r, r.out2, threads);
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
                if (r.d_ends) return sweep<decltype(is)::act, true, T, A>(r, threads);
            }
            sweep<decltype(is)::act, false, T, A>(r, threads);
        });
    });
}

}  // namespace GRADL1_ISA
}  // namespace gradl1::host
