"""A Landlock ruleset for an image worker: no file, no TCP port, no signal or abstract socket outside it.

Rules: everything that the kernel's Landlock can deny is denied, and nothing is excepted; descriptors that are open stay
usable. The seccomp filter refuses the same calls already; this holds where it cannot be installed, and against
calls that it has by mistake. Kernels before 5.13, and those that were built or booted without it, have no Landlock.

It covers the calling thread and those that it starts later: call it before there are others.
"""

from __future__ import annotations

import ctypes
import os
import sys
from typing import Final

# The same numbers on all architectures.
CREATE_RULESET: Final = 444
RESTRICT_SELF: Final = 446
GET_VERSION: Final = 1
# By version: rights to files (execute, write, read, list, remove, make; then refer, truncate, device controls), to TCP
# (bind, connect), and scopes (abstract Unix sockets, signals). linux/landlock.h
FILE_RIGHTS: Final = {1: 0x1FFF, 2: 0x3FFF, 3: 0x7FFF, 5: 0xFFFF}
NETWORK_RIGHTS: Final = {4: 0x3}
SCOPES: Final = {6: 0x3}


class _Ruleset(ctypes.Structure):
    _fields_ = (("files", ctypes.c_uint64), ("network", ctypes.c_uint64), ("scopes", ctypes.c_uint64))


def version() -> int:
    """The version of the kernel's Landlock; 0 if it has none."""
    if sys.platform != "linux":
        return 0
    return max(0, int(_call(CREATE_RULESET, None, ctypes.c_size_t(0), ctypes.c_uint32(GET_VERSION))))


def install() -> str:
    """Deny everything to this thread and those that it starts. Returns why that was not possible; "" if it was.

    The process must have NO_NEW_PRIVS.
    """
    found = version()
    if not found:
        return "this kernel has none"
    ruleset = _Ruleset(*(_known(table, found) for table in (FILE_RIGHTS, NETWORK_RIGHTS, SCOPES)))
    # an older kernel takes a longer record whose unknown members are 0
    fd = _call(CREATE_RULESET, ctypes.byref(ruleset), ctypes.c_size_t(ctypes.sizeof(ruleset)), ctypes.c_uint32(0))
    if fd < 0:
        return os.strerror(ctypes.get_errno())
    try:
        failed = _call(RESTRICT_SELF, ctypes.c_int(fd), ctypes.c_uint32(0))
        return os.strerror(ctypes.get_errno()) if failed else ""
    finally:
        os.close(fd)


def _known(table: dict[int, int], version: int) -> int:
    return max((rights for since, rights in table.items() if since <= version), default=0)


def _call(number: int, *arguments: object) -> int:
    return int(ctypes.CDLL(None, use_errno=True).syscall(ctypes.c_long(number), *arguments))
