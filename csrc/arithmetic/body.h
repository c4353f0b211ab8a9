// What a pass over tensors does with one element.
//
// A body is a struct with the numbers of its `inputs`, `outputs`, `coefficients` (one value for each
// channel), `sums` and `constants` (one value for the tensor), and a static function
//
//     template <class A> void apply(const A* in, const A* k, A* out, A* sum)
//
// that reads in[] and k[], writes out[] and adds to sum[]; the constants stand in k[] behind the
// coefficients. The drivers in host/ and cuda/ walk tensors, load, store and add up; nothing else of an
// operation is written twice.
#pragma once

#include "types.h"

namespace gradl1 {

template <int Inputs, int Outputs, int Coefficients, int Sums, int Constants = 0>
struct Body {
    static constexpr int inputs = Inputs, outputs = Outputs, coefficients = Coefficients, sums = Sums;
    static constexpr int constants = Constants, values = Coefficients + Constants;  // of k[]
};

}  // namespace gradl1
