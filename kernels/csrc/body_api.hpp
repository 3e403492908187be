// The scan of request bodies, for Python: buffers in, numbers and offsets out. The GIL is released over long ones.
#pragma once
#define PY_SSIZE_T_CLEAN
#define Py_LIMITED_API 0x030b0000
#include <Python.h>

#include <memory>
#include <new>

#include "body_scan.hpp"

namespace sidecar {

constexpr char WANTED[] = "sidecar.kernels._fused.Wanted";
constexpr Py_ssize_t HELD_BYTES = 1 << 16;  // the GIL is not worth releasing for less

struct Buffer {
    Py_buffer view{};
    bool held = false;
    bool get(PyObject* o, bool writable) {
        return held = PyObject_GetBuffer(o, &view, PyBUF_C_CONTIGUOUS | (writable ? PyBUF_WRITABLE : 0)) == 0;
    }
    ~Buffer() {
        if (held) PyBuffer_Release(&view);
    }
};

// A capsule that owns what it holds; null with an error set.
template <const char* name, class T>
PyObject* owning(std::unique_ptr<T> made) {
    PyObject* capsule = PyCapsule_New(made.get(), name, [](PyObject* held) { delete static_cast<T*>(PyCapsule_GetPointer(held, name)); });
    if (capsule) made.release();
    return capsule;
}

template <class Work>
bool maybe_without_gil(Py_ssize_t size, Work work) {
    bool memory = true;
    PyThreadState* state = size > HELD_BYTES ? PyEval_SaveThread() : nullptr;
    try {
        work();
    } catch (const std::bad_alloc&) {
        memory = false;
    }
    if (state) PyEval_RestoreThread(state);
    if (!memory) PyErr_NoMemory();
    return memory;
}

inline bool add_names(json::Wanted& wanted, PyObject* names, bool prompts) {
    const Py_ssize_t count = PyTuple_Size(names);
    for (Py_ssize_t i = 0; i < count; ++i) {
        Py_ssize_t size;
        const char* name = PyUnicode_AsUTF8AndSize(PyTuple_GetItem(names, i), &size);
        if (!name) return false;
        wanted.add(std::string(name, size), prompts);
    }
    return count >= 0;
}

inline PyObject* wanted_(PyObject*, PyObject* args) {
    PyObject *prompts, *options;
    if (!PyArg_ParseTuple(args, "OO", &prompts, &options)) return nullptr;
    try {
        auto made = std::make_unique<json::Wanted>();
        if (!add_names(*made, prompts, true) || !add_names(*made, options, false)) return nullptr;
        return owning<WANTED>(std::move(made));
    } catch (const std::bad_alloc&) {
        return PyErr_NoMemory();
    }
}

template <class T>
PyObject* packed(const std::vector<T>& items) {
    return PyBytes_FromStringAndSize(reinterpret_cast<const char*>(items.data()), static_cast<Py_ssize_t>(items.size() * sizeof(T)));
}

// Those that are there: index, start, end.
inline PyObject* members_of(const json::Findings& found) {
    std::vector<uint64_t> flat;
    for (size_t i = 0; i < found.members.size(); ++i)
        if (const auto& span = found.members[i]; span.end) flat.insert(flat.end(), {i, span.start, span.end});
    return packed(flat);
}

// Of those that are there: index, count, ids or not, lists, weight, squares.
inline PyObject* items_of(const json::Findings& found) {
    std::vector<uint64_t> flat;
    for (size_t i = 0; i < found.items.size(); ++i)
        if (const auto& items = found.items[i]; items.weight || items.count)
            flat.insert(flat.end(), {i, items.count, items.ids, items.lists, items.weight, items.squares});
    return packed(flat);
}

inline PyObject* texts_of(const json::Findings& found) {
    if (!found.all_texts) Py_RETURN_NONE;
    std::vector<uint64_t> flat;
    for (uint32_t i = found.sums.texts.first; i != json::NONE; i = found.texts[i].next) {
        const auto& node = found.texts[i];
        flat.insert(flat.end(), {node.span.start, node.span.end, node.printed});
    }
    return packed(flat);
}

inline PyObject* parts_of(const json::Findings& found, const json::Chain& chain) {
    std::vector<uint64_t> flat;
    for (uint32_t i = chain.first; i != json::NONE; i = found.parts[i].next) {
        const auto& node = found.parts[i];
        flat.insert(flat.end(), {node.list, node.item, node.part, node.object, node.url.start, node.url.end, node.escaped, node.link, node.named});
    }
    return packed(flat);
}

inline PyObject* scan_body(PyObject*, PyObject* args) {
    PyObject *capsule, *body;
    Buffer from;
    if (!PyArg_ParseTuple(args, "OO", &capsule, &body)) return nullptr;
    const auto* wanted = static_cast<const json::Wanted*>(PyCapsule_GetPointer(capsule, WANTED));
    if (!wanted || !from.get(body, false)) return nullptr;
    bool read = false;
    try {
        json::Scan scan(static_cast<const uint8_t*>(from.view.buf), from.view.len, *wanted);
        if (!maybe_without_gil(from.view.len, [&] { read = scan.run(); })) return nullptr;
        if (!read) Py_RETURN_NONE;
        const auto& found = scan.found;
        const auto& sums = found.sums;
        return Py_BuildValue("(KKKIIINKNNII)(NNNKNN)", sums.text.bytes, sums.text.chars, sums.ids, sums.images, sums.audios, sums.videos,
                             PyBool_FromLong(sums.fetches), found.messages, PyBool_FromLong(found.offers), PyBool_FromLong(found.strict_offers),
                             sums.parts, sums.links, members_of(found), items_of(found), parts_of(found, sums.part_nodes), found.sources,
                             found.only_texts ? parts_of(found, found.source_nodes) : (Py_INCREF(Py_None), Py_None), texts_of(found));
    } catch (const std::bad_alloc&) {
        return PyErr_NoMemory();
    }
}

inline PyObject* unescape(PyObject*, PyObject* args) {
    PyObject* text;
    Buffer from;
    if (!PyArg_ParseTuple(args, "O", &text) || !from.get(text, false)) return nullptr;
    const auto* in = static_cast<const uint8_t*>(from.view.buf);
    try {
        std::vector<uint8_t> out(from.view.len + 1);
        size_t size = 0;
        bool sound = false;
        const bool ran = maybe_without_gil(from.view.len, [&] {
            // a string that ends where the buffer does: what was scanned, or else nothing is read beyond it
            sound = json::is_string(in, in + from.view.len);
            if (sound) size = json::unescape(in, in + from.view.len, out.data());
        });
        if (!ran) return nullptr;
        if (sound) return PyBytes_FromStringAndSize(reinterpret_cast<const char*>(out.data()), static_cast<Py_ssize_t>(size));
        PyErr_SetString(PyExc_ValueError, "not the inside of a JSON string");
        return nullptr;
    } catch (const std::bad_alloc&) {
        return PyErr_NoMemory();
    }
}

}  // namespace sidecar
