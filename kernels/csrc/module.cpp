// Python module sidecar.kernels._fused. Buffers in, buffers out; the GIL is released while an image or a long body is worked on.
#define PY_SSIZE_T_CLEAN
#define Py_LIMITED_API 0x030b0000
#include <Python.h>

#include <limits>
#include <memory>
#include <new>

#include "body_api.hpp"
#include "choice.hpp"
#include "jpeg_api.hpp"
#include "member_api.hpp"
#include "tiles.hpp"

namespace {

using namespace sidecar;

constexpr char PLAN[] = "sidecar.kernels._fused.Plan";
constexpr int LONGEST = 1 << 20;  // pixels a side: products of sizes stay far from overflow

PyObject* plan(PyObject*, PyObject* args) {
    int h, w, new_h, new_w, resample;
    if (!PyArg_ParseTuple(args, "iiiii", &h, &w, &new_h, &new_w, &resample)) return nullptr;
    if (std::min({h, w, new_h, new_w}) < 1 || std::max({h, w, new_h, new_w}) > LONGEST || resample < 1 || resample > 3) {
        PyErr_SetString(PyExc_ValueError, "sizes must be 1..1048576 and resample 1 (Lanczos), 2 (bilinear) or 3 (bicubic)");
        return nullptr;
    }
    try {
        return owning<PLAN>(std::make_unique<Plan>(h, w, new_h, new_w, resample));
    } catch (const std::bad_alloc&) {
        return PyErr_NoMemory();
    }
}

bool level_of(int number, Level* level) {
    if (number == 0) return *level = fastest(), true;
    if (number >= 1 && number <= 1 + static_cast<int>(fastest())) return *level = static_cast<Level>(number - 1), true;
    PyErr_SetString(PyExc_ValueError, "level must be 0 (fastest), 1 (plain), 2 (AVX2) or 3 (AVX-512), and this machine must have it");
    return false;
}

bool sized(const Buffer& b, unsigned long long wanted, const char* name) {
    if (static_cast<unsigned long long>(b.view.len) == wanted) return true;
    PyErr_Format(PyExc_ValueError, "%s has %zd bytes, %llu are wanted", name, b.view.len, wanted);
    return false;
}

unsigned long long bytes(const Axis& y, const Axis& x, bool target) {
    return 3ull * (target ? y.target : y.source) * (target ? x.target : x.source);
}

template <class Work>
PyObject* without_gil(Work work) {
    bool memory = true;
    Py_BEGIN_ALLOW_THREADS
    try {
        work();
    } catch (const std::bad_alloc&) {
        memory = false;
    }
    Py_END_ALLOW_THREADS
    if (!memory) return PyErr_NoMemory();
    Py_RETURN_NONE;
}

PyObject* resize_(PyObject*, PyObject* args) {
    PyObject *capsule, *image, *out;
    int number;
    Level level;
    Buffer from, to;
    if (!PyArg_ParseTuple(args, "OOOi", &capsule, &image, &out, &number) || !level_of(number, &level)) return nullptr;
    const auto* p = static_cast<const Plan*>(PyCapsule_GetPointer(capsule, PLAN));
    if (!p || !from.get(image, false) || !to.get(out, true)) return nullptr;
    if (!sized(from, bytes(p->y, p->x, false), "image") || !sized(to, bytes(p->y, p->x, true), "out")) return nullptr;
    return without_gil([&] {
        resize(*p, static_cast<const uint8_t*>(from.view.buf), static_cast<uint8_t*>(to.view.buf), level);
    });
}

// Bytes of a value; 0 and an exception for an unknown type.
int item_of(int type) {
    if (type == 0) return 1;
    if (type == 1) return 4;
    if (type == 2 || type == 3) return 2;
    PyErr_SetString(PyExc_ValueError, "type must be 0 (uint8), 1 (float32), 2 (bfloat16) or 3 (float16)");
    return 0;
}

PyObject* patches_(PyObject*, PyObject* args) {
    PyObject *capsule, *image, *out;
    int number, size, merge, temporal, type, normalise;
    Level level;
    Values v;
    Buffer from, to;
    if (!PyArg_ParseTuple(args, "OOOiiiiip(fff)(fff)f", &capsule, &image, &out, &number, &size, &merge, &temporal, &type, &normalise,
                          &v.mean[0], &v.mean[1], &v.mean[2], &v.deviation[0], &v.deviation[1], &v.deviation[2], &v.factor) ||
        !level_of(number, &level))
        return nullptr;
    v.normalise = normalise != 0;
    const auto* p = static_cast<const Plan*>(PyCapsule_GetPointer(capsule, PLAN));
    if (!p || !from.get(image, false) || !to.get(out, true)) return nullptr;
    const int step = size * merge;
    if (size < 1 || merge < 1 || temporal < 1 || size > 256 || merge > 256 || temporal > 256 || p->y.target % step || p->x.target % step) {
        PyErr_SetString(PyExc_ValueError, "the resized image is no whole number of merged patches");
        return nullptr;
    }
    const int item = item_of(type);
    if (!item) return nullptr;
    const auto one = bytes(p->y, p->x, false);
    const int frames = from.view.len == static_cast<Py_ssize_t>(one) ? 1 : temporal;  // one picture, or the frames of a step
    if (!sized(from, one * frames, "image") || !sized(to, bytes(p->y, p->x, true) * temporal * item, "out")) return nullptr;
    const auto* in = static_cast<const uint8_t*>(from.view.buf);
    return without_gil([&] {
        if (type == 0) patches<U8>(*p, in, frames, size, merge, temporal, v, static_cast<uint8_t*>(to.view.buf), level);
        if (type == 1) patches<F32>(*p, in, frames, size, merge, temporal, v, static_cast<float*>(to.view.buf), level);
        if (type == 3) patches<F16>(*p, in, frames, size, merge, temporal, v, static_cast<uint16_t*>(to.view.buf), level);
        if (type == 2) patches<BF16>(*p, in, frames, size, merge, temporal, v, static_cast<uint16_t*>(to.view.buf), level);
    });
}

PyObject* tiles_(PyObject*, PyObject* args) {
    PyObject *capsule, *image, *out;
    int number, type, normalise;
    Canvas canvas;
    Level level;
    Values v;
    Buffer from, to;
    if (!PyArg_ParseTuple(args, "OOOi(iiiiii)ip(fff)(fff)f", &capsule, &image, &out, &number, &canvas.height, &canvas.width, &canvas.top,
                          &canvas.left, &canvas.tile_height, &canvas.tile_width, &type, &normalise, &v.mean[0], &v.mean[1], &v.mean[2],
                          &v.deviation[0], &v.deviation[1], &v.deviation[2], &v.factor) ||
        !level_of(number, &level))
        return nullptr;
    v.normalise = normalise != 0;
    const auto* p = static_cast<const Plan*>(PyCapsule_GetPointer(capsule, PLAN));
    if (!p || !from.get(image, false) || !to.get(out, true)) return nullptr;
    const bool inside = std::min(canvas.top, canvas.left) >= 0 && std::max(canvas.height, canvas.width) <= LONGEST &&
                        canvas.top <= canvas.height - p->y.target && canvas.left <= canvas.width - p->x.target;
    if (!inside || std::min(canvas.tile_height, canvas.tile_width) < 1 || canvas.height % canvas.tile_height || canvas.width % canvas.tile_width) {
        PyErr_SetString(PyExc_ValueError, "the resized image does not lie on a canvas of whole tiles");
        return nullptr;
    }
    const int item = item_of(type);
    if (!item) return nullptr;
    const unsigned long long wanted = 3ull * canvas.height * canvas.width * item;
    if (!sized(from, bytes(p->y, p->x, false), "image") || !sized(to, wanted, "out")) return nullptr;
    const auto* in = static_cast<const uint8_t*>(from.view.buf);
    return without_gil([&] {
        if (type == 0) tiles<U8>(*p, in, canvas, v, static_cast<uint8_t*>(to.view.buf), level);
        if (type == 1) tiles<F32>(*p, in, canvas, v, static_cast<float*>(to.view.buf), level);
        if (type == 2) tiles<BF16>(*p, in, canvas, v, static_cast<uint16_t*>(to.view.buf), level);
        if (type == 3) tiles<F16>(*p, in, canvas, v, static_cast<uint16_t*>(to.view.buf), level);
    });
}

PyObject* level(PyObject*, PyObject*) { return PyUnicode_FromString(NAMES[static_cast<int>(fastest())]); }

PyObject* refused(PyObject*, PyObject*) { return PyUnicode_FromString(choice().refused); }

PyMethodDef METHODS[] = {
    {"plan", plan, METH_VARARGS, "plan(h, w, new_h, new_w, resample): the tables of one resize"},
    {"resize", resize_, METH_VARARGS, "resize(plan, image, out, level): uint8 (h, w, 3) to (new_h, new_w, 3)"},
    {"patches", patches_, METH_VARARGS,
     "patches(plan, image, out, level, patch, merge, temporal, type, normalise, mean, deviation, factor)"},
    {"tiles", tiles_, METH_VARARGS,
     "tiles(plan, image, out, level, (height, width, top, left, tile_height, tile_width), type, normalise, mean, deviation, factor)"},
    {"wanted", wanted_, METH_VARARGS, "wanted(prompts, options): the names of members that a scan finds, as tuples"},
    {"scan_body", scan_body, METH_VARARGS, "scan_body(wanted, body): what sidecar.load.body_scan reads; None if it is no JSON object"},
    {"unescape", unescape, METH_VARARGS, "unescape(inside): the text of a JSON string without its quotes, in UTF-8"},
    {"member_paths", member_paths, METH_O, "member_paths(paths): paths of the wanted members of answers, as a tuple of `a.b`"},
    {"member_scan", member_scan, METH_O, "member_scan(member_paths): a scan of one text"},
    {"scan_members", scan_members, METH_VARARGS, "scan_members(scan, piece): scan the next piece of the text"},
    {"found_members", found_members, METH_O, "found_members(scan): (path, item, start, value) of each that was found"},
    {"open_jpeg", open_jpeg, METH_O,
     "open_jpeg(data): (jpeg, height, width, (sampling, tables), coefficients); None if it is not for this decoder"},
    {"jpeg_coefficients", jpeg_coefficients, METH_VARARGS, "jpeg_coefficients(jpeg, out): whether the whole file could be decoded"},
    {"level", level, METH_NOARGS, "the instruction set that is used on this machine"},
    {"refused", refused, METH_NOARGS, "the instruction set whose form gave other bits here and is not used; empty if none"},
    {nullptr, nullptr, 0, nullptr},
};

PyModuleDef MODULE = {PyModuleDef_HEAD_INIT, "_fused", "Exact resize fused with the patch layout; the scans of requests and answers.", 0, METHODS, nullptr, nullptr, nullptr, nullptr};

}  // namespace

PyMODINIT_FUNC PyInit__fused() { return PyModule_Create(&MODULE); }
