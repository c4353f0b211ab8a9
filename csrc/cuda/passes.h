// The passes on the GPU.
#pragma once

#include "../engine.h"

namespace gradl1::cuda {

#define GRADL1_PASS(name, Request) void name(const Request&, Where);
GRADL1_PASSES(GRADL1_PASS)
#undef GRADL1_PASS

std::int64_t l1_scratch_bytes(const Piece* pieces, std::int64_t count);

}  // namespace gradl1::cuda
