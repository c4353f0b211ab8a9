// tap: l1 = sum |dy|;  d_dy = d_dx + d_l1 * sign(dy).
#pragma once

#include "body.h"

namespace gradl1 {

struct SumOfMagnitudes : Body<1, 0, 0, 1> {
    template <class A>
    static GRADL1_FN void apply(const A* in, const A*, A*, A* sum) {
        sum[0] += magnitude(in[0]);
    }
};

// in: dy, d_dx if it arrived.  k: d_l1.
template <bool WithDx>
struct TapDoubleBackward : Body<1 + WithDx, 1, 1, 0> {
    template <class A>
    static GRADL1_FN void apply(const A* in, const A* k, A* out, A*) {
        const A term = k[0] * sign_of(in[0]);
        if constexpr (WithDx) {
            out[0] = term + in[1];
        } else {
            out[0] = term;
        }
    }
};

// in: x.  sums: the ends.
struct EndsOfTensor : Body<1, 0, 0, kEndSums, 0, true> {
    template <class A>
    static GRADL1_FN void apply(const A* in, const A*, A*, A* sum) {
        extend(in[0], sum);
    }
};

// in: x, dy if it arrived.
template <bool WithDy>
struct AddEndsGradient : Body<1 + WithDy, 1, 0, 0, kEndConstants> {
    template <class A>
    static GRADL1_FN void apply(const A* in, const A* k, A* out, A*) {
        out[0] = add_share(WithDy ? in[WithDy] : A(0), in[0], k);
    }
};

}  // namespace gradl1
