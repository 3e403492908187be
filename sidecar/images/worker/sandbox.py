"""Drop all Linux capabilities permanently.

In a pod that may read stacks (--stack-dumps on) the sidecar is root with SYS_PTRACE, which a codec that a hostile image
has taken over must not have. Dropped are the effective, permitted, inheritable and ambient sets and, if allowed, the
bounding set. With NO_NEW_PRIVS no program that is started later can regain any of them.
"""

from __future__ import annotations

import ctypes
from typing import Final

from sidecar.runtime.prctl import CAP_AMBIENT, CAPBSET_DROP, SET_NO_NEW_PRIVS, prctl

AMBIENT_CLEAR_ALL: Final = 4
CAPSET_VERSION_3: Final = 0x20080522  # two words of 32 capabilities
MAX_CAPABILITIES: Final = 64


class _Header(ctypes.Structure):
    _fields_ = (("version", ctypes.c_uint32), ("pid", ctypes.c_int))


class _Words(ctypes.Structure):
    _fields_ = (("effective", ctypes.c_uint32), ("permitted", ctypes.c_uint32), ("inheritable", ctypes.c_uint32))


def drop_capabilities() -> None:
    """Drop all capabilities of this thread and of all that it starts. Call this before other threads exist.

    Raises OSError if it has any and cannot drop them.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    prctl(SET_NO_NEW_PRIVS, 1)
    prctl(CAP_AMBIENT, AMBIENT_CLEAR_ALL)  # kernels before 4.3 have none
    for capability in range(MAX_CAPABILITIES):
        if not prctl(CAPBSET_DROP, capability):  # past the last one, or no SETPCAP: NO_NEW_PRIVS still holds
            break
    if any(read_capabilities(libc)) and libc.capset(ctypes.byref(_Header(CAPSET_VERSION_3, 0)), (_Words * 2)()):
        raise OSError(ctypes.get_errno(), "capset")


def read_capabilities(libc: ctypes.CDLL) -> list[int]:
    """The words of this thread's effective, permitted and inheritable capabilities."""
    words = (_Words * 2)()
    if libc.capget(ctypes.byref(_Header(CAPSET_VERSION_3, 0)), words):
        raise OSError(ctypes.get_errno(), "capget")
    return [n for word in words for n in (word.effective, word.permitted, word.inheritable)]
