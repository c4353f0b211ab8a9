// Everything that Python hands over is checked here, so that no sweep can be made to leave its memory.
//
// A tensor arrives as (address, bytes) of dense memory, or None. It must be as large as the sizes of the
// call say, and aligned to its elements.
#pragma once

#include <pybind11/pybind11.h>

#include <stdexcept>
#include <string>

#include "engine.h"

namespace gradl1 {

namespace py = pybind11;

inline std::int64_t product(std::int64_t a, std::int64_t b) {
    std::int64_t result;
    if (a < 0 || b < 0 || __builtin_mul_overflow(a, b, &result)) throw py::value_error("a size is negative or too large");
    return result;
}

inline DType dtype_of(int tag) {
    if (tag < 0 || tag > 3) throw py::value_error("dtype tag " + std::to_string(tag) + " is not one of 0 to 3");
    return static_cast<DType>(tag);
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

// Address of `count` elements of `size` bytes; null for None, which only an optional tensor may be.
inline void* memory(const py::handle& span, const char* name, std::int64_t count, std::int64_t size, bool optional) {
    if (span.is_none()) {
        if (optional) return nullptr;
        throw py::value_error(std::string(name) + " is missing");
    }
    const auto pair = span.cast<py::tuple>();
    if (pair.size() != 2) throw py::value_error(std::string(name) + " must be (address, bytes)");
    const auto address = pair[0].cast<std::uintptr_t>();
    const auto bytes = pair[1].cast<std::int64_t>();
    if (bytes < product(count, size)) {
        throw py::value_error(std::string(name) + " has " + std::to_string(bytes) + " bytes, needs " +
                              std::to_string(product(count, size)));
    }
    if (count && !address) throw py::value_error(std::string(name) + " has no memory");
    if (address % static_cast<std::uintptr_t>(size)) throw py::value_error(std::string(name) + " is not aligned");
    return reinterpret_cast<void*>(address);
}

inline Activation activation_of(int tag) {
    if (tag < 0 || tag > 2) throw py::value_error("activation tag " + std::to_string(tag) + " is not one of 0 to 2");
    return static_cast<Activation>(tag);
}

// The computation runs without the interpreter's lock; an error becomes a Python exception.
template <class Pass, class Request>
void launch(Pass pass, const Request& request, Where where) {
    const py::gil_scoped_release released;
    pass(request, where);
}

template <class Pass, class Request>
void launch(Pass pass, const Request& request, const py::tuple& where) {
    launch(pass, request, Where{where[0].cast<std::int64_t>(), where[1].cast<std::int64_t>()});
}

// The arguments of one call: `tensor` in the type of the call, `vector` and `scalar` in that of its sums.
struct Arguments {
    DType dtype;
    Layout layout;

    void* tensor(const py::handle& s, const char* name) const {
        return memory(s, name, layout.numel(), size_of(dtype), false);
    }
    void* maybe_tensor(const py::handle& s, const char* name) const {
        return memory(s, name, layout.numel(), size_of(dtype), true);
    }
    void* vector(const py::handle& s, const char* name) const {
        return memory(s, name, layout.channels, size_of(sums_of(dtype)), false);
    }
    void* maybe_vector(const py::handle& s, const char* name) const {
        return memory(s, name, layout.channels, size_of(sums_of(dtype)), true);
    }
    void* scalar(const py::handle& s, const char* name) const {
        return memory(s, name, 1, size_of(sums_of(dtype)), false);
    }
    void* maybe_scalar(const py::handle& s, const char* name) const {
        return memory(s, name, 1, size_of(sums_of(dtype)), true);
    }
};

}  // namespace gradl1
