// The ends of a tensor: its extremes, and how many values are equal to each.
//
// They are kept as five partial results, which a pass combines where it adds up sums. Whatever the order
// of combination, the result has the same bits.
#pragma once

#include "types.h"

namespace gradl1 {

enum EndSum { kLowest, kLowestCount, kHighest, kHighestCount, kNans, kEndSums };

// Partial results of no values.
template <class A>
GRADL1_FN A no_ends(int j) {
    const A infinity = static_cast<A>(HUGE_VAL);
    return j == kLowest ? infinity : j == kHighest ? -infinity : A(0);
}

// Adds `count` values that are equal to each extreme to partial results.
template <class A>
GRADL1_FN void extend(A lowest, A lowest_count, A highest, A highest_count, A nans, A* e, std::int64_t stride) {
    A &low = e[kLowest * stride], &low_count = e[kLowestCount * stride];
    A &high = e[kHighest * stride], &high_count = e[kHighestCount * stride];
    low_count = lowest < low ? lowest_count : low_count + (lowest == low ? lowest_count : A(0));
    low = lowest < low ? lowest : low;
    high_count = highest > high ? highest_count : high_count + (highest == high ? highest_count : A(0));
    high = highest > high ? highest : high;
    e[kNans * stride] += nans;
}

// Adds one value.
template <class A>
GRADL1_FN void extend(A value, A* e) {
    extend(value, A(1), value, A(1), value != value ? A(1) : A(0), e, 1);
}

// Adds partial results in another type.
template <class A, class B>
GRADL1_FN void merge_ends(const A* part, std::int64_t part_stride, B* e, std::int64_t stride) {
    B p[kEndSums];
    for (int j = 0; j < kEndSums; ++j) p[j] = static_cast<B>(part[j * part_stride]);
    extend(p[kLowest], p[kLowestCount], p[kHighest], p[kHighestCount], p[kNans], e, stride);
}

// Writes low, high and their counts. With a NaN both extremes are NaN, to which no value is equal.
template <class B, class A>
GRADL1_FN void write_ends(const B* e, A* out) {
    const bool nan = e[kNans] > 0;
    out[0] = static_cast<A>(nan ? static_cast<B>(NAN) : e[kLowest]);
    out[1] = static_cast<A>(nan ? static_cast<B>(NAN) : e[kHighest]);
    out[2] = static_cast<A>(nan ? B(0) : e[kLowestCount]);
    out[3] = static_cast<A>(nan ? B(0) : e[kHighestCount]);
}

// Constants of a body that adds the gradient of the ends.
enum EndConstant { kEndLow, kEndHigh, kShareLow, kShareHigh, kEndConstants };

template <class A>
GRADL1_FN void end_constants(const A* ends, const A* d_ends, A* q) {
    q[kEndLow] = ends[0];
    q[kEndHigh] = ends[1];
    q[kShareLow] = d_ends[0] / ends[2];
    q[kShareHigh] = d_ends[1] / ends[3];
}

// What the ends give to a value. A product, no choice: as in torch.amin a share that is not finite spoils all.
template <class A>
GRADL1_FN A add_share(A dy, A value, const A* q) {
    dy += static_cast<A>(value == q[kEndLow]) * q[kShareLow];
    dy += static_cast<A>(value == q[kEndHigh]) * q[kShareHigh];
    return dy;
}

}  // namespace gradl1
