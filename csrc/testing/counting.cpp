// Counts how often watched memory is read and written, for tests of the passes over tensors.
//
// The passes are compiled with -fsanitize=thread, which calls one of these functions at every access to
// memory, and linked without that sanitizer's library. Python reaches the counts through ctypes.
#include <cstddef>
#include <cstdint>
#include <vector>

namespace {

struct Watched {
    std::uintptr_t first, last;
    std::uint64_t read, written;
    std::size_t widest, narrowest;  // of the accesses, in bytes
};

std::vector<Watched> watched;

template <std::uint64_t Watched::* Kind>
void count(const void* address, std::size_t bytes) {
    const auto at = reinterpret_cast<std::uintptr_t>(address);
    for (Watched& w : watched) {
        if (at < w.first || at >= w.last) continue;
        w.*Kind += bytes;
        if (bytes > w.widest) w.widest = bytes;
        if (bytes < w.narrowest) w.narrowest = bytes;
    }
}

}  // namespace

#define GRADL1_EXPORT __attribute__((visibility("default")))

extern "C" {

GRADL1_EXPORT void gradl1_watch(std::uintptr_t address, std::size_t bytes) {
    watched.push_back({address, address + bytes, 0, 0, 0, bytes});
}
GRADL1_EXPORT std::uint64_t gradl1_bytes_read(std::size_t i) { return watched.at(i).read; }
GRADL1_EXPORT std::uint64_t gradl1_bytes_written(std::size_t i) { return watched.at(i).written; }
GRADL1_EXPORT std::uint64_t gradl1_widest(std::size_t i) { return watched.at(i).widest; }
GRADL1_EXPORT std::uint64_t gradl1_narrowest(std::size_t i) { return watched.at(i).narrowest; }
GRADL1_EXPORT void gradl1_watch_nothing() { watched.clear(); }

void __tsan_init() {}
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}
void __tsan_read_range(void* p, std::size_t bytes) { count<&Watched::read>(p, bytes); }
void __tsan_write_range(void* p, std::size_t bytes) { count<&Watched::written>(p, bytes); }

#define GRADL1_ACCESS(bytes)                                                               \
    void __tsan_read##bytes(void* p) { count<&Watched::read>(p, bytes); }                  \
    void __tsan_write##bytes(void* p) { count<&Watched::written>(p, bytes); }              \
    void __tsan_unaligned_read##bytes(const void* p) { count<&Watched::read>(p, bytes); }  \
    void __tsan_unaligned_write##bytes(void* p) { count<&Watched::written>(p, bytes); }
GRADL1_ACCESS(1)
GRADL1_ACCESS(2)
GRADL1_ACCESS(4)
GRADL1_ACCESS(8)
GRADL1_ACCESS(16)
}
