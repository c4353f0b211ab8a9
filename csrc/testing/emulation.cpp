#include "emulation.h"

#include <ucontext.h>

#include <stdexcept>
#include <string>
#include <vector>

dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace emulation {
namespace {

constexpr std::size_t kStack = 64 * 1024;

struct Fiber {
    ucontext_t context;
    std::vector<char> stack = std::vector<char>(kStack);
    std::string waits_for;
    bool done = false;
    std::uint64_t value = 0;
};

ucontext_t scheduler;
std::vector<Fiber> fibers;
std::size_t current = 0;
const std::function<void()>* body = nullptr;

void enter() {
    (*body)();
    fibers[current].done = true;
}

void start(Fiber& fiber) {
    fiber.done = false;
    fiber.waits_for.clear();
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = fiber.stack.data();
    fiber.context.uc_stack.ss_size = fiber.stack.size();
    fiber.context.uc_link = &scheduler;
    makecontext(&fiber.context, enter, 0);
}

// Lets every thread run to its next meeting point; returns whether any is left.
bool advance(const char* kernel) {
    std::size_t done = 0;
    for (current = 0; current < fibers.size(); ++current) {
        threadIdx = dim3(static_cast<unsigned>(current));
        swapcontext(&scheduler, &fibers[current].context);
        done += fibers[current].done;
        if (fibers[current].waits_for != fibers[0].waits_for || fibers[current].done != fibers[0].done) {
            throw std::runtime_error(std::string(kernel) + ": threads of a block part before a barrier");
        }
    }
    return done == 0;
}

}  // namespace

void meet(const void*, const char* what) {
    Fiber& self = fibers[current];
    self.waits_for = what;
    swapcontext(&self.context, &scheduler);
}

std::uint64_t from_lane_above(std::uint64_t value, int distance) {
    const std::size_t self = current, lane = self % 32 + static_cast<std::size_t>(distance);
    fibers[self].value = value;
    meet(nullptr, "__shfl_down_sync");
    const std::uint64_t result = fibers[lane < 32 ? self + static_cast<std::size_t>(distance) : self].value;
    meet(nullptr, "__shfl_down_sync, read");
    return result;
}

void run(const char* name, dim3 grid, dim3 block, const std::function<void()>& thread) {
    if (grid.x == 0 || grid.y == 0 || grid.y > 65535 || grid.z != 1 || block.x > 1024 || block.y != 1) {
        throw std::runtime_error(std::string(name) + ": invalid configuration argument");
    }
    body = &thread, gridDim = grid, blockDim = block;
    fibers.resize(block.x);
    for (unsigned y = 0; y < grid.y; ++y) {
        for (unsigned x = 0; x < grid.x; ++x) {
            blockIdx = dim3(x, y);
            for (Fiber& fiber : fibers) start(fiber);
            while (advance(name)) {
            }
        }
    }
}

}  // namespace emulation
