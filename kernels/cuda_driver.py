"""The CUDA driver's interface, as far as resizing needs it: ctypes over libcuda.so.1, no toolkit and no compiler.

Rules: an error names the call and what the driver says. Looking at devices takes none of their memory; a `Context`
takes some hundred MB, which only the end of the process gives back for certain. One thread uses a context. Device
memory is an integer, as the driver has it; whoever allocates it frees it.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from ctypes import POINTER, byref, c_char, c_char_p, c_int, c_size_t, c_uint, c_uint64, c_void_p
from dataclasses import dataclass
from typing import Any, Final

LIBRARY: Final = "libcuda.so.1"
# The driver's names of its functions, with the types of their arguments. Each returns a CUresult.
PROTOTYPES: Final[dict[str, tuple[Any, ...]]] = {
    "cuInit": (c_uint,),
    "cuDriverGetVersion": (POINTER(c_int),),
    "cuGetErrorName": (c_int, POINTER(c_char_p)),
    "cuDeviceGetCount": (POINTER(c_int),),
    "cuDeviceGet": (POINTER(c_int), c_int),
    "cuDeviceGetName": (c_char_p, c_int, c_int),
    "cuDeviceGetUuid": (POINTER(c_char * 16), c_int),
    "cuDeviceGetAttribute": (POINTER(c_int), c_int, c_int),
    "cuDevicePrimaryCtxSetFlags_v2": (c_int, c_uint),
    "cuDevicePrimaryCtxRetain": (POINTER(c_void_p), c_int),
    "cuDevicePrimaryCtxRelease_v2": (c_int,),
    "cuCtxSetCurrent": (c_void_p,),
    "cuCtxGetStreamPriorityRange": (POINTER(c_int), POINTER(c_int)),
    "cuStreamCreateWithPriority": (POINTER(c_void_p), c_uint, c_int),
    "cuStreamSynchronize": (c_void_p,),
    "cuModuleLoadData": (POINTER(c_void_p), c_char_p),
    "cuModuleGetFunction": (POINTER(c_void_p), c_void_p, c_char_p),
    "cuMemAlloc_v2": (POINTER(c_uint64), c_size_t),
    "cuMemFree_v2": (c_uint64,),
    "cuMemHostRegister_v2": (c_void_p, c_size_t, c_uint),
    "cuMemHostUnregister": (c_void_p,),
    "cuMemcpyHtoDAsync_v2": (c_uint64, c_void_p, c_size_t, c_void_p),
    "cuMemcpyDtoHAsync_v2": (c_void_p, c_uint64, c_size_t, c_void_p),
    "cuLaunchKernel": (c_void_p, *[c_uint] * 7, c_void_p, POINTER(c_void_p), POINTER(c_void_p)),
}
# CUdevice_attribute.
COMPUTE_MODE, MAJOR, MINOR = 20, 75, 76
# CUcomputemode: one process only; none.
EXCLUSIVE, PROHIBITED = 3, 2
# CU_CTX_SCHED_BLOCKING_SYNC: a wait for the device takes no CPU, which the engine may need.
BLOCKING_SYNC: Final = 4
# CU_STREAM_NON_BLOCKING.
NON_BLOCKING: Final = 1
OUT_OF_MEMORY: Final = 2
NAME_BYTES: Final = 256


class CudaMissingError(Exception):
    """There is no driver library, or it lacks a function."""


class CudaError(Exception):
    """A call of the driver failed. `code` is its CUresult."""

    def __init__(self, call: str, code: int, name: str) -> None:
        super().__init__(f"{call}: {name} ({code})")
        self.code = code


@dataclass(frozen=True, slots=True)
class CudaDevice:
    """One device as this process sees it. `uuid` is NVML's, without its prefix."""

    ordinal: int
    name: str
    capability: tuple[int, int]
    compute_mode: int
    uuid: str


class Driver:
    """The initialised driver. Raises CudaMissingError, or CudaError with the driver's own answer."""

    def __init__(self, library: str = LIBRARY) -> None:
        try:
            self._library = ctypes.CDLL(library)
            self._functions = {name: getattr(self._library, name) for name in PROTOTYPES}
        except (OSError, AttributeError) as e:
            raise CudaMissingError(str(e)) from None
        for name, types in PROTOTYPES.items():
            self._functions[name].argtypes = types
        self.call("cuInit", 0)

    def call(self, function: str, *arguments: Any) -> None:
        """Call a function of PROTOTYPES. Raises CudaError."""
        code = self._functions[function](*arguments)
        if code:
            text = c_char_p()
            self._functions["cuGetErrorName"](code, byref(text))
            raise CudaError(function, code, (text.value or b"unknown error").decode("ascii", "replace"))

    def version(self) -> tuple[int, int]:
        """The newest CUDA that the driver supports."""
        number = c_int()
        self.call("cuDriverGetVersion", byref(number))
        return number.value // 1000, number.value % 1000 // 10

    def devices(self) -> list[CudaDevice]:
        """The visible devices."""
        count = c_int()
        self.call("cuDeviceGetCount", byref(count))
        return [self._device(ordinal) for ordinal in range(count.value)]

    def _device(self, ordinal: int) -> CudaDevice:
        handle, name, uuid = c_int(), ctypes.create_string_buffer(NAME_BYTES), (c_char * 16)()
        self.call("cuDeviceGet", byref(handle), ordinal)
        self.call("cuDeviceGetName", name, NAME_BYTES, handle)
        self.call("cuDeviceGetUuid", byref(uuid), handle)
        mode, major, minor = (self._attribute(which, handle) for which in (COMPUTE_MODE, MAJOR, MINOR))
        text = bytes(uuid).hex()
        parts = (text[:8], text[8:12], text[12:16], text[16:20], text[20:])
        return CudaDevice(ordinal, name.value.decode("utf-8", "replace"), (major, minor), mode, "-".join(parts))

    def _attribute(self, which: int, handle: c_int) -> int:
        value = c_int()
        self.call("cuDeviceGetAttribute", byref(value), which, handle)
        return value.value


class Context:
    """A device's context in this process, current for this thread, with one stream of the least priority."""

    def __init__(self, driver: Driver, device: CudaDevice) -> None:
        self._driver = driver
        handle, context, stream, least, most = c_int(), c_void_p(), c_void_p(), c_int(), c_int()
        self.call("cuDeviceGet", byref(handle), device.ordinal)
        self.call("cuDevicePrimaryCtxSetFlags_v2", handle, BLOCKING_SYNC)
        self.call("cuDevicePrimaryCtxRetain", byref(context), handle)
        self.call("cuCtxSetCurrent", context)
        self.call("cuCtxGetStreamPriorityRange", byref(least), byref(most))
        self.call("cuStreamCreateWithPriority", byref(stream), NON_BLOCKING, least)
        self.stream = stream

    def call(self, function: str, *arguments: Any) -> None:
        """Call a function of the driver. Raises CudaError."""
        self._driver.call(function, *arguments)

    def load(self, code: bytes, function: str) -> c_void_p:
        """A kernel out of machine code."""
        module, kernel = c_void_p(), c_void_p()
        self.call("cuModuleLoadData", byref(module), code)
        self.call("cuModuleGetFunction", byref(kernel), module, function.encode())
        return kernel

    def allocate(self, size: int) -> int:
        """Device memory of `size` bytes."""
        address = c_uint64()
        self.call("cuMemAlloc_v2", byref(address), size)
        return address.value

    def free(self, address: int) -> None:
        """Give device memory back."""
        self.call("cuMemFree_v2", address)

    def pin(self, address: int, size: int) -> None:
        """Keep host memory in place, so that copies need no second copy. Some containers refuse it."""
        self.call("cuMemHostRegister_v2", address, size, 0)

    def unpin(self, address: int) -> None:
        """Inverse of `pin`."""
        self.call("cuMemHostUnregister", address)

    def to_device(self, target: int, source: int, size: int) -> None:
        """Begin a copy of `size` bytes of host memory, which must stay until `wait`."""
        self.call("cuMemcpyHtoDAsync_v2", target, source, size, self.stream)

    def to_host(self, target: int, source: int, size: int) -> None:
        """Begin a copy of `size` bytes to host memory, whole after `wait`."""
        self.call("cuMemcpyDtoHAsync_v2", target, source, size, self.stream)

    def launch(self, kernel: c_void_p, programs: int, threads: int, shared_bytes: int, pointers: Sequence[int]) -> None:
        """Launch `programs` blocks of a kernel whose parameters are all pointers."""
        values = [c_uint64(pointer) for pointer in pointers]
        parameters = (c_void_p * len(values))(*(ctypes.addressof(value) for value in values))
        grid, block = (programs, 1, 1), (threads, 1, 1)
        self.call("cuLaunchKernel", kernel, *grid, *block, shared_bytes, self.stream, parameters, None)

    def wait(self) -> None:
        """Wait for all copies and launches. A fault of a kernel is reported here."""
        self.call("cuStreamSynchronize", self.stream)
