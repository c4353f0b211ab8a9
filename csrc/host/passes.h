// The passes of one instruction set, in a namespace of its own.
#pragma once

#include "driver.h"
#include "kernels.h"

namespace gradl1::host {
inline namespace GRADL1_ISA {

#define GRADL1_PASS(name, Request) void name(const Request&, int threads);
GRADL1_PASSES(GRADL1_PASS)
#undef GRADL1_PASS

// A tensor without channels: one channel, one plane.
GRADL1_FN Layout flat(std::int64_t numel) { return {1, 1, numel}; }

template <class A>
GRADL1_FN A scalar_or_zero(const void* value) {
    return value ? *static_cast<const A*>(value) : A(0);
}

}  // namespace GRADL1_ISA
}  // namespace gradl1::host
