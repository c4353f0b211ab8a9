// Checks of what Python hands over, so that no pass can be made to leave its memory.
#pragma once

#include <pybind11/pybind11.h>

#include <string>

#include "engine.h"

namespace gradl1 {

namespace py = pybind11;

inline std::int64_t product(std::int64_t a, std::int64_t b) {
    std::int64_t result;
    if (a < 0 || b < 0 || __builtin_mul_overflow(a, b, &result)) {
        throw py::value_error("a size is negative or too large");
    }
    return result;
}

inline DType dtype_of(int tag) {
    if (tag < 0 || tag > 3) throw py::value_error("dtype tag " + std::to_string(tag) + " is not one of 0 to 3");
    return static_cast<DType>(tag);
}

inline Activation activation_of(int tag) {
    if (tag < 0 || tag > 2) throw py::value_error("activation tag " + std::to_string(tag) + " is not one of 0 to 2");
    return static_cast<Activation>(tag);
}

inline std::int64_t size_of(DType dtype) {
    return dtype == DType::float64 ? 8 : dtype == DType::float32 ? 4 : 2;
}

inline DType sums_of(DType dtype) { return dtype == DType::float64 ? DType::float64 : DType::float32; }

inline Layout layout_of(const py::tuple& sizes) {
    if (sizes.size() != 3) throw py::value_error("layout must be (outer, channels, inner)");
    const Layout t{sizes[0].cast<std::int64_t>(), sizes[1].cast<std::int64_t>(), sizes[2].cast<std::int64_t>()};
    // 16: bytes of an element with room for offsets past the end.
    product(product(product(t.outer, t.channels), t.inner), 16);
    if (t.numel() == 0) throw py::value_error("layout has no elements");
    return t;
}

// How many elements memory must hold, and the bytes of each.
struct Extent {
    std::int64_t count, size;
};

// The memory at an address, which must be there and aligned to its elements.
inline void* at_address(std::uintptr_t address, const char* name, Extent extent) {
    if (extent.count && !address) throw py::value_error(std::string(name) + " has no memory");
    if (address % static_cast<std::uintptr_t>(extent.size)) {
        throw py::value_error(std::string(name) + " is not aligned");
    }
    return reinterpret_cast<void*>(address);
}

// The address of memory given as (address, bytes), which must be as large as its extent and aligned to its elements.
inline void* memory(const py::handle& span, const char* name, Extent extent) {
    const auto pair = span.cast<py::tuple>();
    if (pair.size() != 2) throw py::value_error(std::string(name) + " must be (address, bytes)");
    const auto address = pair[0].cast<std::uintptr_t>();
    const auto bytes = pair[1].cast<std::int64_t>(), wanted = product(extent.count, extent.size);
    if (bytes < wanted) {
        throw py::value_error(std::string(name) + " has " + std::to_string(bytes) + " bytes, needs " +
                              std::to_string(wanted));
    }
    return at_address(address, name, extent);
}

// The computation runs without the interpreter's lock; an error becomes a Python exception.
template <class Pass, class Request>
void launch(Pass pass, const Request& request, Where where) {
    const py::gil_scoped_release released;
    pass(request, where);
}

}  // namespace gradl1
