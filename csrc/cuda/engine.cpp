// The GPU's engine.
#include "../engines.h"
#include "passes.h"
#include "shape.h"

namespace gradl1 {
namespace cuda {

static std::int64_t scratch_bytes(const Layout& t) {
    return scratch_end(t) * 8;
}

static const Engine kEngine = {
#define GRADL1_PASS(name, Request) name,
    GRADL1_PASSES(GRADL1_PASS)
#undef GRADL1_PASS
    scratch_bytes,
    l1_scratch_bytes,
    false,
};

}  // namespace cuda

const Engine& cuda_engine() { return cuda::kEngine; }

}  // namespace gradl1
