"""Pure: what a process was seen doing, as records, and in one line of words.

Two looks a few seconds apart tell stopped, spinning and asleep apart without any permission over the process; a stack dump
(py-spy's text) adds where. Nothing here holds a value of a variable: names of functions, files, threads and kernel waits only.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import Final, Literal

from sidecar.readings import Failed

SPINNING: Final = 0.8  # cores' worth of CPU from which a process spins
ORDINARY: Final = 4  # rank of what healthy processes do, too: then the core is the one to hear of
ASLEEP: Final = 0.05  # cores' worth of CPU below which it sleeps

Role = Literal["core", "worker", "api", "other"]
ROLES: Final[tuple[Role, ...]] = (
    "core",
    "worker",
    "api",
    "other",
)  # the order in which an operator wants to hear of them

# The kernel keeps 15 letters of a name; the rest may not be readable.
_NAMES: Final = (
    ("core", re.compile(r"EngineCor|schedul", re.IGNORECASE)),
    ("worker", re.compile(r"Worker|text-generation-server|shard|_TP\d|_PP\d", re.IGNORECASE)),
    ("api", re.compile(r"APIServer|ApiServer|router|llama-server", re.IGNORECASE)),
)

# What the kernel calls the places where an idle process sleeps.
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
    """A process of the engine: its name as it calls itself (`VLLM::EngineCore`), and what it is for."""

    pid: int
    name: str
    role: Role
    started: int  # ticks since boot; tells a process from a later one of the same pid


@dataclass(frozen=True, slots=True)
class ThreadState:
    """One thread at one moment: name, state letter, CPU seconds so far."""

    tid: int
    name: str
    state: str
    cpu: float


@dataclass(frozen=True, slots=True)
class ProcessLook:
    """One process at one moment. `state` is the kernel's letter; `wchan` where it sleeps in the kernel, "" where it does not or
    may not be known; `cpu` seconds so far, `rss` bytes. `by_thread` is bounded, `threads` counts all."""

    at: float
    state: str
    wchan: str
    threads: int
    cpu: float
    rss: int
    by_thread: tuple[ThreadState, ...] = ()


@dataclass(frozen=True, slots=True)
class ProcessEvidence:
    """All that is known of one process: up to two looks and two stack dumps (text, or why there is none), oldest first."""

    process: EngineProcess
    looks: tuple[ProcessLook | Failed, ...] = ()
    stacks: tuple[str | Failed, ...] = ()

    def more(self, look: ProcessLook | Failed, stack: str | Failed | None) -> ProcessEvidence:
        """With one more look, and one more dump where one was tried."""
        stacks = self.stacks if stack is None else (*self.stacks, stack)
        return replace(self, looks=(*self.looks, look), stacks=stacks)


def role_of(name: str, listens: bool) -> Role:
    """What a process is for, by its name; one that listens and has no telling name is the API."""
    for role, pattern in _NAMES:
        if pattern.search(name):
            return role  # type: ignore[return-value]
    return "api" if listens else "other"


def summary(seen: tuple[ProcessEvidence, ...]) -> str:
    """One line for an operator: the worst processes first, at most three, and how many more there are."""
    if not seen:
        return "no process of the engine was seen"
    told = sorted(seen, key=lambda one: (symptom(one)[0], ROLES.index(one.process.role)))
    worst = symptom(told[0])[0]
    picked = [one for one in told if symptom(one)[0] == worst][:3] if worst < ORDINARY else told[:1]
    lines = [f"{one.process.name} (pid {one.process.pid}): {symptom(one)[1]}" for one in picked]
    left = len(seen) - len(picked)
    return "; ".join(lines) + (f"; and {left} more" if left else "")


def symptom(seen: ProcessEvidence) -> tuple[int, str]:
    """(rank, the most telling is 0; what the process does, in words). What healthy processes do, too, is ORDINARY, all alike."""
    looks = [look for look in seen.looks if isinstance(look, ProcessLook)]
    failed = next((look.error for look in seen.looks if isinstance(look, Failed)), None)
    if failed is not None:
        return (2, failed) if looks else (ORDINARY, failed)
    if not looks:
        return ORDINARY, "not looked at"
    last = looks[-1]
    if last.state in _STATES:
        return _STATES[last.state]
    if all(look.state == "D" for look in looks):
        return 1, f"uninterruptible (D) in {last.wchan or 'the kernel'}: it waits for a driver or a disk"
    share = _share(looks)
    if share is None:
        return ORDINARY, {"R": "running", "S": "asleep"}.get(last.state, f"state {last.state}") + _waiting(last)
    if share >= SPINNING:
        return 3, f"spinning at {share:.0%} CPU" + _where(seen, _busiest(looks))
    if share >= ASLEEP:
        return ORDINARY, f"working at {share:.0%} CPU" + _where(seen, _busiest(looks))
    return ORDINARY, "asleep" + _waiting(last) + _where(seen, seen.process.pid)


_STATES: Final[dict[str, tuple[int, str]]] = {
    "T": (0, "stopped (T): a signal stopped it, and SIGCONT lets it go on"),
    "t": (0, "stopped (t): a debugger or profiler holds it"),
    "Z": (2, "ended, and its parent has not noticed (Z)"),
    "X": (2, "ended"),
}


def _share(looks: list[ProcessLook]) -> float | None:
    """Cores' worth of CPU between the first look and the last."""
    first, last = looks[0], looks[-1]
    return (last.cpu - first.cpu) / (last.at - first.at) if last.at > first.at else None


def _busiest(looks: list[ProcessLook]) -> int:
    """The thread that used most CPU between the first look and the last."""
    before = {thread.tid: thread.cpu for thread in looks[0].by_thread}
    used = {thread.tid: thread.cpu - before.get(thread.tid, 0.0) for thread in looks[-1].by_thread}
    return max(used, key=lambda tid: used[tid], default=0)


def _waiting(look: ProcessLook) -> str:
    """Where the kernel has it wait."""
    if not look.wchan:
        return ""
    known = next((words for pattern, words in _WAITS if pattern.search(look.wchan)), None)
    return f", waiting in {known or look.wchan}"


def _where(seen: ProcessEvidence, tid: int) -> str:
    """The Python frame of that thread, and whether both dumps had it."""
    tops = [top(text, tid) for text in seen.stacks if isinstance(text, str)]
    known = [frame for frame in tops if frame]
    if not known:
        return ""
    both = len(known) > 1 and known[0] == known[-1]
    return f", {'in' if both else 'last in'} {known[-1]}"


def top(dump: str, tid: int) -> str:
    """The innermost frame of a thread in py-spy's text, such as `recv (zmq/sugar/socket.py:12)`; "" where it has none."""
    found = False
    for line in dump.splitlines():
        heading = _THREAD.match(line)
        if heading:
            found = heading[1] == str(tid)
        elif found and line.startswith(" "):
            return line.strip()
    return ""
