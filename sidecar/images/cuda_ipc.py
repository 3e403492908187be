"""The CUDA calls behind device memory that another process reads: nothing else in the sidecar makes any by hand.

The driver's own interface by ctypes, because torch's allocator gives out parts of larger blocks: an IPC handle of one would open all the
others, too. Each piece is allocated alone, so its handle opens this piece only. Both sides need a current context (any torch operation
on the device makes one) on the same GPU. The driver is loaded at the first call.
"""

from __future__ import annotations

import ctypes
from functools import cache
from typing import Any, Final

GRAIN: Final = 2 << 20  # bytes: the driver gives memory in pieces of this size
HANDLE: Final = 64  # bytes of CUipcMemHandle
OUT_OF_MEMORY: Final = 2
LAZY_PEER_ACCESS: Final = 1

Pointer = int


class CudaError(RuntimeError):
    """A call of the driver failed; `code` is its CUresult."""

    def __init__(self, call: str, code: int) -> None:
        super().__init__(f"{call} failed with CUDA error {code}")
        self.code = code


class _Handle(ctypes.Structure):
    _fields_ = (("bytes", ctypes.c_ubyte * HANDLE),)


@cache
def _driver() -> Any:
    """libcuda with the types of what is called here. Raises OSError where there is no NVIDIA driver."""
    cuda = ctypes.CDLL("libcuda.so.1")
    pointer = ctypes.c_uint64
    cuda.cuMemAlloc_v2.argtypes = (ctypes.POINTER(pointer), ctypes.c_size_t)
    cuda.cuMemFree_v2.argtypes = (pointer,)
    cuda.cuIpcGetMemHandle.argtypes = (ctypes.POINTER(_Handle), pointer)
    cuda.cuIpcOpenMemHandle_v2.argtypes = (ctypes.POINTER(pointer), _Handle, ctypes.c_uint)
    cuda.cuIpcCloseMemHandle.argtypes = (pointer,)
    return cuda


def _call(name: str, *args: Any) -> None:
    code = getattr(_driver(), name)(*args)
    if code:
        raise CudaError(name, code)


def allocate(size: int) -> Pointer:
    """Device memory of its own. Raises CudaError, with OUT_OF_MEMORY where there is none."""
    found = ctypes.c_uint64()
    _call("cuMemAlloc_v2", ctypes.byref(found), size)
    return found.value


def free(pointer: Pointer) -> None:
    """Give back what `allocate` gave."""
    _call("cuMemFree_v2", pointer)


def handle_of(pointer: Pointer) -> bytes:
    """What another process opens the memory with."""
    found = _Handle()
    _call("cuIpcGetMemHandle", ctypes.byref(found), pointer)
    return bytes(found.bytes)


def opened(handle: bytes) -> Pointer:
    """Another process's memory, in this one's address space. Raises ValueError or CudaError."""
    found = ctypes.c_uint64()
    _call("cuIpcOpenMemHandle_v2", ctypes.byref(found), _Handle.from_buffer_copy(handle), LAZY_PEER_ACCESS)
    return found.value


def close(pointer: Pointer) -> None:
    """Give back what `opened` gave; its owner's memory stays."""
    _call("cuIpcCloseMemHandle", pointer)


class View:
    """`size` bytes of device memory at `pointer`, in the form that torch.as_tensor takes without a copy."""

    def __init__(self, pointer: Pointer, size: int) -> None:
        self.__cuda_array_interface__ = {
            "shape": (size,), "typestr": "|u1", "data": (pointer, False), "version": 3, "strides": None,
        }  # fmt: skip
