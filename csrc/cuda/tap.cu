#include "../arithmetic/tap.h"

#include "finish.h"
#include "passes.h"

namespace gradl1::cuda {
namespace {

template <class A>
__global__ void __launch_bounds__(32) end_constants_kernel(const A* ends, const A* d_ends, A* q) {
    if (threadIdx.x == 0) end_constants(ends, d_ends, q);
}

}  // namespace

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
        T* d_dy = static_cast<T*>(r.d_dy);
        const char* name = "tap_double_backward";
        if (d_dx) {
            run(name, Operands<TapDoubleBackward<true>, T>{{dy, d_dx}, {d_dy}, k, nullptr}, r.layout, where);
        } else {
            run(name, Operands<TapDoubleBackward<false>, T>{{dy}, {d_dy}, k, nullptr}, r.layout, where);
        }
    });
}

void tap_ends(const Tap& r, Where where) {
    const OnDevice guard("tap_ends", where.first);
    with_type(r.dtype, [&](auto type) {
        using T = decltype(type);
        double* slots = static_cast<double*>(r.scratch);
        const Operands<EndsOfTensor, T> o{{static_cast<const T*>(r.x)}, {}, nullptr, slots};
        ends<accumulator<T>>("tap_ends_total", slots, run("tap_ends", o, r.layout, where), r.ends, where);
    });
}

void tap_add_ends_gradient(const Tap& r, Where where) {
    const OnDevice guard("tap_add_ends_gradient", where.first);
    with_type(r.dtype, [&](auto type) {
        using T = decltype(type);
        using A = accumulator<T>;
        A* q = static_cast<A*>(r.scratch);
        launch("tap_end_constants", end_constants_kernel<A>, dim3(1), dim3(32), where, static_cast<const A*>(r.ends),
               static_cast<const A*>(r.d_ends), q);
        const T *x = static_cast<const T*>(r.x), *dy = static_cast<const T*>(r.dy);
        T* total = static_cast<T*>(r.total);
        const char* name = "tap_add_ends_gradient";
        if (dy) {
            run(name, Operands<AddEndsGradient<true>, T>{{x, dy}, {total}, nullptr, nullptr, q}, r.layout, where);
        } else {
            run(name, Operands<AddEndsGradient<false>, T>{{x}, {total}, nullptr, nullptr, q}, r.layout, where);
        }
    });
}

void taps_ends(const Taps& r, Where where) {
    for (std::int64_t i = 0; i < r.count; ++i) tap_ends(tap_of(r, i), where);
}

void taps_add_ends_gradients(const Taps& r, Where where) {
    for (std::int64_t i = 0; i < r.count; ++i) tap_add_ends_gradient(tap_of(r, i), where);
}

}  // namespace gradl1::cuda
