#include "../arithmetic/tap.h"

#include "passes.h"

namespace gradl1::host {
inline namespace GRADL1_ISA {

void tap_backward(const Tap& r, int threads) {
    with_type(r.dtype, [&](auto type) {
        using T = decltype(type);
        using A = accumulator<T>;
        Pass<SumOfMagnitudes, T, A> pass{
            flat(r.layout.numel()), {static_cast<const T*>(r.dy)}, {}, nullptr, static_cast<double*>(r.scratch)};
        pass.run(threads);
        double sum[1];
        pass.total(0, sum);
        *static_cast<A*>(r.l1) = static_cast<A>(sum[0]);
    });
}

void tap_double_backward(const Tap& r, int threads) {
    with_type(r.dtype, [&](auto type) {
        using T = decltype(type);
        using A = accumulator<T>;
        const A k[1] = {scalar_or_zero<A>(r.d_l1)};
        const T *dy = static_cast<const T*>(r.dy), *d_dx = static_cast<const T*>(r.d_dx);
        T* d_dy = static_cast<T*>(r.d_dy);
        if (d_dx) {
            Pass<TapDoubleBackward<true>, T, A>{flat(r.layout.numel()), {dy, d_dx}, {d_dy}, k, nullptr}.run(threads);
        } else {
            Pass<TapDoubleBackward<false>, T, A>{flat(r.layout.numel()), {dy}, {d_dy}, k, nullptr}.run(threads);
        }
    });
}

void tap_ends(const Tap& r, int threads) {
    with_type(r.dtype, [&](auto type) {
        using T = decltype(type);
        using A = accumulator<T>;
        Pass<EndsOfTensor, T, A> pass{
            flat(r.layout.numel()), {static_cast<const T*>(r.x)}, {}, nullptr, static_cast<double*>(r.scratch)};
        pass.run(threads);
        pass.ends(static_cast<A*>(r.ends));
    });
}

void tap_add_ends_gradient(const Tap& r, int threads) {
    with_type(r.dtype, [&](auto type) {
        using T = decltype(type);
        using A = accumulator<T>;
        A q[kEndConstants];
        end_constants(static_cast<const A*>(r.ends), static_cast<const A*>(r.d_ends), q);
        const T *x = static_cast<const T*>(r.x), *dy = static_cast<const T*>(r.dy);
        T* total = static_cast<T*>(r.total);
        const Layout layout = flat(r.layout.numel());
        if (dy) {
            Pass<AddEndsGradient<true>, T, A>{layout, {x, dy}, {total}, nullptr, nullptr, q}.run(threads);
        } else {
            Pass<AddEndsGradient<false>, T, A>{layout, {x}, {total}, nullptr, nullptr, q}.run(threads);
        }
    });
}

void taps_ends(const Taps& r, int threads) {
    for (std::int64_t i = 0; i < r.count; ++i) tap_ends(tap_of(r, i), threads);
}

void taps_add_ends_gradients(const Taps& r, int threads) {
    for (std::int64_t i = 0; i < r.count; ++i) tap_add_ends_gradient(tap_of(r, i), threads);
}

}  // namespace GRADL1_ISA
}  // namespace gradl1::host
