// What a pass over tensors does with one element.
//
// A body is a struct with the numbers of its `inputs`, `outputs`, `coefficients` (one value for each
// channel), `sums` and `constants` (one value for the tensor), and a static function
//
//     template <class A> void apply(const A* in, const A* k, A* out, A* sum)
//
// that reads in[] and k[], writes out[] and adds to sum[]; the constants follow the coefficients in k[].
// With `ends` its sums are partial results of ends.h instead, combined as they are. The drivers in host/ and
// cuda/ walk tensors, load, store and add up; nothing else of an operation is written twice.
#pragma once

#include "ends.h"

namespace gradl1 {

template <int Inputs, int Outputs, int Coefficients, int Sums, int Constants = 0, bool Ends = false>
struct Body {
    static constexpr int inputs = Inputs, outputs = Outputs, coefficients = Coefficients, sums = Sums;
    static constexpr int constants = Constants, values = Coefficients + Constants;  // of k[]
    static constexpr bool ends = Ends;
};

// What the sums of a body begin with.
template <class Body, class A>
GRADL1_FN A initial(int j) {
    return Body::ends ? no_ends<A>(j) : A(0);
}

}  // namespace gradl1
