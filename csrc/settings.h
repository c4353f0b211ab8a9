// Settings of a pass, read from a dict by name. Each must be there, and no other.
#pragma once

#include <algorithm>
#include <vector>

#include "checks.h"

namespace gradl1 {

inline void set(bool& setting, const py::handle& value) { setting = value.cast<bool>(); }
inline void set(double& setting, const py::handle& value) { setting = value.cast<double>(); }
inline void set(DType& setting, const py::handle& value) { setting = dtype_of(value.cast<int>()); }
inline void set(Layout& setting, const py::handle& value) { setting = layout_of(value.cast<py::tuple>()); }
inline void set(Activation& setting, const py::handle& value) { setting = activation_of(value.cast<int>()); }

// The number of elements of each tensor, none of which is empty.
inline void set(std::vector<std::int64_t>& setting, const py::handle& value) {
    for (const py::handle& entry : value.cast<py::list>()) {
        const auto numel = layout_of(py::make_tuple(1, 1, entry)).inner;
        setting.push_back(numel);
    }
}

// A piece is (dtype, numel, x, v); v, which is paired with x, may be None.
inline void set(std::vector<Piece>& setting, const py::handle& value) {
    for (const py::handle& entry : value.cast<py::list>()) {
        const auto t = entry.cast<py::tuple>();
        if (t.size() != 4) throw py::value_error("a piece must be (dtype, numel, x, v)");
        const DType dtype = dtype_of(t[0].cast<int>());
        const Extent extent{t[1].cast<std::int64_t>(), size_of(dtype)};
        if (t[2].is_none()) throw py::value_error("x of a piece is missing");
        setting.push_back({dtype, extent.count, memory(t[2], "x", extent),
                           t[3].is_none() ? nullptr : memory(t[3], "v", extent)});
    }
}

class SettingsReader {
  public:
    explicit SettingsReader(const py::dict& given) : given_(given) {}

    template <class Setting>
    void operator()(const char* name, Setting& setting) {
        if (!given_.contains(name)) throw py::value_error(std::string("the setting ") + name + " is missing");
        const py::object value = given_[name];
        ++read_;
        try {
            set(setting, value);
        } catch (const py::cast_error&) {
            const auto shown = py::repr(value).cast<std::string>();
            throw py::type_error(std::string("the setting ") + name + " cannot be " + shown);
        }
    }

    void expect_no_more(const char* names) const {
        if (given_.size() != read_) throw py::value_error(std::string("the settings are") + names + ", and no others");
    }

  private:
    const py::dict& given_;
    std::size_t read_ = 0;
};

#define GRADL1_READ_SETTING(name) read(#name, target.name);
#define GRADL1_NAME_SETTING(name) " " #name
#define GRADL1_DEFINE_READ_SETTINGS(Request, Target)                  \
    inline void read_settings(const py::dict& given, Target& target) { \
        SettingsReader read(given);                                   \
        GRADL1_SETTINGS_##Request(GRADL1_READ_SETTING)                \
        read.expect_no_more(GRADL1_SETTINGS_##Request(GRADL1_NAME_SETTING)); \
    }

struct L1Settings {  // which own the pieces
    std::vector<Piece> pieces;
    bool wide;
};

struct TapsSettings {
    DType dtype;
    std::vector<std::int64_t> numels;
};

GRADL1_DEFINE_READ_SETTINGS(Tap, Tap)
GRADL1_DEFINE_READ_SETTINGS(Taps, TapsSettings)
GRADL1_DEFINE_READ_SETTINGS(FakeQuantize, FakeQuantize)
GRADL1_DEFINE_READ_SETTINGS(L1Norm, L1Settings)
GRADL1_DEFINE_READ_SETTINGS(BatchNormAct, BatchNormAct)

#undef GRADL1_READ_SETTING
#undef GRADL1_NAME_SETTING
#undef GRADL1_DEFINE_READ_SETTINGS

inline void check_settings(const Tap&) {}
inline void check_settings(const FakeQuantize&) {}
inline void check_settings(const BatchNormAct& r) {
    if (r.quantized && r.with_ends) throw py::value_error("with_ends and quantized exclude each other");
}

// A request with its settings and without its memory; it owns what the settings point to.
template <class Request>
struct Prepared {
    const Engine& engine;
    Request request{};

    Prepared(const Engine& e, const py::dict& settings) : engine(e) {
        read_settings(settings, request);
        check_settings(request);
        request.scratch_bytes = e.scratch_bytes(request.layout);
    }
};

template <>
struct Prepared<Taps> {
    const Engine& engine;
    TapsSettings settings{};
    Taps request{};

    Prepared(const Engine& e, const py::dict& given) : engine(e) {
        read_settings(given, settings);
        request.dtype = settings.dtype, request.numels = settings.numels.data();
        request.count = static_cast<std::int64_t>(settings.numels.size());
        for (const std::int64_t numel : settings.numels) {
            request.scratch_bytes = std::max(request.scratch_bytes, e.scratch_bytes({1, 1, numel}));
        }
    }
    Prepared(const Prepared&) = delete;  // the request points into the settings
    Prepared& operator=(const Prepared&) = delete;
};

template <>
struct Prepared<L1Norm> {
    const Engine& engine;
    L1Settings settings{};
    L1Norm request{};

    Prepared(const Engine& e, const py::dict& given) : engine(e) {
        read_settings(given, settings);
        request.pieces = settings.pieces.data(), request.wide = settings.wide;
        request.count = static_cast<std::int64_t>(settings.pieces.size());
        request.scratch_bytes = e.l1_scratch_bytes(request.pieces, request.count);
    }
    Prepared(const Prepared&) = delete;  // the request points into the settings
    Prepared& operator=(const Prepared&) = delete;
};

}  // namespace gradl1
