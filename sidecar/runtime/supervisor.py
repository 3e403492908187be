"""The container's first process: forks the others, restarts them when they end, passes signals on, reaps.

    start     control alone; if it cannot start (exit code 1 or 2 before it served), the container ends with that code
    serving   SIGUSR1 from control: it serves, now the others are started
    death     a process that ends is restarted: at once, then with pauses that double while it keeps dying young; one
              that cannot be forked is tried again in the same way
    SIGTERM   (or SIGINT, or the SIGHUP of a terminal that closes, unless nohup has it ignored) to control, which
              withdraws readiness, and the relays, which finish their streams; after the last relay
              SIGUSR1 ends control, and with it the container; a control that dies before is still replaced;
              an engine that the sidecar started (engine_runner.py) gets its SIGTERM then, too

- One thread, no event loop, no file, no network: it waits in one place, for a signal. So forking it is sound, and
  little can kill it.
- It owns the listening sockets, so that no connection is refused while a process is replaced.
- Its children die with it; their orphans are reaped.
- A child is born with the watched signals blocked: none is lost before the child handles it.
"""

from __future__ import annotations

import gc
import logging
import os
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass
from typing import Final, Literal

from sidecar.runtime.limited_log import LimitedLog
from sidecar.runtime.prctl import SET_CHILD_SUBREAPER, SET_NAME, die_with, prctl

WATCHED: Final = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGCHLD, signal.SIGUSR1)
# After a life of so long a death is no sign of a crash loop.
STEADY_S: Final = 10.0
# Pauses before restarts; the first restart comes without one.
MIN_PAUSE_S, MAX_PAUSE_S = 0.1, 5.0
END_TIMEOUT_S: Final = 5.0  # control and the image server get so long to end

_log = logging.getLogger(__name__)

Kind = Literal["control", "relay", "images", "reports", "engine"]
# These accept nothing new while the container drains, and end by themselves.
SERVING: Final = ("relay", "reports")
# These are needed until the last relay has ended.
NEEDED: Final = ("images", "engine")
# What ends a process at the very end; SIGKILL unless it has children to end.
LAST_SIGNALS: Final[dict[Kind, signal.Signals]] = {"images": signal.SIGTERM, "engine": signal.SIGQUIT}


@dataclass(frozen=True, slots=True)
class Role:
    """One process to keep alive. `run` gets how often it was restarted, and returns its exit code."""

    kind: Kind
    name: str
    run: Callable[[int], int]
    sockets: tuple[socket.socket, ...]  # the listening sockets that it keeps; the others are closed in it


@dataclass(slots=True)
class _Child:
    role: Role
    pid: int = 0  # 0: not running
    born: float = 0.0
    due: float | None = None  # when it is to be started
    pause: float = 0.0
    restarts: int = -1


def pause_after(lived: float, before: float) -> float:
    """Seconds to wait before a process that lived so long is restarted; `before` is the last such pause."""
    if lived >= STEADY_S:
        return 0.0
    return min(MAX_PAUSE_S, 2 * before) if before else MIN_PAUSE_S


class Supervisor:
    """Keeps `roles` alive; the first is control. `grace`: seconds from SIGTERM until whatever still lives is killed.

    `engine_grace`: seconds more for a role of the kind `engine`, once nothing needs the engine any more.
    """

    def __init__(self, roles: Iterable[Role], grace: float, engine_grace: float = 0.0) -> None:
        self._children = [_Child(role) for role in roles]
        self._control = self._children[0]
        self._grace = grace
        self._engine_grace = engine_grace
        self._served = False
        self._deadline: float | None = None  # set by SIGTERM
        self._is_ending = False
        self._limited = LimitedLog(_log)
        self._status: int | None = None  # set when the container is to end
        self._ignores_hangup = False

    def run(self) -> int:
        """Supervise until SIGTERM has ended all, or the first start failed. Returns the container's exit code."""
        self._ignores_hangup = signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
        signal.pthread_sigmask(signal.SIG_BLOCK, WATCHED)
        prctl(SET_CHILD_SUBREAPER, 1)
        gc.collect()
        gc.freeze()  # children share the memory of what was imported here
        self._control.due = 0.0
        try:
            while self._status is None:
                now = time.monotonic()
                self._start_due(now)
                self._handle(_wait(self._next(), now))
                self._reap(time.monotonic())
                self._end_if_over(time.monotonic())
        finally:
            self._end_all()
        return self._status

    # --- what happens ---

    def _handle(self, received: signal.struct_siginfo | None) -> None:
        if received is None or received.si_signo == signal.SIGCHLD:
            return
        if received.si_signo == signal.SIGUSR1:
            if received.si_pid == self._control.pid and not self._served:
                self._served = True
                for child in self._children[1:]:
                    child.due = 0.0
        elif received.si_signo == signal.SIGHUP and self._ignores_hangup:
            pass  # it is received though ignored, as it is blocked
        elif self._deadline is None:
            self._drain(time.monotonic())

    def _drain(self, now: float) -> None:
        """Accept nothing new from now on; what is under way may finish."""
        self._deadline = now + self._grace
        for child in self._children:
            if child.role.kind in SERVING:
                child.due = None
                for sock in child.role.sockets:
                    sock.close()  # the relays close theirs; these would keep new connections waiting in the kernel
            if child.role.kind not in NEEDED:
                _kill(child, signal.SIGTERM)
        if self._control.due is not None:
            self._control.due = 0.0

    def _reap(self, now: float) -> None:
        with suppress(ChildProcessError):  # none is left
            while (ended := os.waitpid(-1, os.WNOHANG))[0]:
                for child in self._children:
                    if child.pid == ended[0]:  # any other was an orphan of a child
                        self._ended(child, os.waitstatus_to_exitcode(ended[1]), now)

    def _ended(self, child: _Child, code: int, now: float) -> None:
        pid, child.pid = child.pid, 0
        if child is self._control and code > 0 and not self._served:
            self._status = code  # it has logged why
            return
        if self._deadline is not None and (child.role.kind in SERVING or self._is_ending):
            return
        child.pause = pause_after(now - child.born, child.pause)
        child.due = now + child.pause
        _log.error("%s (pid %d) ended with %s; restarting it", child.role.name, pid, _how(code))

    def _end_if_over(self, now: float) -> None:
        """After SIGTERM: when the relays are gone, control has done its work."""
        if self._deadline is None or self._status is not None:
            return
        if any(child.pid for child in self._children if child.role.kind == "relay"):
            if now > self._deadline:
                _log.error("not all processes ended within %.0f s; killing them", self._grace)
                self._status = 1
        elif not self._is_ending:
            self._is_ending = True
            self._control.due, self._deadline = None, now + END_TIMEOUT_S + self._engine_grace
            _kill(self._control, signal.SIGUSR1)
            for child in self._engines():
                child.due = None
                _kill(child, signal.SIGTERM)
        if self._is_ending and not self._control.pid and not any(child.pid for child in self._engines()):
            self._status = 0
        elif self._is_ending and now > self._deadline:
            self._status = 1

    def _engines(self) -> list[_Child]:
        return [child for child in self._children if child.role.kind == "engine"]

    def _next(self) -> float | None:
        """When something is due even if no signal comes."""
        times = self._deadline, *(child.due for child in self._children)
        return min((time for time in times if time is not None), default=None)

    # --- processes ---

    def _start_due(self, now: float) -> None:
        for child in self._children:
            if child.due is not None and child.due <= now:
                self._start(child, now)
                if self._deadline is not None and child is self._control:
                    _kill(child, signal.SIGTERM)  # it stays blocked until the child handles it

    def _start(self, child: _Child, now: float) -> None:
        child.due, child.born = None, now
        child.restarts += 1
        try:
            child.pid = self._fork(child)
        except OSError as e:  # too many processes, or too little memory: that can pass
            child.restarts -= 1
            child.pause = pause_after(0.0, child.pause)
            child.due = now + child.pause
            self._limited.error(child.role.name, "cannot start %s (%s); trying again", child.role.name, e.strerror)

    def _fork(self, child: _Child) -> int:
        parent = os.getpid()
        sys.stdout.flush()
        sys.stderr.flush()
        pid = os.fork()
        if pid:
            return pid
        status = 1
        try:
            die_with(parent)
            if child.role.kind != "engine":  # whose program would inherit it
                signal.signal(signal.SIGHUP, signal.SIG_IGN)  # a terminal that closes sends it to all: they drain
            prctl(SET_NAME, f"sidecar {child.role.name}".encode()[:15])
            for sock in [sock for other in self._children for sock in other.role.sockets]:
                if sock not in child.role.sockets:
                    sock.close()
            status = child.role.run(child.restarts)
        except BaseException:  # noqa: BLE001  the border of the process
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)

    def _end_all(self) -> None:
        """The image server may end by itself, and the engine's runner kills its engine; the others are killed."""
        for child in self._children:
            child.due = None
            _kill(child, LAST_SIGNALS.get(child.role.kind, signal.SIGKILL))
        until = time.monotonic() + END_TIMEOUT_S
        while any(child.pid for child in self._children):
            if time.monotonic() > until:
                for child in self._children:
                    _kill(child, signal.SIGKILL)
            _wait(until if time.monotonic() < until else None, time.monotonic())
            for child in self._children:
                if child.pid and os.waitpid(child.pid, os.WNOHANG)[0]:
                    child.pid = 0


def _wait(until: float | None, now: float) -> signal.struct_siginfo | None:
    """The next watched signal; None at `until`."""
    if until is None:
        return signal.sigwaitinfo(WATCHED)
    return signal.sigtimedwait(WATCHED, max(0.0, until - now))


def _kill(child: _Child, number: signal.Signals) -> None:
    if child.pid:  # not reaped yet, so the process id is still its own
        os.kill(child.pid, number)


def _how(code: int) -> str:
    return f"exit code {code}" if code >= 0 else f"signal {signal.Signals(-code).name}"
