#include "batch_norm_act.h"

namespace gradl1::cuda {
namespace {

// Phase 2, in training: the sums of one channel become its statistics and the affine map of phase 3.
template <class T, class A>
struct FinishMoments {
    const T* x;
    Layout layout;
    double eps;
    const A *weight, *bias;
    A *mean, *rstd, *k;
    Constants<A> constants;

    __device__ void operator()(std::int64_t c, const double* sum) const {
        constants.write(c);
        statistics(sum, static_cast<double>(first_of(x, layout, c)), static_cast<double>(layout.pixels()), eps, mean + c,
                   rstd + c);
        affine(mean[c], rstd[c], weight, bias, c, k + c, k + layout.channels + c);
    }
};

// Phase 2, in evaluation: the statistics are the running ones.
template <class A>
__global__ void __launch_bounds__(kThreads) adopt_kernel(BatchNormAct r, A* k, Constants<A> constants) {
    const std::int64_t c = static_cast<std::int64_t>(blockIdx.x) * kThreads + threadIdx.x;
    constants.write(c);
    if (c >= r.layout.channels) return;
    A *mean = static_cast<A*>(r.mean), *rstd = static_cast<A*>(r.rstd);
    mean[c] = static_cast<const A*>(r.running_mean)[c];
    rstd[c] = static_cast<A>(1.0 / sqrt(static_cast<double>(static_cast<const A*>(r.running_var)[c]) + r.eps));
    affine(mean[c], rstd[c], static_cast<const A*>(r.weight), static_cast<const A*>(r.bias), c, k + c,
           k + r.layout.channels + c);
}

// Phases 1 and 2 in training: sum (x - k) and sum (x - k)^2, then the statistics.
template <class T, class A>
void measure(const BatchNormAct& r, Where where) {
    const T* x = static_cast<const T*>(r.x);
    const std::int64_t count =
        run("batch_norm_act_forward_sums", Operands<Moments, T>{{x}, {}, nullptr, slots(r)}, r.layout, where);
    const FinishMoments<T, A> f{x,
                                r.layout,
                                r.eps,
                                static_cast<const A*>(r.weight),
                                static_cast<const A*>(r.bias),
                                static_cast<A*>(r.mean),
                                static_cast<A*>(r.rstd),
                                coefficients<A>(r),
                                Constants<A>(r)};
    finish<Moments::sums>("batch_norm_act_forward_finish", slots(r), count, r.layout.channels, f, where);
}

template <class A>
void adopt(const BatchNormAct& r, Where where) {
    const dim3 grid(static_cast<unsigned>((r.layout.channels + kThreads - 1) / kThreads));
    launch("batch_norm_act_statistics", adopt_kernel<A>, grid, dim3(kThreads), where, r, coefficients<A>(r),
           Constants<A>(r));
}

// Phase 3: normalise, add the residual, activate, quantize; with the ends of y, one launch more.
template <Activation Act, bool Residual, bool Ends, class T, class A>
void apply(const BatchNormAct& r, Where where) {
    Operands<Normalise<Act, Residual, Ends, T>, T> o{
        {static_cast<const T*>(r.x)}, {static_cast<T*>(r.y)}, coefficients<A>(r), slots(r), constants_of<A>(r)};
    if constexpr (Residual) o.in[1] = static_cast<const T*>(r.residual);
    if constexpr (Residual && Act == Activation::quantized) o.out[1] = static_cast<T*>(r.activated);
    const std::int64_t blocks = run("batch_norm_act_forward", o, r.layout, where);
    if constexpr (Ends) ends<A>("batch_norm_act_forward_ends", slots(r), blocks, r.ends, where);
}

template <Activation Act, bool Residual, class T, class A>
void normalise(const BatchNormAct& r, Where where) {
    if constexpr (Act != Activation::quantized) {
        if (r.with_ends) return apply<Act, Residual, true, T, A>(r, where);
    }
    apply<Act, Residual, false, T, A>(r, where);
}

}  // namespace

void batch_norm_act_forward(const BatchNormAct& r, Where where) {
    const OnDevice guard("batch_norm_act_forward", where.first);
    with_type(r.dtype, [&](auto type) {
        using T = decltype(type);
        using A = accumulator<T>;
        if (r.training) {
            measure<T, A>(r, where);
        } else {
            adopt<A>(r, where);
        }
        with_activation(r, [&](auto is) {
            if (r.with_residual) return normalise<decltype(is)::act, true, T, A>(r, where);
            normalise<decltype(is)::act, false, T, A>(r, where);
        });
    });
}

}  // namespace gradl1::cuda
