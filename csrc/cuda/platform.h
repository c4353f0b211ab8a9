// Launches, errors and devices: all that is said to the CUDA runtime. Tests replace it by an emulation.
#pragma once

#include <cstdint>

#if defined(GRADL1_EMULATED)
#include "../testing/emulation.h"
#else
#include <cuda_runtime.h>
#endif

#include <stdexcept>
#include <string>

#include "../engine.h"

namespace gradl1::cuda {

// Kernel: the name of the kernel or pass that cannot run; call: what failed, if not the launch itself.
inline void check(cudaError_t error, const char* kernel, const char* call = "") {
    if (error != cudaSuccess) throw std::runtime_error(std::string(kernel) + ": " + call + cudaGetErrorString(error));
}

// Makes a device the current one for as long as it lives.
class OnDevice {
  public:
    OnDevice(const char* pass, std::int64_t device) : wanted_(static_cast<int>(device)) {
        check(cudaGetDevice(&before_), pass, "cudaGetDevice: ");
        if (before_ != wanted_) check(cudaSetDevice(wanted_), pass, "cudaSetDevice: ");
    }
    ~OnDevice() {
        if (before_ != wanted_) cudaSetDevice(before_);
    }
    OnDevice(const OnDevice&) = delete;
    OnDevice& operator=(const OnDevice&) = delete;

  private:
    int before_ = 0, wanted_;
};

// Every launch of the library. It allocates nothing and waits for nothing: safe to capture in a graph.
template <class... Parameters, class... Arguments>
void launch(
    const char* name, void (*kernel)(Parameters...), dim3 grid, dim3 block, Where where, const Arguments&... arguments
) {
#if defined(GRADL1_EMULATED)
    emulation::run(name, where.first, grid, block, [&] { kernel(arguments...); });
#else
    kernel<<<grid, block, 0, reinterpret_cast<cudaStream_t>(where.second)>>>(arguments...);
    check(cudaGetLastError(), name);
#endif
}

}  // namespace gradl1::cuda
