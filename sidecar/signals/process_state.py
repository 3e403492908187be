"""Pure: what a process does, as records and as one line of text.

- Two looks a few seconds apart distinguish stopped, spinning and asleep, without any permission over the process. A
  stack dump (py-spy's text) adds the place.
- Nothing here contains values of variables: only names of functions, files, threads and kernel waits.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import Final, Literal

from sidecar.readings import Failed

# CPU use, in cores, above which a process spins, and below which it sleeps.
MIN_SPINNING_CORES: Final = 0.8
MAX_ASLEEP_CORES: Final = 0.05
ORDINARY_RANK: Final = 4  # rank of what healthy processes do, too

Role = Literal["core", "worker", "api", "other"]
ROLES: Final[tuple[Role, ...]] = ("core", "worker", "api", "other")  # the order of interest for an operator

# The kernel keeps 15 characters of a name.
_NAMES: Final = (
    ("core", re.compile(r"EngineCor|schedul", re.IGNORECASE)),
    ("worker", re.compile(r"Worker|text-generation-server|shard|_TP\d|_PP\d", re.IGNORECASE)),
    ("api", re.compile(r"APIServer|ApiServer|router|llama-server", re.IGNORECASE)),
)

# Kernel functions in which a process sleeps.
_WAITS: Final = (
    (re.compile(r"futex"), "a futex (a lock, or another thread)"),
    (re.compile(r"ep_poll|epoll"), "epoll (its event loop)"),
    (re.compile(r"poll|select"), "poll"),
    (re.compile(r"pipe|unix_stream|sock|skb|inet|tcp"), "a pipe or socket"),
    (re.compile(r"nanosleep"), "a sleep"),
    (re.compile(r"wait"), "another process"),
)
_THREAD: Final = re.compile(r'Thread (\w+) \(([a-z+]+)\)(?:: "(.*)")?')


@dataclass(frozen=True, slots=True)
class EngineProcess:
    """A process of the engine: the name it gave itself (`VLLM::EngineCore`), and its role."""

    pid: int
    name: str
    role: Role
    started: int  # ticks since boot; distinguishes it from a later process of the same pid


@dataclass(frozen=True, slots=True)
class ThreadState:
    """One thread at one moment: name, state letter, CPU seconds so far.

    `wchan`: where it sleeps in the kernel; `syscall`: the kernel's line about the call that it is in; `file`: what that
    call's first argument, a file descriptor, stands for. "" where it has none, or it cannot be read.
    """

    tid: int
    name: str
    state: str
    cpu: float
    wchan: str = ""
    syscall: str = ""
    file: str = ""


@dataclass(frozen=True, slots=True)
class ProcessLook:
    """One process at one moment. `by_thread` is bounded; `threads` counts all.

    `children_cpu`: CPU seconds of its children that
    have ended; `faults`: pages that it has waited for so far; `holds_gpu`: it has a GPU open, None where that cannot be
    read.
    """

    at: float
    state: str  # the kernel's letter
    wchan: str  # where it sleeps in the kernel; "" if it runs or this is unknown
    threads: int
    cpu: float  # seconds so far
    rss: int  # bytes
    by_thread: tuple[ThreadState, ...] = ()
    children_cpu: float = 0.0
    faults: int = 0
    holds_gpu: bool | None = None


@dataclass(frozen=True, slots=True)
class ProcessEvidence:
    """Evidence of one process: up to two looks and two stack dumps (text, or why there is none), oldest first."""

    process: EngineProcess
    looks: tuple[ProcessLook | Failed, ...] = ()
    stacks: tuple[str | Failed, ...] = ()

    def with_round(self, look: ProcessLook | Failed, stack: str | Failed | None) -> ProcessEvidence:
        """Add a look, and a dump if one was tried."""
        stacks = self.stacks if stack is None else (*self.stacks, stack)
        return replace(self, looks=(*self.looks, look), stacks=stacks)


def classify_role(name: str, listens: bool) -> Role:
    """The role of a process by its name; a listening process with an unknown name is the API."""
    for role, pattern in _NAMES:
        if pattern.search(name):
            return role  # type: ignore[return-value]
    return "api" if listens else "other"


def summarize(processes: tuple[ProcessEvidence, ...]) -> str:
    """One line for an operator: up to three processes with the worst symptom, and the number of the others."""
    if not processes:
        return "no process of the engine was found"
    ranked = sorted(
        ((*find_symptom(evidence), evidence.process) for evidence in processes),
        key=lambda found: (found[0], ROLES.index(found[2].role)),
    )
    worst = ranked[0][0]
    shown = [found for found in ranked if found[0] == worst][:3] if worst < ORDINARY_RANK else ranked[:1]
    lines = [f"{process.name} (pid {process.pid}): {symptom}" for _, symptom, process in shown]
    left = len(processes) - len(shown)
    return "; ".join(lines) + (f"; and {left} more" if left else "")


def find_symptom(evidence: ProcessEvidence) -> tuple[int, str]:
    """(rank, text): rank 0 is the most suspicious; ORDINARY_RANK is what healthy processes do, too."""
    looks = [look for look in evidence.looks if isinstance(look, ProcessLook)]
    failed = next((look.error for look in evidence.looks if isinstance(look, Failed)), None)
    if failed is not None:
        return (2, failed) if looks else (ORDINARY_RANK, failed)
    if not looks:
        return ORDINARY_RANK, "not examined"
    last = looks[-1]
    if last.state in _STATES:
        return _STATES[last.state]
    if all(look.state == "D" for look in looks):
        return 1, f"uninterruptible (D) in {last.wchan or 'the kernel'}: waiting for a driver or a disk"
    cores = _used_cores(looks)
    if cores is None:
        state = {"R": "running", "S": "asleep"}.get(last.state, f"state {last.state}")
        return ORDINARY_RANK, state + _format_wait(last)
    if cores >= MIN_SPINNING_CORES:
        return 3, f"spinning at {cores:.0%} CPU" + _format_place(evidence, _busiest_thread(looks))
    if cores >= MAX_ASLEEP_CORES:
        return ORDINARY_RANK, f"working at {cores:.0%} CPU" + _format_place(evidence, _busiest_thread(looks))
    return ORDINARY_RANK, "asleep" + _format_wait(last) + _format_place(evidence, evidence.process.pid)


_STATES: Final[dict[str, tuple[int, str]]] = {
    "T": (0, "stopped (T) by a signal; SIGCONT resumes it"),
    "t": (0, "stopped (t) by a debugger or profiler"),
    "Z": (2, "ended and not reaped by its parent (Z)"),
    "X": (2, "ended"),
}


def _used_cores(looks: list[ProcessLook]) -> float | None:
    """CPU use between the first look and the last."""
    first, last = looks[0], looks[-1]
    return (last.cpu - first.cpu) / (last.at - first.at) if last.at > first.at else None


def _busiest_thread(looks: list[ProcessLook]) -> int:
    """The thread that used most CPU between the first look and the last."""
    before = {thread.tid: thread.cpu for thread in looks[0].by_thread}
    used = {thread.tid: thread.cpu - before.get(thread.tid, 0.0) for thread in looks[-1].by_thread}
    return max(used, key=lambda tid: used[tid], default=0)


def _format_wait(look: ProcessLook) -> str:
    if not look.wchan:
        return ""
    known = next((words for pattern, words in _WAITS if pattern.search(look.wchan)), None)
    return f", waiting in {known or look.wchan}"


def _format_place(evidence: ProcessEvidence, tid: int) -> str:
    """The Python frame of a thread; "last in" unless two dumps agree."""
    frames = [frame for text in evidence.stacks if isinstance(text, str) and (frame := innermost_frame(text, tid))]
    if not frames:
        return ""
    agree = len(frames) > 1 and frames[0] == frames[-1]
    return f", {'in' if agree else 'last in'} {frames[-1]}"


def innermost_frame(dump: str, tid: int) -> str:
    """The innermost frame of a thread in py-spy's text, as `recv (zmq/sugar/socket.py:12)`; "" if there is none."""
    in_thread = False
    for line in dump.splitlines():
        heading = _THREAD.match(line)
        if heading:
            in_thread = heading[1] == str(tid)
        elif in_thread and line.startswith(" "):
            return line.strip()
    return ""
