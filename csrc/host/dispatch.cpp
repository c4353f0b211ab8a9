// Chooses the widest instruction set that the processor has.
#define GRADL1_ISA common
#include <cstring>

#include "driver.h"
#include "kernels.h"

namespace gradl1::host {

extern const Kernels kernels_base;
#if defined(GRADL1_X86)
extern const Kernels kernels_avx2;
extern const Kernels kernels_avx512;
#endif

namespace {

const char* const kBuilt[] = {
#if defined(GRADL1_X86)
    "avx512",
    "avx2",
#endif
    "base",
    nullptr};

const Kernels* table(const char* name) {
#if defined(GRADL1_X86)
    if (!std::strcmp(name, "avx512")) return &kernels_avx512;
    if (!std::strcmp(name, "avx2")) return &kernels_avx2;
#endif
    return std::strcmp(name, "base") ? nullptr : &kernels_base;
}

const Kernels* best() {
    for (const char* const* name = kBuilt; *name; ++name) {
        if (runnable(*name)) return table(*name);
    }
    return &kernels_base;
}

const Kernels*& chosen() {
    static const Kernels* kernels = best();
    return kernels;
}

}  // namespace

bool runnable(const char* name) {
#if defined(GRADL1_X86)
    __builtin_cpu_init();
    const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                      __builtin_cpu_supports("bmi") && __builtin_cpu_supports("bmi2");
    if (!std::strcmp(name, "avx2")) return avx2;
    if (!std::strcmp(name, "avx512")) {
        return avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
               __builtin_cpu_supports("avx512cd") && __builtin_cpu_supports("avx512dq") &&
               __builtin_cpu_supports("avx512vl");
    }
#endif
    return !std::strcmp(name, "base");
}

const char* const* built() { return kBuilt; }

const Kernels& kernels() { return *chosen(); }

bool use(const char* name) {
    const Kernels* wanted = runnable(name) ? table(name) : nullptr;
    if (wanted) chosen() = wanted;
    return wanted != nullptr;
}

std::int64_t scratch_bytes(const Layout& layout) {
    constexpr std::int64_t most_sums = kDoubleBackwardSums, most_coefficients = kDoubleCoefficients;
    return (Chunks(layout).count * most_sums + most_coefficients) * layout.channels * 8;
}

std::int64_t l1_scratch_bytes(const Piece* pieces, std::int64_t count) {
    std::int64_t bytes = 0;
    for (std::int64_t i = 0; i < count; ++i) bytes += Chunks({1, 1, pieces[i].numel}).count * 8;
    return bytes;
}

}  // namespace gradl1::host
