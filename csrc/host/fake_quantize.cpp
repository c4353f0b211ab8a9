#include "../arithmetic/fake_quantize.h"

#include "../arithmetic/tap.h"
#include "passes.h"

namespace gradl1::host {
inline namespace GRADL1_ISA {
namespace {

// Scratch: the slots, then the coefficients.
template <class A>
A* coefficients(const FakeQuantize& r) {
    const std::int64_t channels = r.layout.channels;
    A* k = reinterpret_cast<A*>(static_cast<double*>(r.scratch) + Chunks(r.layout).count * channels);
    for (std::int64_t c = 0; c < channels; ++c) {
        k[kScale * channels + c] = static_cast<const A*>(r.scale)[c];
        k[kZeroPoint * channels + c] = static_cast<const A*>(r.zero_point)[c];
        k[kCodeMin * channels + c] = static_cast<A>(r.code_min);
        k[kCodeMax * channels + c] = static_cast<A>(r.code_max);
        k[kDl1 * channels + c] = scalar_or_zero<A>(r.d_l1);
    }
    return k;
}

}  // namespace

void fake_quantize_forward(const FakeQuantize& r, int threads) {
    with_type(r.dtype, [&](auto type) {
        using T = decltype(type);
        using A = accumulator<T>;
        Pass<FakeQuantizeForward, T, A>{
            r.layout,
            {static_cast<const T*>(r.x)},
            {static_cast<T*>(r.y)},
            coefficients<A>(r),
            static_cast<double*>(r.scratch)}.run(threads);
    });
}

void fake_quantize_backward(const FakeQuantize& r, int threads) {
    with_type(r.dtype, [&](auto type) {
        using T = decltype(type);
        using A = accumulator<T>;
        Pass<FakeQuantizeBackward, T, A> pass{
            r.layout,
            {static_cast<const T*>(r.dy), static_cast<const T*>(r.x)},
            {static_cast<T*>(r.dx)},
            coefficients<A>(r),
            static_cast<double*>(r.scratch)};
        pass.run(threads);
        double l1 = 0, sum[1];
        for (std::int64_t c = 0; r.l1 && c < r.layout.channels; ++c) {
            pass.total(c, sum);
            l1 += sum[0];
        }
        if (r.l1) *static_cast<A*>(r.l1) = static_cast<A>(l1);
    });
}

void fake_quantize_double_backward(const FakeQuantize& r, int threads) {
    if (!r.d_dx) return tap_double_backward(without_d_dx(r), threads);
    with_type(r.dtype, [&](auto type) {
        using T = decltype(type);
        using A = accumulator<T>;
        Pass<FakeQuantizeDoubleBackward, T, A>{
            r.layout,
            {static_cast<const T*>(r.dy), static_cast<const T*>(r.x), static_cast<const T*>(r.d_dx)},
            {static_cast<T*>(r.d_dy)},
            coefficients<A>(r),
            static_cast<double*>(r.scratch)}.run(threads);
    });
}

}  // namespace GRADL1_ISA
}  // namespace gradl1::host
