"""Gives up all of Linux's capabilities, for ever: in a pod that may read stacks (--stack-dumps on) the sidecar is root with SYS_PTRACE, and a
codec that a hostile image has taken over must not have it.

What is given up: effective, permitted and inheritable, the ambient set, and, where we may, the bounding set. With NO_NEW_PRIVS no program that
is started can get any of it back.
"""

from __future__ import annotations

import ctypes
from typing import Final

from sidecar.runtime.prctl import CAP_AMBIENT, CAPBSET_DROP, SET_NO_NEW_PRIVS, prctl

AMBIENT_CLEAR_ALL: Final = 4
CAPSET_VERSION_3: Final = 0x20080522  # of capset: two words of 32 capabilities
MAX_CAPABILITIES: Final = 64  # capabilities that a kernel can have; the first that it has not ends the loop


class _Header(ctypes.Structure):
    _fields_ = (("version", ctypes.c_uint32), ("pid", ctypes.c_int))


class _Words(ctypes.Structure):
    _fields_ = (("effective", ctypes.c_uint32), ("permitted", ctypes.c_uint32), ("inheritable", ctypes.c_uint32))


def drop_capabilities() -> None:
    """This thread and all that it starts have no capabilities from here on. Call it before other threads exist.

    Raises OSError where it has some and cannot give them up.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    prctl(SET_NO_NEW_PRIVS, 1)
    prctl(CAP_AMBIENT, AMBIENT_CLEAR_ALL)  # kernels before 4.3 have none
    for capability in range(MAX_CAPABILITIES):
        if not prctl(CAPBSET_DROP, capability):  # no such one, or we lack SETPCAP: NO_NEW_PRIVS holds all the same
            break
    if any(read_capabilities(libc)) and libc.capset(ctypes.byref(_Header(CAPSET_VERSION_3, 0)), (_Words * 2)()):
        raise OSError(ctypes.get_errno(), "capset")


def read_capabilities(libc: ctypes.CDLL) -> list[int]:
    """The words of this thread's effective, permitted and inheritable capabilities."""
    words = (_Words * 2)()
    if libc.capget(ctypes.byref(_Header(CAPSET_VERSION_3, 0)), words):
        raise OSError(ctypes.get_errno(), "capget")
    return [n for word in words for n in (word.effective, word.permitted, word.inheritable)]
