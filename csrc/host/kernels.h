// The sweeps on the CPU, compiled once for each instruction set.
#pragma once

#include "../requests.h"

namespace gradl1::host {

struct Kernels {
    const char* name;
    void (*tap_backward)(const Tap&, int threads);
    void (*tap_double_backward)(const Tap&, int threads);
    void (*fake_quantize_forward)(const FakeQuantize&, int threads);
    void (*fake_quantize_backward)(const FakeQuantize&, int threads);
    void (*fake_quantize_double_backward)(const FakeQuantize&, int threads);
    void (*l1_norm)(const L1Norm&, int threads);
    void (*l1_norm_backward)(const L1Norm&, int threads);
    void (*batch_norm_act_forward)(const BatchNormAct&, int threads);
    void (*batch_norm_act_backward)(const BatchNormAct&, int threads);
    void (*batch_norm_act_double_backward)(const BatchNormAct&, int threads);
};

// Bytes of scratch that any sweep over a tensor of this layout needs.
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
