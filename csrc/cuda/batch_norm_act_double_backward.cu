#include "batch_norm_act.h"

namespace gradl1::cuda {
namespace {

// Phase 2: the sums of one channel become d_weight and the coefficients of phase 3.
template <class A>
struct FinishDoubleBackward {
    Channel<A> channel;
    std::int64_t channels;
    const A *d_dweight, *d_dbias, *d_l1;
    A *k, *d_weight;

    __device__ void operator()(std::int64_t c, const double* sum) const {
        d_weight[c] = static_cast<A>(channel.double_backward(c, sum, d_dweight, d_dbias, k + c, channels));
        k[kSignInDdy * channels + c] = d_l1 ? *d_l1 : A(0);
    }
};

template <class A>
void finish_double_backward(const BatchNormAct& r, std::int64_t count, Where where) {
    const std::int64_t channels = r.layout.channels;
    const FinishDoubleBackward<A> f{channel<A>(r),
                                    channels,
                                    static_cast<const A*>(r.d_dweight),
                                    static_cast<const A*>(r.d_dbias),
                                    static_cast<const A*>(r.d_l1),
                                    coefficients<A>(r),
                                    static_cast<A*>(r.d_weight)};
    finish<kDoubleBackwardSums>("batch_norm_act_double_backward_finish", slots(r), count, channels, f, where);
}

// Phase 3: d_dy and d_x.
template <Activation Act, Mask From, bool Residual, class T, class A>
void apply(const BatchNormAct& r, Where where) {
    Operands<DoubleBackwardApply<Act, From, Residual, T>, T> o{
        {static_cast<const T*>(r.dy), static_cast<const T*>(r.x), static_cast<const T*>(r.d_dx)},
        {static_cast<T*>(r.d_dy), static_cast<T*>(r.d_x)},
        coefficients<A>(r),
        nullptr,
        constants_of<A>(r)};
    if constexpr (From == Mask::from_activated) o.in[3] = static_cast<const T*>(r.activated);
    if constexpr (Residual) o.in[3 + kReadsActivated<From>] = static_cast<const T*>(r.d_dresidual);
    run("batch_norm_act_double_backward", o, r.layout, where);
}

// Phase 1: the sums A, B, P, Q, S.
template <Activation Act, Mask From, class T, class A>
void sums(const BatchNormAct& r, Where where) {
    Operands<DoubleBackwardSums<Act, From, T>, T> o{
        {static_cast<const T*>(r.dy), static_cast<const T*>(r.x), static_cast<const T*>(r.d_dx)},
        {},
        coefficients<A>(r),
        slots(r),
        constants_of<A>(r)};
    if constexpr (From == Mask::from_activated) o.in[3] = static_cast<const T*>(r.activated);
    finish_double_backward<A>(r, run("batch_norm_act_double_backward_sums", o, r.layout, where), where);
}

template <Activation Act, class T, class A>
void double_backward(const BatchNormAct& r, Where where) {
    if constexpr (Act != Activation::none) {
        if (r.with_residual) {
            sums<Act, Mask::from_activated, T, A>(r, where);
            if (r.d_dresidual) return apply<Act, Mask::from_activated, true, T, A>(r, where);
            return apply<Act, Mask::from_activated, false, T, A>(r, where);
        }
    }
    sums<Act, kFromX<Act>, T, A>(r, where);
    apply<Act, kFromX<Act>, false, T, A>(r, where);
}

}  // namespace

void batch_norm_act_double_backward(const BatchNormAct& r, Where where) {
    const OnDevice guard("batch_norm_act_double_backward", where.first);
    with_type(r.dtype, [&](auto type) {
        using T = decltype(type);
        using A = accumulator<T>;
        common_coefficients<A>(r, where);
        with_activation(r, [&](auto is) { double_backward<decltype(is)::act, T, A>(r, where); });
    });
}

}  // namespace gradl1::cuda
