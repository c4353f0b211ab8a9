// Operations prepared once for a shape: type, sizes and options are checked there, calls take addresses.
//
// An address is 0 where there is nothing. Behind it lies memory as large as the sizes say, in the types of
// requests.h, which whoever calls vouches for; a call checks what is missing or not aligned.
#pragma once

#include <cstring>
#include <memory>

#include "checks.h"

namespace gradl1 {

using Address = std::uintptr_t;

// Memory of the calling thread, as large as its largest call: two threads may call one object.
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

template <class Request>
class Prepared {
  public:
    Prepared(const Engine& engine, int dtype, const Layout& layout)
        : engine_(engine), bytes_(engine.scratch_bytes(layout)) {
        request_.dtype = dtype_of(dtype), request_.layout = layout;
        tensors_ = static_cast<Address>(size_of(request_.dtype)) - 1;
        vectors_ = static_cast<Address>(size_of(sums_of(request_.dtype))) - 1;
    }

    // Bytes of scratch that a call wants; 0 where it has its own.
    std::int64_t scratch_bytes() const { return engine_.in_host_memory ? 0 : bytes_; }

  protected:
    void* maybe_tensor(Address a, const char* name) const { return checked(a, name, tensors_); }
    void* tensor(Address a, const char* name) const { return maybe_tensor(required(a, name), name); }
    void* maybe_vector(Address a, const char* name) const { return checked(a, name, vectors_); }
    void* vector(Address a, const char* name) const { return maybe_vector(required(a, name), name); }

    void* scratch(Address a) const {
        if (engine_.in_host_memory) return scratch_of_thread(bytes_);
        return checked(required(a, "scratch"), "scratch", 7);
    }

    const Engine& engine_;
    Request request_{};

  private:
    static void* checked(Address a, const char* name, Address mask) {
        if (a & mask) throw py::value_error(std::string(name) + " is not aligned");
        return reinterpret_cast<void*>(a);
    }

    static Address required(Address a, const char* name) {
        if (!a) throw py::value_error(std::string(name) + " is missing");
        return a;
    }

    std::int64_t bytes_;
    Address tensors_, vectors_;
};

class PreparedTap : public Prepared<Tap> {
  public:
    PreparedTap(const Engine& e, int dtype, std::int64_t numel)
        : Prepared(e, dtype, layout_of(py::make_tuple(1, 1, numel))) {}

    void ends(Where where, Address room, Address x, Address ends) const {
        Tap r = request_;
        r.x = tensor(x, "x"), r.out_ends = vector(ends, "ends"), r.scratch = scratch(room);
        launch(engine_.tap_ends, r, where);
    }

    void backward(Where where, Address room, Address dy, Address l1) const {
        Tap r = request_;
        r.dy = tensor(dy, "dy"), r.l1 = vector(l1, "l1"), r.scratch = scratch(room);
        launch(engine_.tap_backward, r, where);
    }

    void double_backward(Where where, Address d_dx, Address d_l1, Address dy, Address d_dy) const {
        Tap r = request_;
        r.d_dx = maybe_tensor(d_dx, "d_dx"), r.d_l1 = vector(d_l1, "d_l1");
        r.dy = tensor(dy, "dy"), r.out = tensor(d_dy, "d_dy");
        launch(engine_.tap_double_backward, r, where);
    }

    void add_ends_gradient(
        Where where, Address room, Address dy, Address x, Address ends, Address d_ends, Address total
    ) const {
        Tap r = request_;
        r.scratch = scratch(room);
        r.dy = maybe_tensor(dy, "dy"), r.x = tensor(x, "x"), r.out = tensor(total, "total");
        r.ends = vector(ends, "ends"), r.d_ends = vector(d_ends, "d_ends");
        launch(engine_.tap_add_ends_gradient, r, where);
    }
};

class PreparedFakeQuantize : public Prepared<FakeQuantize> {
  public:
    PreparedFakeQuantize(const Engine& e, int dtype, std::int64_t numel, double code_min, double code_max)
        : Prepared(e, dtype, layout_of(py::make_tuple(1, 1, numel))) {
        request_.code_min = code_min, request_.code_max = code_max;
    }

    void forward(Where where, Address room, Address x, Address scale, Address zero_point, Address y) const {
        FakeQuantize r = with_grid(room, scale, zero_point);
        r.x = tensor(x, "x"), r.out = tensor(y, "y");
        launch(engine_.fake_quantize_forward, r, where);
    }

    void backward(
        Where where, Address room, Address dy, Address x, Address scale, Address zero_point, Address dx, Address l1
    ) const {
        FakeQuantize r = with_grid(room, scale, zero_point);
        r.dy = tensor(dy, "dy"), r.x = tensor(x, "x"), r.out = tensor(dx, "dx"), r.l1 = maybe_vector(l1, "l1");
        launch(engine_.fake_quantize_backward, r, where);
    }

    void double_backward(
        Where where, Address room, Address d_dx, Address d_l1, Address dy, Address x, Address scale, Address zero_point,
        Address d_dy
    ) const {
        FakeQuantize r = with_grid(room, scale, zero_point);
        r.d_dx = maybe_tensor(d_dx, "d_dx");
        r.d_l1 = d_dx ? maybe_vector(d_l1, "d_l1") : vector(d_l1, "d_l1");
        r.dy = tensor(dy, "dy"), r.x = tensor(x, "x"), r.out = tensor(d_dy, "d_dy");
        launch(engine_.fake_quantize_double_backward, r, where);
    }

  private:
    FakeQuantize with_grid(Address room, Address scale, Address zero_point) const {
        FakeQuantize r = request_;
        r.scale = vector(scale, "scale"), r.zero_point = vector(zero_point, "zero_point"), r.scratch = scratch(room);
        return r;
    }
};

class PreparedBatchNormAct : public Prepared<BatchNormAct> {
  public:
    PreparedBatchNormAct(
        const Engine& e, int dtype, const py::tuple& layout, bool training, double eps, int activation,
        bool with_residual, const py::object& codes, bool with_ends
    )
        : Prepared(e, dtype, layout_of(layout)), quantized_(!codes.is_none()), with_ends_(with_ends) {
        request_.training = training, request_.eps = eps, request_.activation = activation_of(activation);
        request_.with_residual = with_residual;
        if (quantized_ && with_ends) throw py::value_error("ends are of y without a grid");
        if (!quantized_) return;
        const auto pair = codes.cast<py::tuple>();
        if (pair.size() != 2) throw py::value_error("codes must be (q_min, q_max)");
        request_.code_min = pair[0].cast<double>(), request_.code_max = pair[1].cast<double>();
    }

    // mean, var: the running ones, in evaluation.
    void forward(
        Where where, Address room, Address x, Address weight, Address bias, Address mean, Address var, Address residual,
        Address scale, Address zero_point, Address y, Address activated, Address out_mean, Address out_rstd,
        Address ends
    ) const {
        BatchNormAct r = with_channels(room, x, weight, bias, scale, zero_point);
        if (!r.training) r.mean = vector(mean, "mean"), r.rstd = vector(var, "var");
        if (r.with_residual) r.residual = tensor(residual, "residual");
        r.out = tensor(y, "y");
        if (r.with_residual && quantized_) r.out2 = tensor(activated, "activated");
        r.out_mean = vector(out_mean, "out_mean"), r.out_rstd = vector(out_rstd, "out_rstd");
        if (with_ends_) r.out_ends = vector(ends, "ends");
        launch(engine_.batch_norm_act_forward, r, where);
    }

    void backward(
        Where where, Address room, Address dy, Address x, Address activated, Address weight, Address bias, Address mean,
        Address rstd, Address scale, Address zero_point, Address ends, Address d_ends, Address dx, Address dweight,
        Address dbias, Address dresidual, Address l1
    ) const {
        BatchNormAct r = with_channels(room, x, weight, bias, scale, zero_point);
        set_saved(r, dy, activated, mean, rstd, d_ends);
        if (d_ends && quantized_) throw py::value_error("ends are of y without a grid");
        if (d_ends) r.d_ends = vector(d_ends, "d_ends"), r.ends = vector(ends, "ends");
        r.out = tensor(dx, "dx"), r.dweight = vector(dweight, "dweight"), r.dbias = vector(dbias, "dbias");
        if (r.activated) r.out2 = tensor(dresidual, "dresidual");
        r.l1 = maybe_vector(l1, "l1");
        launch(engine_.batch_norm_act_backward, r, where);
    }

    void double_backward(
        Where where, Address room, Address d_dx, Address d_dweight, Address d_dbias, Address d_dresidual, Address d_l1,
        Address dy, Address x, Address activated, Address weight, Address bias, Address mean, Address rstd,
        Address scale, Address zero_point, Address d_dy, Address d_x, Address d_weight
    ) const {
        BatchNormAct r = with_channels(room, x, weight, bias, scale, zero_point);
        set_saved(r, dy, activated, mean, rstd, 0);
        r.d_dx = tensor(d_dx, "d_dx");
        r.d_dweight = maybe_vector(d_dweight, "d_dweight"), r.d_dbias = maybe_vector(d_dbias, "d_dbias");
        if (r.activated) r.d_dresidual = maybe_tensor(d_dresidual, "d_dresidual");
        r.d_l1 = maybe_vector(d_l1, "d_l1");
        r.out = tensor(d_dy, "d_dy"), r.out2 = tensor(d_x, "d_x"), r.dweight = vector(d_weight, "d_weight");
        launch(engine_.batch_norm_act_double_backward, r, where);
    }

  private:
    BatchNormAct with_channels(
        Address room, Address x, Address weight, Address bias, Address scale, Address zero_point
    ) const {
        BatchNormAct r = request_;
        r.scratch = scratch(room), r.x = tensor(x, "x");
        r.weight = maybe_vector(weight, "weight"), r.bias = maybe_vector(bias, "bias");
        if (quantized_) r.scale = vector(scale, "scale"), r.zero_point = vector(zero_point, "zero_point");
        return r;
    }

    // The mask comes from the output of the activation exactly where a residual was added before it.
    void set_saved(BatchNormAct& r, Address dy, Address activated, Address mean, Address rstd, Address d_ends) const {
        r.dy = tensor(dy, "dy"), r.mean = vector(mean, "mean"), r.rstd = vector(rstd, "rstd");
        if (r.with_residual && (r.masks() || d_ends)) r.activated = tensor(activated, "activated");
    }

    bool quantized_, with_ends_;
};

// A method that takes where to run as its first two arguments.
template <class Class, class... Arguments>
auto method(void (Class::*call)(Where, Arguments...) const) {
    return [call](const Class& self, std::int64_t first, std::int64_t second, Arguments... arguments) {
        (self.*call)({first, second}, arguments...);
    };
}

// How one half of the extension prepares.
inline void define_prepared(py::module_& m, const Engine& e) {
    using T = PreparedTap;
    m.def("prepare_tap", [&e](int dtype, std::int64_t numel) { return T(e, dtype, numel); });
    using Q = PreparedFakeQuantize;
    m.def("prepare_fake_quantize", [&e](int dtype, std::int64_t numel, double code_min, double code_max) {
        return Q(e, dtype, numel, code_min, code_max);
    });
    using B = PreparedBatchNormAct;
    m.def("prepare_batch_norm_act", [&e](int dtype, const py::tuple& layout, bool training, double eps, int activation,
                                         bool with_residual, const py::object& codes, bool with_ends) {
        return B(e, dtype, layout, training, eps, activation, with_residual, codes, with_ends);
    });
}

// Once for host and device.
inline void define_classes(py::module_& m) {
    using T = PreparedTap;
    py::class_<T>(m, "Tap", py::module_local())
        .def_property_readonly("scratch_bytes", &T::scratch_bytes)
        .def("ends", method(&T::ends))
        .def("backward", method(&T::backward))
        .def("double_backward", method(&T::double_backward))
        .def("add_ends_gradient", method(&T::add_ends_gradient));
    using Q = PreparedFakeQuantize;
    py::class_<Q>(m, "FakeQuantize", py::module_local())
        .def_property_readonly("scratch_bytes", &Q::scratch_bytes)
        .def("forward", method(&Q::forward))
        .def("backward", method(&Q::backward))
        .def("double_backward", method(&Q::double_backward));
    using B = PreparedBatchNormAct;
    py::class_<B>(m, "BatchNormAct", py::module_local())
        .def_property_readonly("scratch_bytes", &B::scratch_bytes)
        .def("forward", method(&B::forward))
        .def("backward", method(&B::backward))
        .def("double_backward", method(&B::double_backward));
}

}  // namespace gradl1
