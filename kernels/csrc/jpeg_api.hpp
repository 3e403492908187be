// The coefficients of a JPEG, for Python: a file in, numbers and blocks out. The GIL is released while they are decoded.
#pragma once
#define PY_SSIZE_T_CLEAN
#define Py_LIMITED_API 0x030b0000
#include <Python.h>

#include <memory>

#include "body_api.hpp"
#include "jpeg_coefficients.hpp"

namespace sidecar {

constexpr char JPEG[] = "sidecar.kernels._fused.Jpeg";

struct OpenJpeg {
    Buffer data;
    std::unique_ptr<jpeg::File> file;
};

// The sampling factors of each component, and their quantisation tables as 16-bit numbers, one after the other.
inline PyObject* parts_of(const jpeg::Layout& layout) {
    PyObject* sampling = PyTuple_New(layout.count);
    if (!sampling) return nullptr;
    uint16_t quant[3 * jpeg::BLOCK];
    for (int i = 0; i < layout.count; ++i) {
        const jpeg::Component& part = layout.components[i];
        PyObject* factors = Py_BuildValue("ii", part.h, part.v);
        if (!factors) return Py_DECREF(sampling), nullptr;
        PyTuple_SetItem(sampling, i, factors);
        std::memcpy(quant + i * jpeg::BLOCK, part.quant, sizeof part.quant);
    }
    const Py_ssize_t size = layout.count * jpeg::BLOCK * static_cast<Py_ssize_t>(sizeof *quant);
    return Py_BuildValue("Ny#", sampling, reinterpret_cast<const char*>(quant), size);
}

inline PyObject* open_jpeg(PyObject*, PyObject* data) {
    try {
        auto made = std::make_unique<OpenJpeg>();
        if (!made->data.get(data, false)) return nullptr;
        const Py_buffer& view = made->data.view;
        made->file = std::make_unique<jpeg::File>(static_cast<const uint8_t*>(view.buf), static_cast<size_t>(view.len));
        if (!made->file->read_head()) Py_RETURN_NONE;
        const jpeg::Layout layout = made->file->layout;
        PyObject* capsule = owning<JPEG>(std::move(made));
        if (!capsule) return nullptr;
        PyObject* parts = parts_of(layout);
        if (!parts) return Py_DECREF(capsule), nullptr;
        return Py_BuildValue("NiiNL", capsule, layout.height, layout.width, parts, static_cast<long long>(layout.coefficients));
    } catch (const std::bad_alloc&) {
        return PyErr_NoMemory();
    }
}

inline PyObject* jpeg_coefficients(PyObject*, PyObject* args) {
    PyObject *capsule, *out;
    if (!PyArg_ParseTuple(args, "OO", &capsule, &out)) return nullptr;
    const auto* opened = static_cast<const OpenJpeg*>(PyCapsule_GetPointer(capsule, JPEG));
    Buffer to;
    if (!opened || !to.get(out, true)) return nullptr;
    const int64_t wanted = opened->file->layout.coefficients * static_cast<int64_t>(sizeof(int16_t));
    if (to.view.len != wanted || reinterpret_cast<uintptr_t>(to.view.buf) % alignof(int16_t)) {
        PyErr_Format(PyExc_ValueError, "out has %zd bytes, %lld are wanted, aligned to 2", to.view.len, static_cast<long long>(wanted));
        return nullptr;
    }
    bool whole = false;
    if (!maybe_without_gil(opened->data.view.len, [&] { whole = opened->file->decode(static_cast<int16_t*>(to.view.buf)); })) return nullptr;
    return PyBool_FromLong(whole);
}

}  // namespace sidecar
