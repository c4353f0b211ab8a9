// The passes of one instruction set, as the dispatcher wants them.
#include "passes.h"

#define GRADL1_JOIN_(a, b) a##b
#define GRADL1_JOIN(a, b) GRADL1_JOIN_(a, b)
#define GRADL1_TEXT_(a) #a
#define GRADL1_TEXT(a) GRADL1_TEXT_(a)

namespace gradl1::host {

extern const Kernels GRADL1_JOIN(kernels_, GRADL1_ISA);
const Kernels GRADL1_JOIN(kernels_, GRADL1_ISA) = {
    GRADL1_TEXT(GRADL1_ISA),
#define GRADL1_PASS(name, Request) name,
    GRADL1_PASSES(GRADL1_PASS)
#undef GRADL1_PASS
};

}  // namespace gradl1::host
