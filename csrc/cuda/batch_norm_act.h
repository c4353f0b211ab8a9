// What the three sweeps of batch_norm_act share on the GPU.
#pragma once

#include "../arithmetic/channels.h"
#include "finish.h"
#include "sweeps.h"

namespace gradl1::cuda {

constexpr int kMostSums = 5;

template <Activation Act>
struct Is {
    static constexpr Activation act = Act;
};

// Calls f(Is<activation>()).
template <class F>
void with_activation(Activation activation, const F& f) {
    switch (activation) {
        case Activation::none: return f(Is<Activation::none>());
        case Activation::relu: return f(Is<Activation::relu>());
        case Activation::relu6: return f(Is<Activation::relu6>());
    }
}

// The mask of an activation where x gives it.
template <Activation Act>
constexpr Mask kFromX = Act == Activation::none ? Mask::open : Mask::from_x;

// Scratch: the slots, then the coefficients, then one value for each channel.
inline double* slots(const BatchNormAct& r) { return static_cast<double*>(r.scratch); }

template <class A>
A* coefficients(const BatchNormAct& r) {
    return reinterpret_cast<A*>(slots(r) + most_chunks(r.layout) * kMostSums * r.layout.channels);
}

inline double* per_channel(const BatchNormAct& r) {
    return slots(r) + (most_chunks(r.layout) * kMostSums + kDoubleCoefficients) * r.layout.channels;
}

template <class A>
Channel<A> channel(const BatchNormAct& r) {
    return {static_cast<const A*>(r.weight),
            static_cast<const A*>(r.bias),
            static_cast<const A*>(r.mean),
            static_cast<const A*>(r.rstd),
            static_cast<double>(r.layout.pixels()),
            r.training};
}

template <class A>
__global__ void __launch_bounds__(kThreads) common_kernel(Channel<A> channel, std::int64_t channels, A* k) {
    const std::int64_t c = static_cast<std::int64_t>(blockIdx.x) * kThreads + threadIdx.x;
    if (c < channels) channel.common(c, k + c, channels);
}

// The coefficients that both passes of a backward sweep need.
template <class A>
void common_coefficients(const BatchNormAct& r, Where where) {
    const dim3 grid(static_cast<unsigned>((r.layout.channels + kThreads - 1) / kThreads));
    launch("batch_norm_act_coefficients", common_kernel<A>, grid, dim3(kThreads), where, channel<A>(r),
           r.layout.channels, coefficients<A>(r));
}

}  // namespace gradl1::cuda
