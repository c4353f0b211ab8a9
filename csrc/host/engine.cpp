// The host's engine: each pass goes to the instruction set in use.
#include "../engines.h"

#include "kernels.h"

namespace gradl1 {
namespace {

template <auto Pass, class Request>
void run(const Request& request, Where where) {
    (host::kernels().*Pass)(request, static_cast<int>(where.first < 1 ? 1 : where.first));
}

const Engine kEngine = {
#define GRADL1_PASS(name, Request) run<&host::Kernels::name, Request>,
    GRADL1_PASSES(GRADL1_PASS)
#undef GRADL1_PASS
    host::scratch_bytes,
    host::l1_scratch_bytes,
    true,
};

}  // namespace

const Engine& host_engine() { return kEngine; }

}  // namespace gradl1
