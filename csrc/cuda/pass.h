// Walks tensors on the GPU: 16-byte loads, a body, 16-byte stores, sums in a fixed order.
//
// Each block leaves its sums in a slot of its own; finish.h adds the slots in a fixed tree. No float
// is ever added atomically: results are the same, bit for bit, in every run.
#pragma once

#include "../arithmetic/batch_norm_act.h"
#include "platform.h"
#include "shape.h"

namespace gradl1::cuda {

template <class T, int Width>
struct alignas(sizeof(T) * Width) Pack {
    T value[Width];
};

// 16 bytes; float64 is there for tests and goes without.
template <class T>
constexpr int kWidest = sizeof(T) > 4 ? 1 : 16 / sizeof(T);

template <class Body, class T>
struct Operands {
    const T* in[Body::inputs + 1];
    T* out[Body::outputs + 1];
    const accumulator<T>* k;  // [coefficients][channels]
    double* slots;            // [chunks][sums][channels], or [blocks][sums] of ends
    const accumulator<T>* q = nullptr;  // [constants]
};

// The statistics of batch norm shift each channel by its first value, read where it lies.
template <class Body>
constexpr bool kShifted = false;
template <>
inline constexpr bool kShifted<Moments> = true;

template <class T>
GRADL1_FN accumulator<T> first_of(const T* x, const Layout& t, std::int64_t c) {
    const accumulator<T> first = widen(x[c * t.inner]);
    return first - first == 0 ? first : accumulator<T>(0);  // an infinity would turn the mean into NaN
}

template <class Body, class T>
__device__ void load_coefficients(
    const Operands<Body, T>& o, const Layout& t, std::int64_t c, accumulator<T> (&k)[Body::values + 1]
) {
    if constexpr (kShifted<Body>) {
        k[0] = first_of(o.in[0], t, c);
    } else {
#pragma unroll
        for (int j = 0; j < Body::coefficients; ++j) k[j] = o.k[j * t.channels + c];
#pragma unroll
        for (int j = 0; j < Body::constants; ++j) k[Body::coefficients + j] = o.q[j];
    }
}

// Applies a body to the pack at `offset`. Neighbours have coefficients and sums of their own (rows) or share them (planes).
template <class Body, class T, int Width, int Lanes>
__device__ void apply_pack(
    const Operands<Body, T>& o,
    std::int64_t offset,
    const accumulator<T> (&k)[Lanes][Body::values + 1],
    accumulator<T> (&sum)[Lanes][Body::sums + 1]
) {
    using A = accumulator<T>;
    Pack<T, Width> in[Body::inputs], out[Body::outputs + 1];
    // Phase 1: load.
#pragma unroll
    for (int j = 0; j < Body::inputs; ++j) in[j] = *reinterpret_cast<const Pack<T, Width>*>(o.in[j] + offset);
    // Phase 2: compute and add up, element by element.
#pragma unroll
    for (int e = 0; e < Width; ++e) {
        A x[Body::inputs], y[Body::outputs + 1];
#pragma unroll
        for (int j = 0; j < Body::inputs; ++j) x[j] = widen(in[j].value[e]);
        Body::apply(x, k[e % Lanes], y, sum[e % Lanes]);
#pragma unroll
        for (int j = 0; j < Body::outputs; ++j) out[j].value[e] = Narrow<T>::from(y[j]);
    }
    // Phase 3: store.
#pragma unroll
    for (int j = 0; j < Body::outputs; ++j) *reinterpret_cast<Pack<T, Width>*>(o.out[j] + offset) = out[j];
}

// Sum of a block in thread 0: lanes of a warp, then warps, each in a fixed tree.
template <class A>
__device__ A block_sum(A value) {
    __shared__ A warps[kThreads / 32];
    for (int distance = 16; distance; distance /= 2) value += __shfl_down_sync(0xffffffffu, value, distance);
    if (threadIdx.x % 32 == 0) warps[threadIdx.x / 32] = value;
    __syncthreads();
    A total = 0;
    for (int i = 0; i < kThreads / 32; ++i) total += warps[i];
    __syncthreads();
    return total;
}

// Ends of a block in thread 0, combined likewise.
template <class A>
__device__ void block_ends(A (&e)[kEndSums]) {
    __shared__ A warps[kThreads / 32][kEndSums];
    for (int distance = 16; distance; distance /= 2) {
        A above[kEndSums];
#pragma unroll
        for (int j = 0; j < kEndSums; ++j) above[j] = __shfl_down_sync(0xffffffffu, e[j], distance);
        merge_ends(above, 1, e, 1);
    }
    if (threadIdx.x % 32 == 0) {
        for (int j = 0; j < kEndSums; ++j) warps[threadIdx.x / 32][j] = e[j];
    }
    __syncthreads();
    for (int i = 1; threadIdx.x == 0 && i < kThreads / 32; ++i) merge_ends(warps[i], 1, e, 1);
    __syncthreads();
}

template <class Body, class A, int Lanes>
__device__ void begin_sums(A (&sum)[Lanes][Body::sums + 1]) {
#pragma unroll
    for (int e = 0; e < Lanes; ++e) {
#pragma unroll
        for (int j = 0; j < Body::sums; ++j) sum[e][j] = initial<Body, A>(j);
    }
}

// The ends of all lanes of a block, to its slot.
template <class Body, class T, int Lanes>
__device__ void store_ends(const Operands<Body, T>& o, const accumulator<T> (&sum)[Lanes][Body::sums + 1]) {
    using A = accumulator<T>;
    A all[kEndSums];
#pragma unroll
    for (int j = 0; j < kEndSums; ++j) all[j] = sum[0][j];
#pragma unroll
    for (int e = 1; e < Lanes; ++e) merge_ends(sum[e], 1, all, 1);
    block_ends(all);
    if (threadIdx.x != 0) return;
    double* slot = o.slots + (static_cast<std::int64_t>(blockIdx.y) * gridDim.x + blockIdx.x) * kEndSums;
    for (int j = 0; j < kEndSums; ++j) slot[j] = all[j];
}

// Blocks of a pass that must fit on a multiprocessor: without a number ptxas spills a register or two to
// fit three. The widest body in 16-bit types keeps 8 x 12 coefficients in registers and gets all of them
// (constants are the same for the 8).
template <class Body, class T>
constexpr int kResident = Body::coefficients > 8 && sizeof(T) == 2 ? 1 : 2;

// Grid: channel, chunk of its pixels.
template <class Body, class T, int Width>
__global__ void __launch_bounds__(kThreads, kResident<Body, T>) planes_kernel(Operands<Body, T> o, Layout t, Shape shape) {
    using A = accumulator<T>;
    const std::int64_t c = blockIdx.x, plane = t.inner / Width;
    A k[1][Body::values + 1], sum[1][Body::sums + 1];
    // Phase 1: the coefficients of this channel.
    begin_sums<Body>(sum);
    load_coefficients(o, t, c, k[0]);
    // Phase 2: the packs of this chunk. `outer` counts planes, i the packs inside one.
    const std::int64_t first = blockIdx.y * shape.length;
    const std::int64_t last = first + shape.length < shape.packs ? first + shape.length : shape.packs;
    std::int64_t outer = 0, i = first + threadIdx.x;
    if (t.outer > 1) {
        outer = i / plane;
        i -= outer * plane;
    }
    for (std::int64_t pack = first + threadIdx.x; pack < last; pack += kThreads) {
        apply_pack<Body, T, Width, 1>(o, (outer * t.channels + c) * t.inner + i * Width, k, sum);
        i += kThreads;
        if (t.outer > 1 && i >= plane) {
            // Short planes take a division; in 32 bits where that is enough.
            const std::int64_t planes = plane > (std::int64_t(1) << 30)
                                            ? 1
                                            : static_cast<std::uint32_t>(i) / static_cast<std::uint32_t>(plane);
            outer += planes;
            i -= planes * plane;
        }
    }
    // Phase 3: what a flat tensor has beyond its last whole pack.
    if (Width > 1 && t.outer == 1 && blockIdx.y == 0 && threadIdx.x < t.inner % Width) {
        apply_pack<Body, T, 1, 1>(o, c * t.inner + plane * Width + threadIdx.x, k, sum);
    }
    // Phase 4: the sums of the block, to its slot.
    if constexpr (Body::ends) {
        store_ends(o, sum);
    } else {
#pragma unroll
        for (int j = 0; j < Body::sums; ++j) {
            const A total = block_sum(sum[0][j]);
            if (threadIdx.x == 0) o.slots[(blockIdx.y * Body::sums + j) * t.channels + c] = total;
        }
    }
}

// Grid: tile of channels, chunk of pixels. Block: packs of channels x pixels.
template <class Body, class T, int Width>
__global__ void __launch_bounds__(kThreads, kResident<Body, T>) rows_kernel(Operands<Body, T> o, Layout t, Shape shape) {
    using A = accumulator<T>;
    const int column = threadIdx.x % shape.tile, row = threadIdx.x / shape.tile, rows = kThreads / shape.tile;
    const std::int64_t c = (static_cast<std::int64_t>(blockIdx.x) * shape.tile + column) * Width;
    const std::int64_t first = blockIdx.y * shape.length;
    const std::int64_t last = first + shape.length < shape.packs ? first + shape.length : shape.packs;
    A k[Width][Body::values + 1], sum[Width][Body::sums + 1];
    begin_sums<Body>(sum);
    if (c < t.channels) {
        // Phase 1: the coefficients of this thread's channels.
#pragma unroll
        for (int e = 0; e < Width; ++e) load_coefficients(o, t, c + e, k[e]);
        // Phase 2: their pixels in this chunk.
        for (std::int64_t p = first + row; p < last; p += rows) {
            apply_pack<Body, T, Width, Width>(o, p * t.channels + c, k, sum);
        }
    }
    // Phase 3: the sums of each channel over the rows of the block, in a fixed tree, to its slot.
    if constexpr (Body::ends) {
        store_ends(o, sum);
    } else if constexpr (Body::sums > 0) {
        __shared__ A shared[kThreads * Width];
#pragma unroll
        for (int j = 0; j < Body::sums; ++j) {
#pragma unroll
            for (int e = 0; e < Width; ++e) shared[e * kThreads + threadIdx.x] = sum[e][j];
            __syncthreads();
            for (int half = rows / 2; half; half /= 2) {
                if (row < half) {
#pragma unroll
                    for (int e = 0; e < Width; ++e) {
                        A* mine = shared + e * kThreads + threadIdx.x;
                        *mine += mine[half * shape.tile];
                    }
                }
                __syncthreads();
            }
            if (row == 0 && c < t.channels) {
#pragma unroll
                for (int e = 0; e < Width; ++e) {
                    o.slots[(blockIdx.y * Body::sums + j) * t.channels + c + e] = shared[e * kThreads + column];
                }
            }
            __syncthreads();
        }
    }
}

template <class Body, class T>
bool aligned(const Operands<Body, T>& o) {
    std::uintptr_t bits = 0;
    for (int j = 0; j < Body::inputs; ++j) bits |= reinterpret_cast<std::uintptr_t>(o.in[j]);
    for (int j = 0; j < Body::outputs; ++j) bits |= reinterpret_cast<std::uintptr_t>(o.out[j]);
    return bits % 16 == 0;
}

// Runs a pass; returns how many slots it filled.
template <class Body, class T>
std::int64_t run(const char* name, const Operands<Body, T>& o, const Layout& t, Where where) {
    const Shape shape(t, kWidest<T>, aligned(o));
    const dim3 grid(static_cast<unsigned>(shape.columns), static_cast<unsigned>(shape.chunks)), block(kThreads);
    const bool wide = shape.width > 1;
    if (shape.rows) {
        launch(name, wide ? rows_kernel<Body, T, kWidest<T>> : rows_kernel<Body, T, 1>, grid, block, where, o, t, shape);
    } else {
        launch(name, wide ? planes_kernel<Body, T, kWidest<T>> : planes_kernel<Body, T, 1>, grid, block, where, o, t,
               shape);
    }
    return Body::ends ? shape.columns * shape.chunks : shape.chunks;
}

// Calls f(T()) with the type of the tag.
template <class F>
void with_type(DType dtype, const F& f) {
    switch (dtype) {
        case DType::float32: return f(float());
        case DType::float64: return f(double());
        case DType::float16: return f(Half());
        case DType::bfloat16: return f(BFloat16());
    }
}

}  // namespace gradl1::cuda
