// Just enough CUDA for g++ to run the launchers on a CPU: test only, slow, one logical thread after another.
//
// Every thread of a block is a fiber, and a warp runs as far as it can before the next one moves: it
// passes its own shuffles and stops at a barrier. From one launch to the next the order turns round, so
// that whoever reads shared memory too soon or writes it too soon is caught in one of the two. Meeting
// different things, or a thread that ends while others wait, is an error: on a GPU it would be undefined.
#pragma once

#include <cstdint>
#include <functional>

#define __global__
#define __device__
#define __host__
#define __launch_bounds__(...)
#define __shared__ static

struct dim3 {
    unsigned x, y, z;
    constexpr dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};

using cudaError_t = int;
constexpr cudaError_t cudaSuccess = 0;

inline const char* cudaGetErrorString(cudaError_t) { return "error"; }
cudaError_t cudaGetDevice(int* device);
cudaError_t cudaSetDevice(int device);  // there are devices 0 and 1

extern dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace emulation {

void run(const char* name, std::int64_t device, dim3 grid, dim3 block, const std::function<void()>& thread);

// Waits until all threads of the block have come to a barrier.
void barrier();

// The bits of `value` in the thread `distance` lanes up, or its own at the end of the warp.
std::uint64_t from_lane_above(std::uint64_t value, int distance);

}  // namespace emulation

#define __syncthreads() emulation::barrier()

inline float __shfl_down_sync(unsigned, float value, int distance) {
    const double wide = value;
    double result;
    std::uint64_t bits;
    __builtin_memcpy(&bits, &wide, 8);
    bits = emulation::from_lane_above(bits, distance);
    __builtin_memcpy(&result, &bits, 8);
    return static_cast<float>(result);
}

inline double __shfl_down_sync(unsigned, double value, int distance) {
    std::uint64_t bits;
    __builtin_memcpy(&bits, &value, 8);
    bits = emulation::from_lane_above(bits, distance);
    __builtin_memcpy(&value, &bits, 8);
    return value;
}
