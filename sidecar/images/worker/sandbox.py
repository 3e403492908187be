"""Take from an image worker what a codec that a hostile image has taken over could use.

Rules: capabilities go first, while there is one thread. After the warm-up, before the first byte from outside, `enter`
takes the rest: the environment, its copy in /proc included; all descriptors but those that are named; files, by
Landlock; and all system calls that no job needs, by a seccomp filter. None of it needs a privilege, and none can be
undone. What a kernel lacks is reported, and the rest holds.

In a pod that may read stacks (--stack-dumps on) the sidecar is root with SYS_PTRACE, which a codec that a hostile image
has taken over must not have. Dropped are the effective, permitted, inheritable and ambient sets and, if allowed, the
bounding set. With NO_NEW_PRIVS no program that is started later can regain any of them.
"""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Final

from sidecar.images.worker import landlock, seccomp
from sidecar.runtime.prctl import CAP_AMBIENT, CAPBSET_DROP, SET_NO_NEW_PRIVS, prctl

AMBIENT_CLEAR_ALL: Final = 4
CAPSET_VERSION_3: Final = 0x20080522  # two words of 32 capabilities
MAX_CAPABILITIES: Final = 64
PROBE_TIMEOUT_S: Final = 20.0
ENV_START, ENV_END = 50, 51  # fields of /proc/self/stat, counted from 1: where the environment lies


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


def enter(descriptors: Iterable[int]) -> tuple[str, ...]:
    """Confine this process, which keeps `descriptors` open. Returns what could not be done, in words.

    Call this before other threads exist. What is imported later cannot be found.
    """
    if sys.platform != "linux":
        return (f"seccomp: {sys.platform}", f"Landlock: {sys.platform}")
    _erase_environment()
    _close_all_but(set(descriptors))
    done = (("Landlock", landlock.install()), ("seccomp", seccomp.install()))
    return tuple(f"{name}: {why}" for name, why in done if why)


def probe() -> tuple[str, ...]:
    """What `enter` cannot do on this machine, found by a process that tries it."""
    code = (
        f"from {__name__} import drop_capabilities, enter; drop_capabilities(); print(*enter((1,)), sep='\\n', end='')"
    )
    try:
        tried = subprocess.run((sys.executable, "-c", code), stdout=subprocess.PIPE, timeout=PROBE_TIMEOUT_S, text=True)
    except (OSError, subprocess.TimeoutExpired) as e:
        return (f"not known ({type(e).__name__})",)
    if tried.returncode:
        return (f"not known (a process that tries ends with {tried.returncode})",)
    return tuple(tried.stdout.splitlines())


def _erase_environment() -> None:
    """Forget the environment, and overwrite the kernel's view of it: /proc/self/environ."""
    os.environ.clear()
    fields = Path("/proc/self/stat").read_text("ascii", "replace").rpartition(")")[2].split()
    start, end = (int(fields[field - 3]) for field in (ENV_START, ENV_END))
    if start and end > start:
        ctypes.memset(start, 0, end - start)


def _close_all_but(kept: set[int]) -> None:
    """Close all other descriptors; 0 to 2, which libraries read and write by number, lead nowhere instead."""
    nowhere = os.open(os.devnull, os.O_RDWR)
    for standard in {0, 1, 2} - kept:
        os.dup2(nowhere, standard)
    for fd in map(int, os.listdir("/proc/self/fd")):  # noqa: PTH208
        if fd not in kept and fd > 2:
            try:
                os.close(fd)
            except OSError:  # the one that listed them
                continue


def read_capabilities(libc: ctypes.CDLL) -> list[int]:
    """The words of this thread's effective, permitted and inheritable capabilities."""
    words = (_Words * 2)()
    if libc.capget(ctypes.byref(_Header(CAPSET_VERSION_3, 0)), words):
        raise OSError(ctypes.get_errno(), "capget")
    return [n for word in words for n in (word.effective, word.permitted, word.inheritable)]
