#include "../arithmetic/tap.h"

#include "finish.h"
#include "sweeps.h"

namespace gradl1::cuda {

void tap_backward(const Tap& r, Where where) {
    const OnDevice guard("tap_backward", where.first);
    with_type(r.dtype, [&](auto type) {
        using T = decltype(type);
        double* slots = static_cast<double*>(r.scratch);
        const Operands<SumOfMagnitudes, T> o{{static_cast<const T*>(r.dy)}, {}, nullptr, slots};
        const std::int64_t count = run("tap_backward", o, r.layout, where);
        total<accumulator<T>>("tap_backward_total", slots, count, r.l1, where);
    });
}

void tap_double_backward(const Tap& r, Where where) {
    const OnDevice guard("tap_double_backward", where.first);
    with_type(r.dtype, [&](auto type) {
        using T = decltype(type);
        const accumulator<T>* k = static_cast<const accumulator<T>*>(r.d_l1);
        const T *dy = static_cast<const T*>(r.dy), *d_dx = static_cast<const T*>(r.d_dx);
        T* out = static_cast<T*>(r.out);
        if (d_dx) {
            run("tap_double_backward", Operands<TapDoubleBackward<true>, T>{{dy, d_dx}, {out}, k, nullptr}, r.layout, where);
        } else {
            run("tap_double_backward", Operands<TapDoubleBackward<false>, T>{{dy}, {out}, k, nullptr}, r.layout, where);
        }
    });
}

}  // namespace gradl1::cuda
