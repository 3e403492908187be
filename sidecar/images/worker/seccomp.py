"""A seccomp filter for an image worker: only the system calls that a job needs.

Rules: an allow-list, so that a call which a later kernel brings is refused, too. What is not on it fails with EPERM,
and code that tries is none the wiser; a process that changes its architecture is killed. Neither processes nor threads
may be started: no decoder needs one, and nothing multiplies the CPU time of a job. Of some calls the arguments are
checked: no memory becomes executable, descriptors become neither signals nor terminals' input. No call on the list
takes a path or an address. The filter holds for all threads, and for as long as the process lives.

The numbers are those of the kernel's headers; on another architecture than these two there is no filter.
"""

from __future__ import annotations

import ctypes
import errno
import os
import struct
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Final

SET_MODE_FILTER: Final = 1
FLAG_TSYNC: Final = 1  # all threads of the process
ALLOW: Final = 0x7FFF0000
KILL_PROCESS: Final = 0x80000000
ERRNO: Final = 0x00050000
REFUSE: Final = ERRNO | errno.EPERM

# linux/filter.h: load a word, compare, return
LOAD, JUMP_EQUAL, JUMP_ANY_BIT, RETURN = 0x20, 0x15, 0x45, 0x06
# offsets in struct seccomp_data; the lower half of an argument, on these little-endian machines
NUMBER, ARCHITECTURE, ARGUMENTS = 0, 4, 16

PROT_EXEC: Final = 4
FIONBIO, FIOCLEX = 0x5421, 0x5451
F_GETFD, F_SETFD, F_GETFL, F_SETFL = 1, 2, 3, 4


@dataclass(frozen=True, slots=True)
class Machine:
    """An architecture: its name in seccomp_data, and the number of each call that is decided here."""

    audit: int
    seccomp: int
    calls: dict[str, int]


# Without conditions: a connection and its bytes; memory; locks; signals and timers of its own.
PLAIN: Final = (
    "recvfrom", "sendto", "read", "write", "close", "poll", "ppoll", "accept4", "getsockname", "recvmsg", "sendmsg",
    "munmap", "mremap", "brk", "madvise", "futex", "sched_yield", "sched_getaffinity",
    "gettid", "getpid", "getcpu", "rt_sigaction", "rt_sigprocmask", "rt_sigreturn", "sigaltstack", "restart_syscall",
    "setitimer", "getitimer", "clock_gettime", "clock_getres", "clock_nanosleep", "nanosleep", "gettimeofday",
    "getrusage", "getrandom", "lseek", "exit", "exit_group",
)  # fmt: skip

# call -> which argument, which test, and with which numbers
CONDITIONS: Final[dict[str, tuple[int, str, tuple[int, ...]]]] = {
    "mmap": (2, "lacks", (PROT_EXEC,)),
    "mprotect": (2, "lacks", (PROT_EXEC,)),
    "ioctl": (1, "is", (FIONBIO, FIOCLEX)),  # TIOCSTI would type into the operator's terminal
    "fcntl": (1, "is", (F_GETFD, F_SETFD, F_GETFL, F_SETFL)),  # F_SETOWN would send signals to any process of the user
    "prlimit64": (0, "is", (0,)),  # its own limits, which it can only lower
}
X86_64: Final = Machine(
    0xC000003E,
    317,
    {
        "read": 0, "write": 1, "close": 3, "poll": 7, "lseek": 8, "mmap": 9, "mprotect": 10, "munmap": 11, "brk": 12,
        "rt_sigaction": 13, "rt_sigprocmask": 14, "rt_sigreturn": 15, "ioctl": 16, "sched_yield": 24, "mremap": 25,
        "madvise": 28, "nanosleep": 35, "getitimer": 36, "setitimer": 38, "getpid": 39, "sendto": 44, "recvfrom": 45,
        "sendmsg": 46, "recvmsg": 47, "getsockname": 51, "exit": 60, "fcntl": 72, "gettimeofday": 96,
        "getrusage": 98, "sigaltstack": 131, "gettid": 186, "futex": 202, "sched_getaffinity": 204,
        "restart_syscall": 219, "clock_gettime": 228, "clock_getres": 229, "clock_nanosleep": 230, "exit_group": 231,
        "ppoll": 271, "accept4": 288, "prlimit64": 302, "getcpu": 309, "getrandom": 318,
    },
)  # fmt: skip
AARCH64: Final = Machine(
    0xC00000B7,
    277,
    {
        "fcntl": 25, "ioctl": 29, "close": 57, "lseek": 62, "read": 63, "write": 64, "ppoll": 73, "exit": 93,
        "exit_group": 94, "futex": 98, "nanosleep": 101, "getitimer": 102, "setitimer": 103,
        "clock_gettime": 113, "clock_getres": 114, "clock_nanosleep": 115, "sched_getaffinity": 123,
        "sched_yield": 124, "restart_syscall": 128, "sigaltstack": 132, "rt_sigaction": 134, "rt_sigprocmask": 135,
        "rt_sigreturn": 139, "getrusage": 165, "getcpu": 168, "gettimeofday": 169, "getpid": 172, "gettid": 178,
        "getsockname": 204, "sendto": 206, "recvfrom": 207, "sendmsg": 211, "recvmsg": 212, "brk": 214, "munmap": 215,
        "mremap": 216, "mmap": 222, "mprotect": 226, "madvise": 233, "accept4": 242, "prlimit64": 261,
        "getrandom": 278,
    },
)  # fmt: skip
MACHINES: Final = {"x86_64": X86_64, "aarch64": AARCH64}

Instruction = tuple[int, int, int, int]  # code, jump if true, jump if false, constant


def program(machine: Machine) -> list[Instruction]:
    """The filter for one architecture, in the order of the lists above."""
    return list(_instructions(machine))


def _instructions(machine: Machine) -> Iterator[Instruction]:
    yield LOAD, 0, 0, ARCHITECTURE
    yield JUMP_EQUAL, 1, 0, machine.audit
    yield RETURN, 0, 0, KILL_PROCESS
    yield LOAD, 0, 0, NUMBER
    for name in PLAIN:
        if name in machine.calls:  # aarch64 has no poll
            yield from _if_number(machine.calls[name], [(RETURN, 0, 0, ALLOW)])
    for name, (argument, test, numbers) in CONDITIONS.items():
        yield from _if_number(machine.calls[name], [(LOAD, 0, 0, ARGUMENTS + 8 * argument), *_decide(test, numbers)])
    yield RETURN, 0, 0, REFUSE


def _if_number(number: int, then: Sequence[Instruction]) -> Iterator[Instruction]:
    yield JUMP_EQUAL, 0, len(then), number
    yield from then


def _decide(test: str, numbers: tuple[int, ...]) -> Iterator[Instruction]:
    """Allow or refuse by the argument that was loaded."""
    code, then, otherwise = {
        "is": (JUMP_EQUAL, ALLOW, REFUSE),
        "lacks": (JUMP_ANY_BIT, REFUSE, ALLOW),
    }[test]
    for number in numbers:
        yield code, 0, 1, number
        yield RETURN, 0, 0, then
    yield RETURN, 0, 0, otherwise


class _Program(ctypes.Structure):
    _fields_ = (("length", ctypes.c_ushort), ("instructions", ctypes.c_char_p))


def install() -> str:
    """Filter the calls of all threads of this process. Returns why that was not possible; "" if it was.

    The process must have NO_NEW_PRIVS.
    """
    machine = MACHINES.get(os.uname().machine)
    if sys.platform != "linux" or machine is None:
        return f"no filter for {os.uname().machine}"
    instructions = program(machine)
    packed = b"".join(struct.pack("HBBI", *instruction) for instruction in instructions)
    given = _Program(len(instructions), packed)
    libc = ctypes.CDLL(None, use_errno=True)
    number, mode, flags = ctypes.c_long(machine.seccomp), ctypes.c_uint(SET_MODE_FILTER), ctypes.c_uint(FLAG_TSYNC)
    result = libc.syscall(number, mode, flags, ctypes.byref(given))
    if result > 0:
        return "a thread has a filter of its own"
    return os.strerror(ctypes.get_errno()) if result else ""
