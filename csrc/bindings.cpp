// The Python module: names, checks, and nothing else. It knows no torch.
#include <pybind11/pybind11.h>

#include <cmath>
#include <vector>

#include "checks.h"
#include "engine.h"
#include "engines.h"
#include "host/binding.h"
#include "prepared.h"

namespace gradl1 {
namespace {

using Obj = const py::object&;

void define_tap(py::module_& m, const Engine& e) {
    m.def("tap_backward", [&e](const py::tuple& where, int dtype, std::int64_t numel, Obj dy, Obj l1, Obj scratch) {
        const Arguments a{dtype_of(dtype), layout_of(py::make_tuple(1, 1, numel))};
        Tap r{};
        r.dtype = a.dtype, r.layout = a.layout, r.dy = a.tensor(dy, "dy"), r.l1 = a.scalar(l1, "l1");
        r.scratch = memory(scratch, "scratch", e.scratch_bytes(a.layout) / 8, 8, false);
        launch(e.tap_backward, r, where);
    });
    m.def("tap_double_backward", [&e](const py::tuple& where, int dtype, std::int64_t numel, Obj d_dx, Obj d_l1, Obj dy,
                                      Obj out) {
        const Arguments a{dtype_of(dtype), layout_of(py::make_tuple(1, 1, numel))};
        Tap r{};
        r.dtype = a.dtype, r.layout = a.layout;
        r.d_dx = a.maybe_tensor(d_dx, "d_dx"), r.d_l1 = a.scalar(d_l1, "d_l1");
        r.dy = a.tensor(dy, "dy"), r.out = a.tensor(out, "out");
        launch(e.tap_double_backward, r, where);
    });
}

FakeQuantize grid(const Arguments& a, const Engine& e, const py::tuple& grid, Obj scratch) {
    if (grid.size() != 4) throw py::value_error("grid must be (scale, zero_point, q_min, q_max)");
    FakeQuantize r{};
    r.dtype = a.dtype, r.layout = a.layout;
    r.scale = a.vector(grid[0], "scale"), r.zero_point = a.vector(grid[1], "zero_point");
    r.code_min = grid[2].cast<double>(), r.code_max = grid[3].cast<double>();
    r.scratch = memory(scratch, "scratch", e.scratch_bytes(a.layout) / 8, 8, false);
    return r;
}

void define_fake_quantize(py::module_& m, const Engine& e) {
    m.def("fake_quantize_forward", [&e](const py::tuple& where, int dtype, const py::tuple& layout,
                                        const py::tuple& codes, Obj x, Obj out, Obj scratch) {
        const Arguments a{dtype_of(dtype), layout_of(layout)};
        FakeQuantize r = grid(a, e, codes, scratch);
        r.x = a.tensor(x, "x"), r.out = a.tensor(out, "out");
        launch(e.fake_quantize_forward, r, where);
    });
    m.def("fake_quantize_backward", [&e](const py::tuple& where, int dtype, const py::tuple& layout,
                                         const py::tuple& codes, Obj dy, Obj x, Obj out, Obj l1, Obj scratch) {
        const Arguments a{dtype_of(dtype), layout_of(layout)};
        FakeQuantize r = grid(a, e, codes, scratch);
        r.dy = a.tensor(dy, "dy"), r.x = a.tensor(x, "x"), r.out = a.tensor(out, "out");
        r.l1 = a.maybe_scalar(l1, "l1");
        launch(e.fake_quantize_backward, r, where);
    });
    m.def("fake_quantize_double_backward",
          [&e](const py::tuple& where, int dtype, const py::tuple& layout, const py::tuple& codes, Obj d_dx, Obj d_l1,
               Obj dy, Obj x, Obj out, Obj scratch) {
              const Arguments a{dtype_of(dtype), layout_of(layout)};
              FakeQuantize r = grid(a, e, codes, scratch);
              r.d_dx = a.maybe_tensor(d_dx, "d_dx");
              r.d_l1 = r.d_dx ? a.maybe_scalar(d_l1, "d_l1") : a.scalar(d_l1, "d_l1");
              r.dy = a.tensor(dy, "dy"), r.x = a.tensor(x, "x"), r.out = a.tensor(out, "out");
              launch(e.fake_quantize_double_backward, r, where);
          });
}

// A piece is (dtype, numel, x) with a fourth entry for what the sweep pairs with x.
std::vector<Piece> pieces_of(const py::list& list) {
    std::vector<Piece> pieces;
    for (const py::handle& entry : list) {
        const auto t = entry.cast<py::tuple>();
        if (t.size() != 4) throw py::value_error("a piece must be (dtype, numel, x, v)");
        const DType dtype = dtype_of(t[0].cast<int>());
        const auto numel = t[1].cast<std::int64_t>();
        pieces.push_back({dtype, numel, memory(t[2], "x", numel, size_of(dtype), false),
                          memory(t[3], "v", numel, size_of(dtype), true)});
    }
    return pieces;
}

L1Norm norms(const std::vector<Piece>& pieces, bool wide) {
    return {pieces.data(), static_cast<std::int64_t>(pieces.size()), wide, nullptr, nullptr, nullptr};
}

void define_l1_norm(py::module_& m, const Engine& e) {
    m.def("l1_norm", [&e](const py::tuple& where, const py::list& list, bool wide, Obj out, Obj scratch) {
        const auto pieces = pieces_of(list);
        L1Norm r = norms(pieces, wide);
        r.out = memory(out, "out", r.count, wide ? 8 : 4, false);
        r.scratch = memory(scratch, "scratch", e.l1_scratch_bytes(r.pieces, r.count) / 8, 8, false);
        launch(e.l1_norm, r, where);
    });
    m.def("l1_norm_scratch_bytes", [&e](const py::list& list) {
        const auto pieces = pieces_of(list);
        return e.l1_scratch_bytes(pieces.data(), static_cast<std::int64_t>(pieces.size()));
    });
    // v of a piece is where its gradient goes.
    m.def("l1_norm_backward", [&e](const py::tuple& where, const py::list& list, bool wide, Obj dy) {
        const auto pieces = pieces_of(list);
        for (const Piece& piece : pieces) {
            if (piece.numel && !piece.v) throw py::value_error("a piece has nowhere to put its gradient");
        }
        L1Norm r = norms(pieces, wide);
        r.dy = memory(dy, "dy", r.count, wide ? 8 : 4, false);
        launch(e.l1_norm_backward, r, where);
    });
}

// mean, rstd, weight, bias
void set_channels(BatchNormAct& r, const Arguments& a, const py::tuple& v) {
    if (v.size() != 4) throw py::value_error("vectors must be (mean, rstd, weight, bias)");
    r.mean = a.maybe_vector(v[0], "mean"), r.rstd = a.maybe_vector(v[1], "rstd");
    r.weight = a.maybe_vector(v[2], "weight"), r.bias = a.maybe_vector(v[3], "bias");
}

// scale, zero_point, q_min, q_max; the scale is None without a quantizer
void set_grid(BatchNormAct& r, const Arguments& a, const py::tuple& grid) {
    if (grid.size() != 4) throw py::value_error("grid must be (scale, zero_point, q_min, q_max)");
    r.scale = a.maybe_scalar(grid[0], "scale");
    r.zero_point = r.scale ? a.scalar(grid[1], "zero_point") : nullptr;
    r.code_min = grid[2].cast<double>(), r.code_max = grid[3].cast<double>();
}

// training, with_residual, activation, eps
BatchNormAct normalisation(const Arguments& a, const Engine& e, const py::tuple& options, const py::tuple& vectors,
                           const py::tuple& grid, Obj scratch) {
    if (options.size() != 4) throw py::value_error("options must be (training, with_residual, activation, eps)");
    BatchNormAct r{};
    r.dtype = a.dtype, r.layout = a.layout;
    r.training = options[0].cast<bool>(), r.with_residual = options[1].cast<bool>();
    r.activation = activation_of(options[2].cast<int>()), r.eps = options[3].cast<double>();
    set_channels(r, a, vectors);
    set_grid(r, a, grid);
    r.scratch = memory(scratch, "scratch", e.scratch_bytes(a.layout) / 8, 8, false);
    return r;
}

void require_statistics(const BatchNormAct& r) {
    if (!r.mean || !r.rstd) throw py::value_error("mean and rstd are missing");
}

// The mask comes from the output of the activation exactly where a residual was added before it.
const void* mask_source(const BatchNormAct& r, const Arguments& a, Obj activated) {
    return r.with_residual && r.masks() ? a.tensor(activated, "activated") : nullptr;
}

void define_batch_norm_act(py::module_& m, const Engine& e) {
    m.def("batch_norm_act_forward",
          [&e](const py::tuple& where, int dtype, const py::tuple& layout, const py::tuple& options,
               const py::tuple& vectors, const py::tuple& grid, Obj x, Obj residual, const py::tuple& results,
               Obj scratch) {
              const Arguments a{dtype_of(dtype), layout_of(layout)};
              BatchNormAct r = normalisation(a, e, options, vectors, grid, scratch);
              if (results.size() != 4) throw py::value_error("results must be (y, activated, mean, rstd)");
              if (!r.training) require_statistics(r);
              r.x = a.tensor(x, "x"), r.residual = a.maybe_tensor(residual, "residual");
              r.out = a.tensor(results[0], "y");
              if (r.residual && r.scale) r.out2 = a.tensor(results[1], "activated");
              r.out_mean = a.vector(results[2], "mean"), r.out_rstd = a.vector(results[3], "rstd");
              launch(e.batch_norm_act_forward, r, where);
          });
    m.def("batch_norm_act_backward",
          [&e](const py::tuple& where, int dtype, const py::tuple& layout, const py::tuple& options,
               const py::tuple& vectors, const py::tuple& grid, Obj dy, Obj x, Obj activated,
               const py::tuple& results, Obj scratch) {
              const Arguments a{dtype_of(dtype), layout_of(layout)};
              BatchNormAct r = normalisation(a, e, options, vectors, grid, scratch);
              require_statistics(r);
              if (results.size() != 5) throw py::value_error("results must be (dx, dweight, dbias, dresidual, l1)");
              r.dy = a.tensor(dy, "dy"), r.x = a.tensor(x, "x"), r.activated = mask_source(r, a, activated);
              r.out = a.tensor(results[0], "dx");
              r.dweight = a.vector(results[1], "dweight"), r.dbias = a.vector(results[2], "dbias");
              if (r.activated) r.out2 = a.tensor(results[3], "dresidual");
              r.l1 = a.maybe_scalar(results[4], "l1");
              launch(e.batch_norm_act_backward, r, where);
          });
    m.def("batch_norm_act_double_backward",
          [&e](const py::tuple& where, int dtype, const py::tuple& layout, const py::tuple& options,
               const py::tuple& vectors, const py::tuple& grid, const py::tuple& cotangents, Obj dy, Obj x,
               Obj activated, const py::tuple& results, Obj scratch) {
              const Arguments a{dtype_of(dtype), layout_of(layout)};
              BatchNormAct r = normalisation(a, e, options, vectors, grid, scratch);
              require_statistics(r);
              if (cotangents.size() != 5 || results.size() != 3) throw py::value_error("5 cotangents, 3 results");
              r.d_dx = a.tensor(cotangents[0], "d_dx");
              r.d_dweight = a.maybe_vector(cotangents[1], "d_dweight");
              r.d_dbias = a.maybe_vector(cotangents[2], "d_dbias");
              r.dy = a.tensor(dy, "dy"), r.x = a.tensor(x, "x"), r.activated = mask_source(r, a, activated);
              if (r.activated) r.d_dresidual = a.maybe_tensor(cotangents[3], "d_dresidual");
              r.d_l1 = a.maybe_scalar(cotangents[4], "d_l1");
              r.out = a.tensor(results[0], "d_dy"), r.out2 = a.tensor(results[1], "d_x");
              r.dweight = a.vector(results[2], "d_weight");
              launch(e.batch_norm_act_double_backward, r, where);
          });
}

void define_engine(py::module_ m, const Engine& e) {
    m.def("scratch_bytes", [&e](const py::tuple& layout) { return e.scratch_bytes(layout_of(layout)); });
    define_tap(m, e);
    define_fake_quantize(m, e);
    define_l1_norm(m, e);
    define_batch_norm_act(m, e);
    define_prepared(m, e);
}

}  // namespace
}  // namespace gradl1

PYBIND11_MODULE(_gradl1, m) {
    using namespace gradl1;
    m.attr("sources") = GRADL1_SOURCES;
    m.attr("compiler") = GRADL1_COMPILER;
    m.attr("cuda_compiler") = GRADL1_CUDA_COMPILER;
    m.attr("cuda_architectures") = GRADL1_CUDA_ARCHITECTURES;
    define_classes(m);
#if defined(GRADL1_HAS_HOST)
    define_engine(m.def_submodule("host"), host_engine());
    define_host(m);
#endif
#if defined(GRADL1_HAS_CUDA)
    define_engine(m.def_submodule("cuda"), cuda_engine());
#endif
}
