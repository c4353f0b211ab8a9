#include "../arithmetic/fake_quantize.h"

#include "../arithmetic/tap.h"
#include "finish.h"
#include "passes.h"

namespace gradl1::cuda {
namespace {

// Fills the coefficients: [5][channels].
template <class A>
__global__ void __launch_bounds__(kThreads) coefficients_kernel(FakeQuantize r, A* k) {
    const std::int64_t channels = r.layout.channels;
    const std::int64_t c = static_cast<std::int64_t>(blockIdx.x) * kThreads + threadIdx.x;
    if (c >= channels) return;
    k[kScale * channels + c] = static_cast<const A*>(r.scale)[c];
    k[kZeroPoint * channels + c] = static_cast<const A*>(r.zero_point)[c];
    k[kCodeMin * channels + c] = static_cast<A>(r.code_min);
    k[kCodeMax * channels + c] = static_cast<A>(r.code_max);
    k[kDl1 * channels + c] = r.d_l1 ? *static_cast<const A*>(r.d_l1) : A(0);
}

// Scratch: the slots, then the coefficients.
double* slots(const FakeQuantize& r) { return static_cast<double*>(r.scratch); }

template <class A>
const A* coefficients(const FakeQuantize& r, Where where) {
    const std::int64_t channels = r.layout.channels;
    A* k = reinterpret_cast<A*>(slots(r) + most_chunks(r.layout) * channels);
    const dim3 grid(static_cast<unsigned>((channels + kThreads - 1) / kThreads));
    launch("fake_quantize_coefficients", coefficients_kernel<A>, grid, dim3(kThreads), where, r, k);
    return k;
}

}  // namespace

void fake_quantize_forward(const FakeQuantize& r, Where where) {
    const OnDevice guard("fake_quantize_forward", where.first);
    with_type(r.dtype, [&](auto type) {
        using T = decltype(type);
        const auto k = coefficients<accumulator<T>>(r, where);
        const Operands<FakeQuantizeForward, T> o{{static_cast<const T*>(r.x)}, {static_cast<T*>(r.y)}, k, slots(r)};
        run("fake_quantize_forward", o, r.layout, where);
    });
}

void fake_quantize_backward(const FakeQuantize& r, Where where) {
    const OnDevice guard("fake_quantize_backward", where.first);
    with_type(r.dtype, [&](auto type) {
        using T = decltype(type);
        const auto k = coefficients<accumulator<T>>(r, where);
        const Operands<FakeQuantizeBackward, T> o{
            {static_cast<const T*>(r.dy), static_cast<const T*>(r.x)}, {static_cast<T*>(r.dx)}, k, slots(r)};
        const std::int64_t count = run("fake_quantize_backward", o, r.layout, where) * r.layout.channels;
        if (r.l1) total<accumulator<T>>("fake_quantize_backward_total", slots(r), count, r.l1, where);
    });
}

void fake_quantize_double_backward(const FakeQuantize& r, Where where) {
    if (!r.d_dx) return tap_double_backward(without_d_dx(r), where);
    const OnDevice guard("fake_quantize_double_backward", where.first);
    with_type(r.dtype, [&](auto type) {
        using T = decltype(type);
        const auto k = coefficients<accumulator<T>>(r, where);
        const Operands<FakeQuantizeDoubleBackward, T> o{
            {static_cast<const T*>(r.dy), static_cast<const T*>(r.x), static_cast<const T*>(r.d_dx)},
            {static_cast<T*>(r.d_dy)},
            k,
            slots(r)};
        run("fake_quantize_double_backward", o, r.layout, where);
    });
}

}  // namespace gradl1::cuda
