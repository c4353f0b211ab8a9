// The team of threads is borrowed from the OpenMP runtime that torch brought into the process.
//
// Linking a runtime of our own would put a second pool beside torch's: after each parallel region the
// idle threads of one spin while the other's want the cores. So nothing is linked. The entry point that
// every OpenMP runtime has (GOMP_parallel; LLVM's and Intel's have it too) is looked up in the process,
// and what holds for torch's own parallel regions (thread count, fork) then holds for these.
#include "pool.h"

#include <dlfcn.h>

#include <atomic>

namespace gradl1::host {
namespace {

using Parallel = void (*)(void (*)(void*), void*, unsigned, unsigned);

Parallel find_team() {
    static const Parallel found = reinterpret_cast<Parallel>(dlsym(RTLD_DEFAULT, "GOMP_parallel"));
    return found;
}

struct Job {
    void (*task)(void*, std::int64_t);
    void* context;
    std::int64_t count, grain;
    std::atomic<std::int64_t> next;
};

void work(void* pointer) {
    Job& job = *static_cast<Job*>(pointer);
    for (;;) {
        const std::int64_t first = job.next.fetch_add(job.grain, std::memory_order_relaxed);
        if (first >= job.count) return;
        const std::int64_t last = first + job.grain < job.count ? first + job.grain : job.count;
        for (std::int64_t i = first; i < last; ++i) job.task(job.context, i);
    }
}

}  // namespace

bool has_team() { return find_team() != nullptr; }

void for_each(int threads, std::int64_t count, void (*task)(void*, std::int64_t), void* context) {
    const std::int64_t wanted = threads < count ? threads : count;
    const std::int64_t share = count / (8 * (wanted > 0 ? wanted : 1));
    Job job{task, context, count, share > 1 ? share : 1, {0}};
    if (wanted > 1 && find_team()) {
        find_team()(work, &job, static_cast<unsigned>(wanted), 0);
    } else {
        work(&job);
    }
}

}  // namespace gradl1::host
