#include "batch_norm_act.h"

namespace gradl1::cuda {
namespace {

// Sums of one channel to its statistics and to the affine map of the second pass.
template <class T, class A>
struct FinishMoments {
    const T* x;
    Layout layout;
    double eps;
    const A *weight, *bias;
    A *mean, *rstd, *k;

    __device__ void operator()(std::int64_t c, const double* sum) const {
        statistics(sum, static_cast<double>(first_of(x, layout, c)), static_cast<double>(layout.pixels()), eps, mean + c,
                   rstd + c);
        affine(mean[c], rstd[c], weight, bias, c, k + c, k + layout.channels + c);
    }
};

// In evaluation the statistics are the running ones; r.rstd holds the variance.
template <class A>
__global__ void __launch_bounds__(kThreads) adopt_kernel(BatchNormAct r, A* k) {
    const std::int64_t c = static_cast<std::int64_t>(blockIdx.x) * kThreads + threadIdx.x;
    if (c >= r.layout.channels) return;
    A *mean = static_cast<A*>(r.out_mean), *rstd = static_cast<A*>(r.out_rstd);
    mean[c] = static_cast<const A*>(r.mean)[c];
    rstd[c] = static_cast<A>(1.0 / sqrt(static_cast<double>(static_cast<const A*>(r.rstd)[c]) + r.eps));
    affine(mean[c], rstd[c], static_cast<const A*>(r.weight), static_cast<const A*>(r.bias), c, k + c,
           k + r.layout.channels + c);
}

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
                                static_cast<A*>(r.out_mean),
                                static_cast<A*>(r.out_rstd),
                                coefficients<A>(r)};
    finish<2>("batch_norm_act_forward_finish", slots(r), count, r.layout.channels, f, where);
}

template <class A>
void adopt(const BatchNormAct& r, Where where) {
    const dim3 grid(static_cast<unsigned>((r.layout.channels + kThreads - 1) / kThreads));
    launch("batch_norm_act_statistics", adopt_kernel<A>, grid, dim3(kThreads), where, r, coefficients<A>(r));
}

template <Activation Act, class T, class A>
void normalise(const BatchNormAct& r, Where where) {
    const T *x = static_cast<const T*>(r.x), *residual = static_cast<const T*>(r.residual);
    T* out = static_cast<T*>(r.out);
    const A* k = coefficients<A>(r);
    if (residual) {
        const Operands<Normalise<Act, true>, T> o{{x, residual}, {out}, k, nullptr};
        run("batch_norm_act_forward", o, r.layout, where);
    } else {
        run("batch_norm_act_forward", Operands<Normalise<Act, false>, T>{{x}, {out}, k, nullptr}, r.layout, where);
    }
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
        with_activation(r.activation, [&](auto is) { normalise<decltype(is)::act, T, A>(r, where); });
    });
}

}  // namespace gradl1::cuda
