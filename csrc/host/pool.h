// Work shared among the threads that the process already has.
#pragma once

#include <cstdint>

namespace gradl1::host {

// Calls task(context, i) for every i below count, on at most `threads` threads. Which thread does
// what is left to chance, so a task writes only what belongs to i.
void for_each(int threads, std::int64_t count, void (*task)(void* context, std::int64_t i), void* context);

// Whether an OpenMP runtime was found; without one everything runs on the calling thread.
bool has_team();

}  // namespace gradl1::host
