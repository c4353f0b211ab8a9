#include "emulation.h"

#include <ucontext.h>

#include <stdexcept>
#include <string>
#include <vector>

dim3 threadIdx, blockIdx, blockDim, gridDim;

static int current_device = 0;

cudaError_t cudaGetDevice(int* device) {
    *device = current_device;
    return cudaSuccess;
}

cudaError_t cudaSetDevice(int device) {
    if (device < 0 || device > 1) return 1;
    current_device = device;
    return cudaSuccess;
}

// For tests, through ctypes.
extern "C" __attribute__((visibility("default"))) int gradl1_current_device() { return current_device; }

namespace emulation {
namespace {

constexpr std::size_t kStack = 64 * 1024, kWarp = 32;

enum class State { running, at_shuffle, at_barrier, done };

struct Fiber {
    ucontext_t context;
    std::vector<char> stack = std::vector<char>(kStack);
    State state = State::running;
    std::uint64_t value[2];  // of the last shuffle and the one before: a neighbour may be one ahead
    int turn = 0;
};

ucontext_t scheduler;
std::vector<Fiber> fibers;
std::size_t current = 0;
bool backwards = false;
const std::function<void()>* body = nullptr;

void enter() {
    (*body)();
    fibers[current].state = State::done;
}

void start(Fiber& fiber) {
    fiber.state = State::running;
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = fiber.stack.data();
    fiber.context.uc_stack.ss_size = fiber.stack.size();
    fiber.context.uc_link = &scheduler;
    makecontext(&fiber.context, enter, 0);
}

// The i-th of `count` in the order of this launch.
std::size_t in_order(std::size_t i, std::size_t count) { return backwards ? count - 1 - i : i; }

void expect_one_state(const char* kernel, std::size_t first, std::size_t last) {
    for (std::size_t i = first; i < last; ++i) {
        if (fibers[i].state != fibers[first].state) {
            throw std::runtime_error(std::string(kernel) + ": threads part before a barrier or a shuffle");
        }
    }
}

// Lets a warp run to its next barrier or to its end.
void advance(const char* kernel, std::size_t first) {
    do {
        for (std::size_t i = 0; i < kWarp; ++i) {
            current = first + in_order(i, kWarp);
            threadIdx = dim3(static_cast<unsigned>(current));
            fibers[current].state = State::running;
            swapcontext(&scheduler, &fibers[current].context);
        }
        expect_one_state(kernel, first, first + kWarp);
    } while (fibers[first].state == State::at_shuffle);
}

void wait(State state) {
    Fiber& self = fibers[current];
    self.state = state;
    swapcontext(&self.context, &scheduler);
}

}  // namespace

void barrier() { wait(State::at_barrier); }

std::uint64_t from_lane_above(std::uint64_t value, int distance) {
    const std::size_t self = current, lane = self % kWarp + static_cast<std::size_t>(distance);
    const int turn = fibers[self].turn ^= 1;
    fibers[self].value[turn] = value;
    wait(State::at_shuffle);
    return fibers[lane < kWarp ? self + static_cast<std::size_t>(distance) : self].value[turn];
}

void run(const char* name, std::int64_t device, dim3 grid, dim3 block, const std::function<void()>& thread) {
    if (device != current_device) throw std::runtime_error(std::string(name) + ": launched on another device");
    if (grid.x == 0 || grid.y == 0 || grid.y > 65535 || grid.z != 1 || block.x > 1024 || block.x % kWarp ||
        block.y != 1) {
        throw std::runtime_error(std::string(name) + ": invalid configuration argument");
    }
    body = &thread, gridDim = grid, blockDim = block, backwards = !backwards;
    fibers.resize(block.x);
    for (unsigned y = 0; y < grid.y; ++y) {
        for (unsigned x = 0; x < grid.x; ++x) {
            blockIdx = dim3(x, y);
            for (Fiber& fiber : fibers) start(fiber);
            do {
                const std::size_t warps = block.x / kWarp;
                for (std::size_t i = 0; i < warps; ++i) advance(name, kWarp * in_order(i, warps));
                expect_one_state(name, 0, block.x);
            } while (fibers[0].state != State::done);
        }
    }
}

}  // namespace emulation
