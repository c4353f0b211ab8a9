// The passes on the CPU, compiled once for each instruction set.
#pragma once

#include "../passes.h"
#include "../requests.h"

namespace gradl1::host {

struct Kernels {
    const char* name;
#define GRADL1_PASS(name, Request) void (*name)(const Request&, int threads);
    GRADL1_PASSES(GRADL1_PASS)
#undef GRADL1_PASS
};

// Bytes of scratch that any pass over a tensor of this layout needs.
std::int64_t scratch_bytes(const Layout& layout);
std::int64_t l1_scratch_bytes(const Piece* pieces, std::int64_t count);

// The best set that this processor can run, or the one named last by use(); use() returns false for a
// name that was not built or cannot run here.
const Kernels& kernels();
bool use(const char* name);

// Names of the sets built, null-terminated, the best first; runnable says which this processor can run.
const char* const* built();
bool runnable(const char* name);

}  // namespace gradl1::host
