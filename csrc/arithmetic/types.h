// Floating types of 16 bits and the types in which values are summed; host and device, no torch.
//
// Arithmetic functions are always inlined: the host loops are compiled once per instruction set, and
// the linker must not be able to choose the code of one set for another.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#if defined(__CUDACC__)
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#define GRADL1_FN __host__ __device__ __forceinline__
#else
#define GRADL1_FN inline __attribute__((always_inline))
#endif

namespace gradl1 {

struct Half {
    std::uint16_t bits;
};

struct BFloat16 {
    std::uint16_t bits;
};

template <class T>
struct Accumulator {
    using type = float;
};

template <>
struct Accumulator<double> {
    using type = double;
};

template <class T>
using accumulator = typename Accumulator<T>::type;

GRADL1_FN std::uint32_t bits_of(float value) {
    std::uint32_t bits;
    std::memcpy(&bits, &value, sizeof bits);
    return bits;
}

GRADL1_FN float float_of(std::uint32_t bits) {
    float value;
    std::memcpy(&value, &bits, sizeof value);
    return value;
}

GRADL1_FN float widen(float value) { return value; }
GRADL1_FN double widen(double value) { return value; }
GRADL1_FN float widen(BFloat16 value) { return float_of(static_cast<std::uint32_t>(value.bits) << 16); }

GRADL1_FN float widen(Half value) {
#if defined(__CUDA_ARCH__)
    return __half2float(__half(__half_raw{value.bits}));
#else
    const std::uint32_t sign = static_cast<std::uint32_t>(value.bits & 0x8000u) << 16;
    const std::uint32_t rest = value.bits & 0x7fffu;
    const std::uint32_t normal = (rest << 13) + (rest >= 0x7c00u ? 0x70000000u : 0x38000000u);
    const std::uint32_t denormal = bits_of(static_cast<float>(static_cast<std::int32_t>(rest)) * 0x1p-24f);
    return float_of(sign | (rest < 0x400u ? denormal : normal));
#endif
}

template <class T>
struct Narrow;

template <>
struct Narrow<float> {
    static GRADL1_FN float from(float value) { return value; }
};

template <>
struct Narrow<double> {
    static GRADL1_FN double from(double value) { return value; }
};

template <>
struct Narrow<BFloat16> {
    static GRADL1_FN BFloat16 from(float value) {
        const std::uint32_t bits = bits_of(value);
        const std::uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;  // half to even
        const bool nan = (bits & 0x7fffffffu) > 0x7f800000u;
        return {static_cast<std::uint16_t>(nan ? 0x7fc0u : rounded)};
    }
};

template <>
struct Narrow<Half> {
    static GRADL1_FN Half from(float value) {
#if defined(__CUDA_ARCH__)
        return {__half_raw(__float2half_rn(value)).x};
#else
        const std::uint32_t sign = (bits_of(value) >> 16) & 0x8000u;
        const std::uint32_t rest = bits_of(value) & 0x7fffffffu;
        const std::uint32_t normal = (rest + 0xc8000fffu + ((rest >> 13) & 1u)) >> 13;  // half to even
        // Adding 0.5 puts the last bit of a denormal half at the last bit of the sum: the addition rounds.
        const std::uint32_t denormal = bits_of(float_of(rest) + 0.5f) - 0x3f000000u;
        const std::uint32_t special = rest > 0x7f800000u ? 0x7e00u : 0x7c00u;
        const std::uint32_t finite = rest < 0x38800000u ? denormal : normal;
        return {static_cast<std::uint16_t>(sign | (rest >= 0x47800000u ? special : finite))};
#endif
    }
};

template <class A>
GRADL1_FN A sign_of(A value) {
    return static_cast<A>(value > A(0)) - static_cast<A>(value < A(0));  // of NaN: 0, as torch.sign
}

GRADL1_FN float magnitude(float value) { return fabsf(value); }
GRADL1_FN double magnitude(double value) { return fabs(value); }

// How a tensor that is dense in memory looks from one of its axes.
struct Layout {
    std::int64_t outer, channels, inner;

    GRADL1_FN std::int64_t pixels() const { return outer * inner; }
    GRADL1_FN std::int64_t numel() const { return outer * channels * inner; }
};

}  // namespace gradl1
