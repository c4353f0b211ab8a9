// The memory of a pass, read by name as the table of passes says.
//
// It comes as spans, (address, bytes), whose sizes are checked, or as bare addresses, for whose sizes the
// caller vouches. Either way what must be there is, and is aligned.
#pragma once

#include <array>
#include <cstring>
#include <memory>

#include "settings.h"

namespace gradl1 {

using Address = std::uintptr_t;

enum class Presence { needed, optional, unused, refused, own_on_host };

struct Field {
    const char* name;
    std::size_t index;  // among the fields of its pass
    Extent extent;
    Presence presence;
};

// What the table of passes says of a field.
namespace table {

constexpr Presence needed = Presence::needed, optional = Presence::optional, refused = Presence::refused,
                   own_on_host = Presence::own_on_host;

constexpr Presence needed_if(bool condition) { return condition ? Presence::needed : Presence::unused; }

template <class Request>
Extent sums(const Request& r, std::int64_t count) {
    return {count, size_of(sums_of(r.dtype))};
}

template <class Request>
Extent tensor(const Request& r) {
    return {r.layout.numel(), size_of(r.dtype)};
}

template <class Request>
Extent vector(const Request& r) {
    return sums(r, r.layout.channels);
}

template <class Request>
Extent scalar(const Request& r) {
    return sums(r, 1);
}

template <class Request>
Extent ends(const Request& r) {  // low, high and their counts
    return sums(r, 4);
}

template <class Request>
Extent ends_gradient(const Request& r) {
    return sums(r, 2);
}

template <class Request>
Extent scratch(const Request& r) {
    return {r.scratch_bytes / 8, 8};
}

inline Extent addresses(const Taps& r) { return {r.count, sizeof(Address)}; }
inline Extent all_ends(const Taps& r) { return sums(r, 4 * r.count); }
inline Extent all_ends_gradients(const Taps& r) { return sums(r, 2 * r.count); }
inline Extent norms(const L1Norm& r) { return {r.count, r.wide ? 8 : 4}; }

}  // namespace table

// Memory of the calling thread, as large as its largest call: two threads may call one pass.
inline void* scratch_of_thread(std::int64_t bytes) {
    static thread_local std::unique_ptr<double[]> room;
    static thread_local std::int64_t size = 0;
    const std::int64_t wanted = bytes / 8 + 1;
    if (size < wanted) room.reset(new double[static_cast<std::size_t>(wanted)]), size = wanted;
#if defined(GRADL1_EMULATED)
    std::memset(room.get(), 0xff, static_cast<std::size_t>(wanted) * 8);  // for tests: NaN
#endif
    return room.get();
}

// What stands for a field that is not given.
inline void* absent(const Field& field, bool in_host_memory) {
    if (field.presence == Presence::own_on_host && in_host_memory) {
        return scratch_of_thread(field.extent.count * field.extent.size);
    }
    if (field.presence == Presence::needed || field.presence == Presence::own_on_host) {
        throw py::value_error(std::string(field.name) + " is missing");
    }
    return nullptr;
}

inline void expect_accepted(const Field& field) {
    if (field.presence == Presence::refused) {
        throw py::value_error(std::string(field.name) + " must be absent with these settings");
    }
}

// Fields given as spans in a dict; None is absent.
class Spans {
  public:
    Spans(const py::dict& given, bool in_host_memory) : given_(given), in_host_memory_(in_host_memory) {}

    void* take(const Field& field) const {
        if (field.presence == Presence::unused) return nullptr;
        const py::object span = given_.contains(field.name) ? py::object(given_[field.name]) : py::none();
        if (span.is_none()) return absent(field, in_host_memory_);
        expect_accepted(field);
        return memory(span, field.name, field.extent);
    }

  private:
    const py::dict& given_;
    bool in_host_memory_;
};

// Fields given as addresses in the order of the table; 0 is absent.
class Addresses {
  public:
    Addresses(const Address* given, bool in_host_memory) : given_(given), in_host_memory_(in_host_memory) {}

    void* take(const Field& field) const {
        if (field.presence == Presence::unused) return nullptr;
        const Address address = given_[field.index];
        if (!address) return absent(field, in_host_memory_);
        expect_accepted(field);
        return at_address(address, field.name, field.extent);
    }

  private:
    const Address* given_;
    bool in_host_memory_;
};

// Each pass as a type: its names, its function in an engine, and how its fields are read.
namespace pass {

#define GRADL1_NAME_FIELD(field, extent, presence) #field,
#define GRADL1_READ_FIELD(field, extent, presence) r.field = source.take({#field, i++, extent(r), presence});
#define GRADL1_PASS(pass, RequestOfPass)                                                             \
    struct pass {                                                                                    \
        using Request = RequestOfPass;                                                               \
        static constexpr const char* name = #pass;                                                   \
        static constexpr auto function = &Engine::pass;                                              \
        static constexpr std::array fields = {GRADL1_FIELDS_##pass(GRADL1_NAME_FIELD)};              \
                                                                                                     \
        template <class Source>                                                                      \
        static void read(Request& r, const Source& source) {                                         \
            using namespace table;                                                                   \
            std::size_t i = 0;                                                                       \
            GRADL1_FIELDS_##pass(GRADL1_READ_FIELD)                                                  \
        }                                                                                            \
    };
GRADL1_PASSES(GRADL1_PASS)
#undef GRADL1_PASS
#undef GRADL1_READ_FIELD
#undef GRADL1_NAME_FIELD

}  // namespace pass

// What a pass asks of memory that it finds by addresses in its memory; in every call, so without Python objects.
template <class Request>
void check_addresses(const Request&) {}

template <>
inline void check_addresses<Taps>(const Taps& r) {
    for (std::int64_t i = 0; i < r.count; ++i) {
        const Extent needed{r.numels[i], size_of(r.dtype)}, optional{0, needed.size};
        at_address(reinterpret_cast<Address>(at(r.x, i)), "x", needed);
        at_address(reinterpret_cast<Address>(at(r.dy, i)), "dy", optional);
        at_address(reinterpret_cast<Address>(at(r.total, i)), "total", r.total ? needed : optional);
    }
}

// What a pass asks of its settings beyond their types.
template <class Pass>
void check_pass(const typename Pass::Request&) {}

template <>
inline void check_pass<pass::l1_norm_backward>(const L1Norm& r) {
    for (std::int64_t i = 0; i < r.count; ++i) {
        if (r.pieces[i].numel && !r.pieces[i].v) throw py::value_error("a piece has nowhere to put its gradient");
    }
}

}  // namespace gradl1
