// l1_norm: y = sum |x|;  dx = dy * sign(x);  d_dy = sum d_dx * sign(x).
#pragma once

#include "tap.h"

namespace gradl1 {

using L1Backward = TapDoubleBackward<false>;

// in: d_dx, x.
struct L1DoubleBackward : Body<2, 0, 0, 1> {
    template <class A>
    static GRADL1_FN void apply(const A* in, const A*, A*, A* sum) {
        sum[0] += in[0] * sign_of(in[1]);
    }
};

}  // namespace gradl1
