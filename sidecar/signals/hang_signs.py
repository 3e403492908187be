"""Pure: looks at the engine's processes and their stacks, one after the other -> the signs of a hang.

Rules:
- A series begins again where a look failed or came late: what happened in between is unknown.
- The inner processes (cores and workers, else the front end) say what the engine waits for. Of all processes, also of
  short-lived children, counts which CPU time they used.
- A thread waits for a lock only if every other Python thread waits for something on the host, too: a call into a
  library of the GPU looks the same from the kernel. Where stacks cannot be read, nothing is said.
- An engine core that waits for work is not in a lock: it received none, or is paused.
"""

from __future__ import annotations

import platform
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final

from sidecar.readings import Failed, HangSigns
from sidecar.signals import stack_dump
from sidecar.signals.engine_processes import ENDED, REPLACED
from sidecar.signals.process_state import EngineProcess, ProcessLook, ThreadState, innermost_frame

# CPU use, in cores: of inner processes and helpers below which they do nothing, the same of front ends, which take new
# requests and scrapes meanwhile, and from which one is busy (less than a core: what spins shares cores with others).
IDLE_CORES: Final = 0.05
IDLE_API_CORES: Final = 0.3
BUSY_CORES: Final = 0.25
# Pages a second for which the engine waits, and the share of the time in which all its tasks do, that are pressure.
PRESSURE_FAULTS_PER_S: Final = 100.0
PRESSURE_SHARE: Final = 0.2

COMPILERS: Final = re.compile(
    r"(nvcc|ptxas|cicc|nvlink|cudafe\+\+|fatbinary|ld(\.\w+)?|collect2|cc1(plus)?|as|(\w+-)*(gcc|g\+\+|cc|c\+\+)(-[\d.]+)?"
    r"|clang(\+\+)?(-[\d.]+)?|hipcc|lld|ninja|cmake|bisheng)"
)

# What a Python stack is in, by the names of its functions and files: the first pattern that is found.
FRAMES: Final = (
    ("compiler", re.compile(r"triton/(compiler|runtime/(jit|build|autotuner))|torch/_(inductor|dynamo)|flashinfer/jit|"
                            r"cpp_extension|deep_gemm/jit|cutlass|tvm|tilelang|numba/core")),
    ("transfer", re.compile(r"kv_transfer|kv_connector|nixl|mooncake|lmcache|disaggregation/")),
    ("collective", re.compile(r"nccl|all_reduce|all_gather|reduce_scatter|broadcast_|barrier \(|distributed_c10d")),
)  # fmt: skip
# The idle wait of vLLM's core, where it receives its requests.
AWAITS_WORK: Final = re.compile(r"_process_input_queue|recv_requests")
# Frames of the queue above it, and it.
IDLE_FRAMES: Final = 3
# Files whose functions wait on the host, and nothing else.
HOST_WAIT: Final = re.compile(
    r"\((?:.*/)?(threading|queue|selectors|socket|subprocess|connection|synchronize|_base|runners|base_events|zmq/.*|"
    r"multiprocessing/.*|concurrent/futures/.*|asyncio/.*|uvloop.*|tqdm/_monitor|prometheus_client/.*)\.(?:py|pyx|pyc)"
)
AT_WORK: Final = "at work"
_THREAD: Final = re.compile(r"Thread (\w+) \(")

# Numbers of system calls by machine: those of which the first argument is a file, and waits for a lock.
_FUTEX: Final = {"x86_64": ("202", "449", "455"), "aarch64": ("98", "449", "455")}.get(platform.machine(), ())
# Kernel functions in which a thread sleeps.
_WAITS: Final = (
    ("lock", re.compile(r"futex")),
    ("network", re.compile(r"inet_|tcp|sk_wait|wait_woken|unix_stream|skb_")),
    ("loop", re.compile(r"ep_poll|epoll")),
    ("poll", re.compile(r"poll|select")),
    ("sleep", re.compile(r"nanosleep")),
)
_FROZEN: Final = re.compile(r"refrigerator|freezer_trap|cgroup_freeze")
_SLOW_FILES: Final = ("/dev/nvidia", "/dev/kfd", "/dev/dri/")


@dataclass(frozen=True, slots=True)
class MemoryLook:
    """Memory at one moment: the share of the time in which all tasks wait for it, and processes killed so far."""

    stalled: float | None = None
    killed: int | None = None
    frozen: bool | None = None  # of the engine's control group


@dataclass(frozen=True, slots=True)
class TreeLook:
    """All processes of the engine at one moment. `stacks`: py-spy's text of the inner ones, or why there is none."""

    at: float
    processes: tuple[EngineProcess, ...]
    looks: dict[int, ProcessLook | Failed]
    stacks: dict[int, str | Failed]
    memory: MemoryLook = MemoryLook()


def signs_of(first: TreeLook, before: TreeLook, last: TreeLook, steady: bool) -> HangSigns:
    """The signs of a series of looks. `steady`: the places of the inner processes were the same in all of them."""
    inner = inner_processes(first.processes)
    every = key_processes(first.processes)
    now = {process.pid: last.looks.get(process.pid) for process in every}
    seen = {pid: look for pid, look in now.items() if isinstance(look, ProcessLook)}
    ends = [look for process in inner if has_ended(look := now[process.pid]) or _is_zombie(look)]
    return HangSigns(
        seconds=last.at - first.at,
        lost=bool(ends),
        debugged=any(look.state == "t" for look in seen.values()),
        frozen=_is_frozen(last, seen.values()),
        stopped=any(look.state == "T" for look in seen.values()),
        compilers=tuple(sorted({p.name for p in last.processes if COMPILERS.fullmatch(p.name)})),
        cpu=_cpu(first, before, last),
        wait=_wait(last, every),
        frames=_frames(last, inner),
        same_stacks=steady if all(place(last, process) is not None for process in every) else None,
        memory=_memory(first, last),
        where=_where(every, now),
    )


def key_processes(processes: Iterable[EngineProcess]) -> tuple[EngineProcess, ...]:
    """The inner processes and the front ends: without any of them nothing is served."""
    return tuple(process for process in processes if process.role != "other")


def has_ended(look: ProcessLook | Failed | None) -> bool:
    """Whether the process of a look is no more."""
    return isinstance(look, Failed) and look.error in (ENDED, REPLACED)


def inner_processes(processes: Iterable[EngineProcess]) -> tuple[EngineProcess, ...]:
    """Cores and workers; where there are none, the front end computes itself."""
    every = tuple(processes)
    inner = tuple(process for process in every if process.role in ("core", "worker"))
    return inner or tuple(process for process in every if process.role == "api")


def is_steady(before: TreeLook, after: TreeLook) -> bool:
    """Whether every key process is where it was."""
    return all(place(before, process) == place(after, process) for process in key_processes(after.processes))


def place(look: TreeLook, process: EngineProcess) -> str | None:
    """Where a process's main thread is: its Python stack, else the kernel's; None where neither can be read.

    A front end answers probes and new requests meanwhile: it has one place, unless it waits for a lock.
    """
    stack = look.stacks.get(process.pid)
    if process.role == "api" and _wait_of_process(look, process) != "lock":
        return AT_WORK
    if isinstance(stack, str) and (frames := stack_of(stack, process.pid)):
        return frames
    thread = _main_thread(look, process)
    if thread is None or not _is_native(stack):
        return None
    return f"{thread.wchan} {thread.syscall}" if thread.wchan or thread.syscall else None


def stack_of(dump: str, tid: int) -> str:
    """The frames of one thread in py-spy's text, without its state."""
    found, inside = [], False
    for line in dump.splitlines():
        if heading := _THREAD.match(line):
            inside = heading[1] == str(tid)
        elif inside and line.strip():
            found.append(line.strip())
    return "\n".join(found)


def wait_of(thread: ThreadState) -> str | None:
    """What a thread waits for in the kernel; None where it runs or that cannot be read."""
    if thread.file.startswith(_SLOW_FILES):
        return "device"
    if thread.state == "D":
        return "disk"
    if thread.syscall.partition(" ")[0] in _FUTEX:
        return "lock"
    return next((kind for kind, pattern in _WAITS if thread.wchan and pattern.search(thread.wchan)), None)


def _is_native(stack: str | Failed | None) -> bool:
    """Whether there is no Python in a process, so that its kernel waits say all."""
    return isinstance(stack, Failed) and stack.error == stack_dump.FOREIGN


def _main_thread(look: TreeLook, process: EngineProcess) -> ThreadState | None:
    found = look.looks.get(process.pid)
    threads = found.by_thread if isinstance(found, ProcessLook) else ()
    return next((thread for thread in threads if thread.tid == process.pid), None)


def _wait(last: TreeLook, processes: tuple[EngineProcess, ...]) -> str | None:
    """What the processes wait for: what is not on the host first, a lock only where nothing else is possible."""
    inner = inner_processes(processes)
    waits = [_wait_of_process(last, process) for process in inner]
    waits += [_wait_of_process(last, process) or AT_WORK for process in processes if process not in inner]
    for kind in ("device", "disk", "network"):
        if kind in waits:
            return kind
    return "lock" if "lock" in waits and None not in waits else None


def _wait_of_process(last: TreeLook, process: EngineProcess) -> str | None:
    """What its main thread waits for, or any thread where that is a device; "work" where a core waits for some."""
    look, stack = last.looks.get(process.pid), last.stacks.get(process.pid)
    if not isinstance(look, ProcessLook):
        return None
    waits = [wait_of(thread) for thread in look.by_thread]
    if "device" in waits or "disk" in waits:
        return "device" if "device" in waits else "disk"
    main = _main_thread(last, process)
    wait = wait_of(main) if main is not None else None
    if isinstance(stack, str):
        if AWAITS_WORK.search("\n".join(stack_of(stack, process.pid).splitlines()[:IDLE_FRAMES])):
            return "work"
        if look.holds_gpu is not False and not _is_on_host(stack):
            return "device" if wait == "lock" else wait
        return wait
    return wait if _is_native(stack) and look.holds_gpu is False else None


def _is_on_host(dump: str) -> bool:
    """Whether every Python thread waits in a function that waits on the host."""
    tids = [int(found[1], 0) for line in dump.splitlines() if (found := _THREAD.match(line))]
    frames = [innermost_frame(dump, tid) for tid in tids]
    return bool(frames) and all(HOST_WAIT.search(frame) for frame in frames if frame)


def _frames(last: TreeLook, inner: tuple[EngineProcess, ...]) -> str | None:
    """What any inner process's main thread is in."""
    dumps = ((process.pid, last.stacks.get(process.pid)) for process in inner)
    mains = [stack_of(dump, pid) for pid, dump in dumps if isinstance(dump, str)]
    return next((name for name, pattern in FRAMES for text in mains if pattern.search(text)), None)


def _cpu(first: TreeLook, before: TreeLook, last: TreeLook) -> str | None:
    """CPU use of all processes, the largest of the whole series and of its end; None where one cannot be read."""
    kinds = [_cpu_between(early, last) for early in (first, before) if last.at > early.at]
    if not kinds or None in kinds:
        return None
    return max((kind for kind in kinds if kind), key=("none", "some", "busy").index)


def _cpu_between(early: TreeLook, last: TreeLook) -> str | None:
    seconds, found = last.at - early.at, []
    for process in last.processes:
        late, then = last.looks.get(process.pid), early.looks.get(process.pid)
        if not isinstance(late, ProcessLook):
            if has_ended(late):
                continue
            return None
        before = then.cpu + then.children_cpu if isinstance(then, ProcessLook) else 0.0  # a new child: all that it used
        used = late.cpu + late.children_cpu - before  # with those of compilers too quick to be seen
        idle = IDLE_API_CORES if process.role == "api" else IDLE_CORES
        cores = used / seconds
        found.append("none" if cores < idle else "busy" if cores >= BUSY_CORES else "some")
    ended = {p.pid for p in early.processes if p.role == "other"} - {p.pid for p in last.processes}
    kinds = [*found, *(["some"] if ended else [])]  # a helper came and went: something works
    return max(kinds, key=("none", "some", "busy").index, default=None)


def _is_zombie(look: ProcessLook | Failed | None) -> bool:
    return isinstance(look, ProcessLook) and look.state in "ZX"


def _is_frozen(last: TreeLook, seen: Iterable[ProcessLook]) -> bool | None:
    threads = [thread for look in seen for thread in look.by_thread]
    if last.memory.frozen or any(_FROZEN.search(thread.wchan) for thread in threads):
        return True
    return None if last.memory.frozen is None and not any(thread.wchan for thread in threads) else False


def _memory(first: TreeLook, last: TreeLook) -> str | None:
    if first.memory.killed is not None and last.memory.killed is not None and last.memory.killed > first.memory.killed:
        return "oom"
    waited = sum(
        look.faults - then.faults
        for pid, look in last.looks.items()
        if isinstance(look, ProcessLook) and isinstance(then := first.looks.get(pid), ProcessLook)
    )
    seconds = last.at - first.at
    if seconds > 0 and waited / seconds >= PRESSURE_FAULTS_PER_S:
        return "pressure"
    if last.memory.stalled is None:
        return None
    return "pressure" if last.memory.stalled >= PRESSURE_SHARE else "none"


def _where(processes: tuple[EngineProcess, ...], now: dict[int, ProcessLook | Failed | None]) -> str:
    """The first process that does not merely sleep, else the first one."""
    odd = [p for p in processes if not isinstance(look := now[p.pid], ProcessLook) or look.state not in "SR"]
    return next((f"{p.name} (pid {p.pid})" for p in (*odd, *processes)), "")
