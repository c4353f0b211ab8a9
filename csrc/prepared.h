// Passes prepared once: settings are checked then, and a call takes where to run and an address for each field.
//
// A prepared pass is called in every step, so its arguments are read without pybind11: by CPython's vectorcall,
// with names that are compared as pointers.
#pragma once

#include "fields.h"

namespace gradl1 {

template <class Pass>
struct PreparedPass : Prepared<typename Pass::Request> {
    PreparedPass(const Engine& e, const py::dict& settings) : Prepared<typename Pass::Request>(e, settings) {
        check_pass<Pass>(this->request);
    }
};

inline std::int64_t integer(PyObject* value) {
    const long long result = PyLong_AsLongLong(value);
    if (result == -1 && PyErr_Occurred()) throw py::error_already_set();
    return result;
}

inline Address address(PyObject* value) {
    const std::size_t result = PyLong_AsSize_t(value);
    if (result == static_cast<std::size_t>(-1) && PyErr_Occurred()) throw py::error_already_set();
    return result;
}

inline Where where_of(PyObject* pair) {
    if (!PyTuple_Check(pair) || PyTuple_GET_SIZE(pair) != 2) {
        throw py::type_error("where must be (threads, 0) or (device, stream)");
    }
    return {integer(PyTuple_GET_ITEM(pair, 0)), integer(PyTuple_GET_ITEM(pair, 1))};
}

// The names of a pass as Python's own interned strings.
template <class Pass>
const auto& interned() {
    static const auto names = [] {
        std::array<PyObject*, Pass::fields.size()> result;
        for (std::size_t i = 0; i < result.size(); ++i) result[i] = PyUnicode_InternFromString(Pass::fields[i]);
        return result;
    }();
    return names;
}

// The number of the field with this name; `likely` is tried first, since callers keep the order of the table.
template <class Pass>
std::size_t index_of(PyObject* name, std::size_t likely) {
    const auto& names = interned<Pass>();
    if (likely < names.size() && names[likely] == name) return likely;
    for (std::size_t i = 0; i < names.size(); ++i) {
        if (names[i] == name || PyUnicode_Compare(names[i], name) == 0) return i;
    }
    throw py::type_error(std::string(Pass::name) + " has no field " + py::handle(name).cast<std::string>());
}

template <class Pass>
void run(const PreparedPass<Pass>& prepared, PyObject* const* arguments, Py_ssize_t count, PyObject* names) {
    if (count != 1) throw py::type_error(std::string(Pass::name) + " takes where, and every field by name");
    std::array<Address, Pass::fields.size()> given{};
    std::size_t next = 0;
    for (Py_ssize_t i = 0; names && i < PyTuple_GET_SIZE(names); ++i) {
        const std::size_t field = index_of<Pass>(PyTuple_GET_ITEM(names, i), next);
        given[field] = address(arguments[count + i]);
        next = field + 1;
    }
    auto request = prepared.request;
    Pass::read(request, Addresses(given.data(), prepared.engine.in_host_memory));
    check_addresses(request);
    launch(prepared.engine.*Pass::function, request, where_of(arguments[0]));
}

// METH_FASTCALL | METH_KEYWORDS; self is the capsule of the prepared pass.
template <class Pass>
PyObject* call(PyObject* self, PyObject* const* arguments, Py_ssize_t count, PyObject* names) {
    try {
        run(*static_cast<const PreparedPass<Pass>*>(PyCapsule_GetPointer(self, nullptr)), arguments, count, names);
        Py_RETURN_NONE;
    } catch (py::error_already_set& error) {
        error.restore();
    } catch (const py::builtin_exception& error) {
        error.set_error();
    } catch (const std::exception& error) {
        PyErr_SetString(PyExc_RuntimeError, error.what());
    }
    return nullptr;
}

// A Python function that runs the pass with these settings.
template <class Pass>
py::object prepare(const Engine& e, const py::dict& settings) {
    static PyMethodDef method = {Pass::name, reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(call<Pass>)),
                                 METH_FASTCALL | METH_KEYWORDS, nullptr};
    const py::capsule owner(new PreparedPass<Pass>(e, settings),
                            [](void* pointer) { delete static_cast<PreparedPass<Pass>*>(pointer); });
    return py::reinterpret_steal<py::object>(PyCFunction_NewEx(&method, owner.ptr(), nullptr));
}

}  // namespace gradl1
