// What the three passes of batch_norm_act share on the CPU.
#pragma once

#include "../arithmetic/channels.h"
#include "passes.h"

namespace gradl1::host {
inline namespace GRADL1_ISA {

constexpr int kMostSums = kDoubleBackwardSums;

template <Activation Act>
struct Is {
    static constexpr Activation act = Act;
};

// Calls f(Is<activation>()).
template <class F>
GRADL1_FN void with_activation(const BatchNormAct& r, const F& f) {
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

// Scratch: the slots, then the coefficients.
GRADL1_FN double* slots(const BatchNormAct& r) { return static_cast<double*>(r.scratch); }

template <class A>
GRADL1_FN A* coefficients(const BatchNormAct& r) {
    return reinterpret_cast<A*>(slots(r) + Chunks(r.layout).count * kMostSums * r.layout.channels);
}

// The constants of the elementwise passes: those of the quantizer, or of the gradient of the ends.
template <class A>
struct Constants {
    A value[kQuantizedConstants];

    GRADL1_FN explicit Constants(const BatchNormAct& r) : value{} {
        if (r.d_ends) end_constants(static_cast<const A*>(r.ends), static_cast<const A*>(r.d_ends), value);
        if (!r.quantized) return;
        quantized_constants(static_cast<const A*>(r.scale), static_cast<const A*>(r.zero_point), r.code_min, r.code_max,
                            r.activation, value);
    }
};

template <class A>
GRADL1_FN Channel<A> channel(const BatchNormAct& r) {
    return {static_cast<const A*>(r.weight),
            static_cast<const A*>(r.bias),
            static_cast<const A*>(r.mean),
            static_cast<const A*>(r.rstd),
            static_cast<double>(r.layout.pixels()),
            r.training};
}

// The coefficients that both walks of a backward pass need.
template <class A>
GRADL1_FN void common_coefficients(const BatchNormAct& r) {
    for (std::int64_t c = 0; c < r.layout.channels; ++c) {
        channel<A>(r).common(c, coefficients<A>(r) + c, r.layout.channels);
    }
}

}  // namespace GRADL1_ISA
}  // namespace gradl1::host
