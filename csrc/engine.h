// The passes of the host or of the GPU, as the binding calls them.
#pragma once

#include "passes.h"
#include "requests.h"

namespace gradl1 {

// Where a pass runs: the number of threads, or a device and a stream on it.
struct Where {
    std::int64_t first, second;
};

struct Engine {
#define GRADL1_PASS(name, Request) void (*name)(const Request&, Where);
    GRADL1_PASSES(GRADL1_PASS)
#undef GRADL1_PASS
    std::int64_t (*scratch_bytes)(const Layout&);  // of any pass over one tensor
    std::int64_t (*l1_scratch_bytes)(const Piece*, std::int64_t count);
    bool in_host_memory;  // whether scratch is ordinary memory
};

}  // namespace gradl1
