// What the three passes of batch_norm_act share on the GPU.
#pragma once

#include "../arithmetic/channels.h"
#include "finish.h"
#include "passes.h"

namespace gradl1::cuda {

template <Activation Act>
struct Is {
    static constexpr Activation act = Act;
};

// Calls f(Is<activation>()).
template <class F>
void with_activation(const BatchNormAct& r, const F& f) {
    switch (r.quantized ? Activation::quantized : r.activation) {
        case Activation::none: return f(Is<Activation::none>());
        case Activation::relu: return f(Is<Activation::relu>());
        case Activation::relu6: return f(Is<Activation::relu6>());
        case Activation::quantized: return f(Is<Activation::quantized>());
    }
}

// Where the mask comes from if x gives it.
template <Activation Act>
constexpr Mask kFromX = Act == Activation::none ? Mask::open : Mask::from_x;

inline double* slots(const BatchNormAct& r) { return static_cast<double*>(r.scratch); }

template <class A>
A* coefficients(const BatchNormAct& r) {
    return reinterpret_cast<A*>(slots(r) + coefficients_at(r.layout));
}

inline double* per_channel(const BatchNormAct& r) { return slots(r) + per_channel_at(r.layout); }

template <class A>
A* constants_of(const BatchNormAct& r) {
    return reinterpret_cast<A*>(slots(r) + constants_at(r.layout));
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

// The constants of the elementwise passes, which the kernel before them writes: those of the quantizer, or of the
// gradient of the ends.
template <class A>
struct Constants {
    const A *scale, *zero_point, *ends, *d_ends;
    double code_min, code_max;
    Activation activation;
    A* q;

    explicit Constants(const BatchNormAct& r)
        : scale(static_cast<const A*>(r.scale)), zero_point(static_cast<const A*>(r.zero_point)),
          ends(static_cast<const A*>(r.ends)), d_ends(static_cast<const A*>(r.d_ends)), code_min(r.code_min),
          code_max(r.code_max), activation(r.activation), q(constants_of<A>(r)) {}

    // For thread c of the channels: the first one writes.
    __device__ void write(std::int64_t c) const {
        if (c == 0 && d_ends) end_constants(ends, d_ends, q);
        if (c == 0 && scale) quantized_constants(scale, zero_point, code_min, code_max, activation, q);
    }
};

template <class A>
__global__ void __launch_bounds__(kThreads)
    common_kernel(Channel<A> channel, std::int64_t channels, A* k, Constants<A> constants) {
    const std::int64_t c = static_cast<std::int64_t>(blockIdx.x) * kThreads + threadIdx.x;
    if (c < channels) channel.common(c, k + c, channels);
    constants.write(c);
}

// The coefficients that both walks of a backward pass need.
template <class A>
void common_coefficients(const BatchNormAct& r, Where where) {
    const dim3 grid(static_cast<unsigned>((r.layout.channels + kThreads - 1) / kThreads));
    launch("batch_norm_act_coefficients", common_kernel<A>, grid, dim3(kThreads), where, channel<A>(r),
           r.layout.channels, coefficients<A>(r), Constants<A>(r));
}

}  // namespace gradl1::cuda
