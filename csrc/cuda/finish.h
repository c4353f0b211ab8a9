// Second step of every sum: slots are added in a fixed order, and something is made of the totals.
#pragma once

#include "pass.h"

namespace gradl1::cuda {

constexpr int kWarps = kThreads / 32;

// A warp for each channel; lane 0 calls finish(c, sums). Slots: [count][Sums][channels].
template <int Sums, class Finish>
__global__ void __launch_bounds__(kThreads)
    finish_kernel(const double* slots, std::int64_t count, std::int64_t channels, Finish finish) {
    const std::int64_t c = static_cast<std::int64_t>(blockIdx.x) * kWarps + threadIdx.x / 32;
    // Phase 1: each lane adds every 32nd slot.
    double sum[Sums] = {};
    for (std::int64_t slot = threadIdx.x % 32; c < channels && slot < count; slot += 32) {
#pragma unroll
        for (int j = 0; j < Sums; ++j) sum[j] += slots[(slot * Sums + j) * channels + c];
    }
    // Phase 2: the lanes of the warp, in a fixed tree.
#pragma unroll
    for (int j = 0; j < Sums; ++j) {
        for (int distance = 16; distance; distance /= 2) sum[j] += __shfl_down_sync(0xffffffffu, sum[j], distance);
    }
    if (threadIdx.x % 32 == 0 && c < channels) finish(c, sum);
}

template <int Sums, class Finish>
void finish(
    const char* name, const double* slots, std::int64_t count, std::int64_t channels, const Finish& f, Where where
) {
    const dim3 grid(static_cast<unsigned>((channels + kWarps - 1) / kWarps)), block(kThreads);
    launch(name, finish_kernel<Sums, Finish>, grid, block, where, slots, count, channels, f);
}

// One block: the sum of all values, to a scalar.
template <class A>
__global__ void __launch_bounds__(kThreads) total_kernel(const double* values, std::int64_t count, A* out) {
    double sum = 0;
    for (std::int64_t i = threadIdx.x; i < count; i += kThreads) sum += values[i];
    sum = block_sum(sum);
    if (threadIdx.x == 0) *out = static_cast<A>(sum);
}

template <class A>
void total(const char* name, const double* values, std::int64_t count, void* out, Where where) {
    launch(name, total_kernel<A>, dim3(1), dim3(kThreads), where, values, count, static_cast<A*>(out));
}

// One block: the ends of all blocks of a pass.
template <class A>
__global__ void __launch_bounds__(kThreads) ends_kernel(const double* slots, std::int64_t count, A* out) {
    double e[kEndSums];
    for (int j = 0; j < kEndSums; ++j) e[j] = no_ends<double>(j);
    for (std::int64_t i = threadIdx.x; i < count; i += kThreads) merge_ends(slots + i * kEndSums, 1, e, 1);
    block_ends(e);
    if (threadIdx.x == 0) write_ends(e, out);
}

template <class A>
void ends(const char* name, const double* slots, std::int64_t count, void* out, Where where) {
    launch(name, ends_kernel<A>, dim3(1), dim3(kThreads), where, slots, count, static_cast<A*>(out));
}

}  // namespace gradl1::cuda
