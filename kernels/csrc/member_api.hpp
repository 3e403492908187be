// The scan of answers, for Python: pieces in, members out.
#pragma once

#include <memory>
#include <new>

#include "body_api.hpp"
#include "member_scan.hpp"

namespace sidecar {

constexpr char MEMBER_PATHS[] = "sidecar.kernels._fused.MemberPaths";
constexpr char MEMBER_SCAN[] = "sidecar.kernels._fused.MemberScan";

struct HeldScan {  // the paths live as long as the scan
    std::shared_ptr<const json::MemberPaths> paths;
    json::MemberScan scan;
    explicit HeldScan(std::shared_ptr<const json::MemberPaths> held) : paths(std::move(held)), scan(*paths) {}
};

inline PyObject* member_paths(PyObject*, PyObject* names) {
    const Py_ssize_t count = PyTuple_Size(names);
    if (count < 0) return nullptr;
    try {
        auto made = std::make_shared<json::MemberPaths>();
        for (Py_ssize_t i = 0; i < count; ++i) {
            Py_ssize_t size;
            const char* name = PyUnicode_AsUTF8AndSize(PyTuple_GetItem(names, i), &size);
            if (!name) return nullptr;
            if (!made->add(std::string(name, size), static_cast<int32_t>(i))) {
                PyErr_SetString(PyExc_ValueError, "a path is a limited number of names separated by dots");
                return nullptr;
            }
        }
        return owning<MEMBER_PATHS>(std::make_unique<std::shared_ptr<const json::MemberPaths>>(std::move(made)));
    } catch (const std::bad_alloc&) {
        return PyErr_NoMemory();
    }
}

inline PyObject* member_scan(PyObject*, PyObject* paths) {
    const auto* held = static_cast<std::shared_ptr<const json::MemberPaths>*>(PyCapsule_GetPointer(paths, MEMBER_PATHS));
    if (!held) return nullptr;
    try {
        return owning<MEMBER_SCAN>(std::make_unique<HeldScan>(*held));
    } catch (const std::bad_alloc&) {
        return PyErr_NoMemory();
    }
}

inline PyObject* scan_members(PyObject*, PyObject* args) {
    PyObject *capsule, *piece;
    Buffer from;
    if (!PyArg_ParseTuple(args, "OO", &capsule, &piece)) return nullptr;
    auto* held = static_cast<HeldScan*>(PyCapsule_GetPointer(capsule, MEMBER_SCAN));
    if (!held || !from.get(piece, false)) return nullptr;
    try {  // with the GIL: a scan is not thread-safe, and a piece needs a tenth of a millisecond
        const char* begin = static_cast<const char*>(from.view.buf);
        held->scan.feed(begin, begin + from.view.len);
        Py_RETURN_NONE;
    } catch (const std::bad_alloc&) {
        return PyErr_NoMemory();
    }
}

inline PyObject* found_members(PyObject*, PyObject* capsule) {
    auto* held = static_cast<HeldScan*>(PyCapsule_GetPointer(capsule, MEMBER_SCAN));
    if (!held) return nullptr;
    const auto& found = held->scan.found;
    PyObject* list = PyList_New(static_cast<Py_ssize_t>(found.size()));
    for (size_t i = 0; list && i < found.size(); ++i) {
        const auto& one = found[i];
        PyObject* row = Py_BuildValue("(iKKy#)", static_cast<int>(one.path), one.item, one.start, one.value.data(),
                                      static_cast<Py_ssize_t>(one.value.size()));
        if (!row) {
            Py_DECREF(list);
            return nullptr;
        }
        PyList_SetItem(list, static_cast<Py_ssize_t>(i), row);
    }
    return list;
}

}  // namespace sidecar
