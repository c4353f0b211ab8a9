#include "batch_norm_act.h"

namespace gradl1::cuda {
namespace {

// Phase 2: the sums of one channel become dweight = B, dbias = A, its share of l1 and the coefficients of phase 3.
template <class A>
struct FinishBackward {
    Channel<A> channel;
    std::int64_t channels;
    A *k, *dweight, *dbias;
    double* l1;

    __device__ void operator()(std::int64_t c, const double* sum) const {
        channel.backward(c, sum, k + c, channels);
        dbias[c] = static_cast<A>(sum[kSumG]);
        dweight[c] = static_cast<A>(sum[kSumGd] * channel.rstd[c]);
        l1[c] = sum[kSumMagnitude];
    }
};

template <class A>
void finish_backward(const BatchNormAct& r, std::int64_t count, Where where) {
    const std::int64_t channels = r.layout.channels;
    const FinishBackward<A> f{channel<A>(r),           channels,       coefficients<A>(r), static_cast<A*>(r.dweight),
                              static_cast<A*>(r.dbias), per_channel(r)};
    finish<kBackwardSums>("batch_norm_act_backward_finish", slots(r), count, channels, f, where);
    if (r.l1) total<A>("batch_norm_act_backward_total", per_channel(r), channels, r.l1, where);
}

// Phase 3: dx = gamma * r * (g - A / M - xh * B / M), where `gradient` is dy, or g with an open mask.
template <Activation Act, Mask From, bool Ends, class T, class A>
void apply(const BatchNormAct& r, const void* gradient, Where where) {
    const T *dy = static_cast<const T*>(gradient), *x = static_cast<const T*>(r.x);
    T* dx = static_cast<T*>(r.dx);
    const Operands<BackwardApply<Act, From, Ends, T>, T> o{
        {dy, x}, {dx}, coefficients<A>(r), nullptr, constants_of<A>(r)};
    run("batch_norm_act_backward", o, r.layout, where);
}

// Phase 1: the sums. With a residual behind a mask or behind ends it writes g too, which the residual wants
// anyway, and phase 3 reads it: what gives the mask is read once and nothing is masked twice.
template <Activation Act, bool Ends, class T, class A>
void backward(const BatchNormAct& r, Where where) {
    const T *dy = static_cast<const T*>(r.dy), *x = static_cast<const T*>(r.x);
    const A *k = coefficients<A>(r), *q = constants_of<A>(r);
    const char* name = "batch_norm_act_backward_sums";
    if constexpr (Act != Activation::none || Ends) {
        if (r.with_residual) {
            const Operands<BackwardSums<Act, Mask::from_activated, Ends, T>, T> o{
                {dy, x, static_cast<const T*>(r.activated)}, {static_cast<T*>(r.dresidual)}, k, slots(r), q};
            finish_backward<A>(r, run(name, o, r.layout, where), where);
            return apply<Activation::none, Mask::open, false, T, A>(r, r.dresidual, where);
        }
    }
    const Operands<BackwardSums<Act, kFromX<Act>, Ends, T>, T> o{{dy, x}, {}, k, slots(r), q};
    finish_backward<A>(r, run(name, o, r.layout, where), where);
    apply<Act, kFromX<Act>, Ends, T, A>(r, r.dy, where);
}

}  // namespace

void batch_norm_act_backward(const BatchNormAct& r, Where where) {
    const OnDevice guard("batch_norm_act_backward", where.first);
    with_type(r.dtype, [&](auto type) {
        using T = decltype(type);
        using A = accumulator<T>;
        common_coefficients<A>(r, where);
        with_activation(r, [&](auto is) {
            if constexpr (decltype(is)::act != Activation::quantized) {
                if (r.d_ends) return backward<decltype(is)::act, true, T, A>(r, where);
            }
            backward<decltype(is)::act, false, T, A>(r, where);
        });
    });
}

}  // namespace gradl1::cuda
