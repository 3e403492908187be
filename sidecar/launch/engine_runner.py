"""The engine as a child process: start COMMAND, probe it as kubelet would, kill and restart it.

For hosts without a kubelet (`sidecar run -- COMMAND`). One process of the supervisor's; it carries no request.

    probes    `verdict.json` every 5 s, as in the printed manifest: three failures in a row are a kill, and none counts
              before the engine has served its first token. So the kill policy is that of a pod, and a missing or stale
              verdict kills nothing.
    kill      SIGTERM, 10 s, SIGKILL
    exit      an engine that ends, for any reason, is started again: at once, then with kubelet's back-off (10 s,
              doubled up to 5 min, forgotten after a life of 10 min)
    SIGTERM   SIGTERM to the engine, STOP_GRACE_S, SIGKILL; then this process ends. SIGQUIT skips the grace.

- All processes that the engine started end with it, as in a container: what is left may hold the GPU or the port. They
  are found by their process group and, because this process adopts orphans, as its children.
- The engine dies with this process, and this process ends the engine when the supervisor dies.
- It gets neither the sidecar's settings, which hold a key, nor the service manager's socket. It gets the plug-in for
  vLLM and SGLang, in front of what PYTHONPATH it was given.
"""

from __future__ import annotations

import logging
import mmap
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from typing import Final

import psutil

from sidecar.control import state_dir as statefile
from sidecar.health import probes
from sidecar.health.probe_policy import Backoff, Kind, Probe, ProbeSpec
from sidecar.runtime import service_manager
from sidecar.runtime.limited_log import LimitedLog
from sidecar.runtime.prctl import SET_CHILD_SUBREAPER, SET_PDEATHSIG, die_with, prctl
from sidecar.settings import ENV_PREFIX

# As in the printed manifest, but start-up is probed more often: an engine that hangs after its first token, before this
# was seen, would be taken for one that starts.
STARTUP_S: Final = 3600
PROBES: Final[Mapping[Kind, ProbeSpec]] = {
    "startup": ProbeSpec(period=1.0, failure_threshold=STARTUP_S),
    "liveness": ProbeSpec(period=5.0, failure_threshold=3),
}
# Until then the verdict may still be that of the engine before.
FIRST_PROBE_S: Final = 5.0
# Each of the two kinds as `verdict.json` names it.
NAMES: Final[Mapping[Kind, probes.Kind]] = {"startup": "startup", "liveness": "live"}
KILL_GRACE_S: Final = 10.0
STOP_GRACE_S: Final = 30.0
# SIGKILL is sent again at this interval: a process may have been forked in between.
REAP_INTERVAL_S: Final = 0.2

WATCHED: Final = (signal.SIGCHLD, signal.SIGTERM, signal.SIGQUIT)

_log = logging.getLogger("sidecar")


class EngineRunner:
    """Keeps one engine running. `run` is the life of one process; the object is made before it is forked."""

    def __init__(self, command: Sequence[str], state_dir: str, plugin: str = "") -> None:
        self._command = tuple(command)
        self._state_dir = state_dir
        self._plugin = plugin  # its folder; "" for none
        # The engine's process group, in memory that survives this process.
        self._group = mmap.mmap(-1, 8)
        self._probes = {kind: Probe(kind, spec) for kind, spec in PROBES.items()}
        self._pid = 0  # of the engine's first process; 0 when it is not running
        self._code = 0  # how it ended last
        self._stop = False
        self._hurry = False  # SIGQUIT: no grace
        self._limited = LimitedLog(_log)

    def run(self, restarts: int) -> int:
        """Start the engine again and again until SIGTERM. `restarts`: how often this process was replaced."""
        signal.pthread_sigmask(signal.SIG_BLOCK, (*WATCHED, signal.SIGINT, signal.SIGHUP))
        prctl(SET_CHILD_SUBREAPER, 1)
        parent = os.getppid()
        prctl(SET_PDEATHSIG, signal.SIGQUIT)  # time to end the engine, which SIGKILL would leave behind
        if restarts:
            self._end_predecessors(parent)
        backoff = Backoff()
        while not self._stop:
            self._live()
            if not self._stop:
                wait = backoff.restart_at(time.monotonic()) - time.monotonic()
                _log.warning("the engine is started again%s", f" in {wait:.0f} s" if wait > 0 else "")
                self._sleep(time.monotonic() + wait)
        return 0

    def _live(self) -> None:
        """One life of the engine, until it and all that it started are gone."""
        try:
            self._start()
        except OSError as e:
            _log.error("the engine cannot be started: %s: %s", self._command[0], e.strerror)
            return
        _log.info("engine started (pid %d): %s", self._pid, self._command[0])
        failed = self._watch()
        if self._pid and failed:
            _log.error("killing the engine (pid %d): %s probe failed: %s", self._pid, *failed)
        if self._pid:
            self._terminate(KILL_GRACE_S if failed and not self._stop else STOP_GRACE_S)
        self._kill_all()
        if not self._stop or self._code:
            _log.log(logging.INFO if self._stop else logging.ERROR, "the engine ended with %s", _how(self._code))
        for probe in self._probes.values():
            probe.container_ended()

    def _start(self) -> None:
        environ = {k: v for k, v in os.environ.items() if not k.startswith(ENV_PREFIX)}
        for name in service_manager.VARIABLES:
            environ.pop(name, None)
        if self._plugin:
            environ["PYTHONPATH"] = os.pathsep.join(filter(None, (self._plugin, environ.get("PYTHONPATH"))))
        me = os.getpid()

        def prepare() -> None:
            die_with(me)
            signal.pthread_sigmask(signal.SIG_SETMASK, ())

        # A session of its own: a terminal's Ctrl-C reaches the supervisor alone, which drains first. `prepare` is
        # sound, because this process has one thread.
        process = subprocess.Popen(
            self._command, stdin=subprocess.DEVNULL, env=environ, start_new_session=True, preexec_fn=prepare
        )
        process.returncode = 0  # it is reaped here, among its orphans
        self._pid, self._code = process.pid, 0
        self._group[:] = process.pid.to_bytes(8, sys.byteorder)
        for probe in self._probes.values():
            probe.container_started()

    def _watch(self) -> tuple[Kind, str] | None:
        """Probe until the engine ends or is to be ended. Returns the probe that failed, and why."""
        due = time.monotonic() + FIRST_PROBE_S
        while self._pid and not self._stop:
            if self._wait(due):
                continue
            startup = self._probes["startup"]
            started = startup.passed
            due = max(due + PROBES["liveness" if started else "startup"].period, time.monotonic())
            for probe in self._probes.values():
                if not probe.due(started):
                    continue
                passed, why = self._ask(probe.kind)
                probe.observe(passed)
                if not passed and probe.kind == "liveness":
                    _log.warning("liveness failed (%d of %d): %s", probe.failures, probe.spec.failure_threshold, why)
                if probe.must_kill:
                    return probe.kind, why
            if startup.passed and not started:
                _log.info("the engine serves: liveness counts from now on")
        return None

    def _ask(self, kind: Kind) -> tuple[bool, str]:
        """The verdict file's answer. Start-up needs one: without a sidecar nothing is served either."""
        content, age = statefile.read(self._state_dir)
        passed, why = probes.exec_answer(NAMES[kind], content, age)
        if kind == "startup" and (age is None or abs(age) > probes.VERDICT_STALE_S):
            return False, why
        return passed, why

    def _terminate(self, grace: float) -> None:
        with suppress(ProcessLookupError):
            os.kill(self._pid, signal.SIGTERM)
        until = time.monotonic() + grace
        while self._pid and not self._hurry and time.monotonic() < until:
            self._wait(until)
        if self._pid:
            _log.warning("the engine (pid %d) did not end within %.0f s; killing it", self._pid, grace)

    def _kill_all(self) -> None:
        """SIGKILL to all that the engine started, until nothing is left."""
        began = time.monotonic()
        while True:
            left = list(self._descendants())
            if not left:
                break
            if time.monotonic() - began > KILL_GRACE_S:
                self._limited.error("left", "%d processes of the engine do not die, e.g. pid %d", len(left), left[0])
                if self._stop:
                    break
            for pid in left:
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            self._wait(time.monotonic() + REAP_INTERVAL_S)
        self._group[:] = bytes(8)

    def _descendants(self) -> Iterator[int]:
        self._reap()
        with suppress(psutil.Error):
            for process in psutil.Process().children(recursive=True):
                yield process.pid

    def _end_predecessors(self, parent: int) -> None:
        """End what a killed process of this role left: its engine died with it, but not what that had started.

        The supervisor has adopted them. A group that is not among its descendants is another one of the same number.
        """
        group = int.from_bytes(self._group[:], sys.byteorder)
        with suppress(psutil.Error):
            for process in psutil.Process(parent).children(recursive=True):
                with suppress(ProcessLookupError):
                    if group and os.getpgid(process.pid) == group:
                        os.kill(process.pid, signal.SIGKILL)

    # --- waiting ---

    def _wait(self, until: float) -> bool:
        """Handle the next signal. False at `until`."""
        received = signal.sigtimedwait(WATCHED, max(0.0, until - time.monotonic()))
        if received is None:
            return False
        if received.si_signo == signal.SIGCHLD:
            self._reap()
        else:
            self._stop = True
            self._hurry = self._hurry or received.si_signo == signal.SIGQUIT
        return True

    def _sleep(self, until: float) -> None:
        while not self._stop and time.monotonic() < until:
            self._wait(until)

    def _reap(self) -> None:
        with suppress(ChildProcessError):  # none is left
            while (ended := os.waitpid(-1, os.WNOHANG))[0]:
                if ended[0] == self._pid:
                    self._pid, self._code = 0, os.waitstatus_to_exitcode(ended[1])


def _how(code: int) -> str:
    return f"exit code {code}" if code >= 0 else f"signal {signal.Signals(-code).name}"
