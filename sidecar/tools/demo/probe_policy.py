"""Pure: kubelet's rules for probes and restarts. Times are seconds on one monotonic clock.

After kubelet (pkg/kubelet/prober/worker.go, client-go util/flowcontrol/backoff.go):
- Liveness starts as success, readiness as failure, startup as unknown, again for each new container.
- A threshold counts consecutive results; below it the value does not change; an errored probe is discarded.
- The startup probe gates the other two and stops once it has passed. A failed startup or liveness probe kills the
  container, resets the count and pauses until there is a new one. A container that exits by itself does not reset the
  count, because the worker outlives it.
- The first restart is immediate, the next 10 s after the exit, doubling to 300 s; reset after a life of twice that.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Final, Literal

Kind = Literal["startup", "readiness", "liveness"]
Result = Literal["success", "failure", "unknown"]

INITIAL: Final[dict[Kind, Result]] = {"startup": "unknown", "readiness": "failure", "liveness": "success"}


@dataclass(frozen=True, slots=True)
class HttpGet:
    """A probe by GET, on a new connection each time."""

    url: str


@dataclass(frozen=True, slots=True)
class Exec:
    """A probe by a command's exit code."""

    command: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class ProbeSpec:
    """A probe as in a pod's spec, with Kubernetes' defaults. Seconds and counts."""

    action: HttpGet | Exec
    initial_delay: float = 0
    period: float = 10
    timeout: float = 1
    success_threshold: int = 1
    failure_threshold: int = 3


@dataclass(frozen=True, slots=True)
class Decision:
    """The effect of one result: value and since when, equal results in a row, and whether to kill the container."""

    value: Result
    since: float
    run: int
    kill: bool = False


class Probe:
    """The state of one probe; like kubelet's worker, it outlives the container's restarts."""

    def __init__(self, kind: Kind, spec: ProbeSpec) -> None:
        self.kind: Final = kind
        self.spec: Final = spec
        self._now = Decision(INITIAL[kind], 0.0, 0)
        self._last: Result = "unknown"
        self._held = True
        self._container_since = 0.0

    @property
    def value(self) -> Result:
        """The value after the thresholds."""
        return self._now.value

    def container_started(self, now: float) -> None:
        """A new container: reset to the initial value and resume probing."""
        self._now = Decision(INITIAL[self.kind], now, self._now.run)
        self._held, self._container_since = False, now

    def container_ended(self, now: float) -> None:
        """The container has exited: fail, and pause until there is a new one."""
        self._now = Decision("failure", now, self._now.run)
        self._held = True

    def due(self, now: float, started: bool) -> bool:
        """Whether to probe at this tick. `started`: the container has passed its startup probe, if it has one."""
        waited = int(now - self._container_since) >= self.spec.initial_delay  # kubelet counts whole seconds
        return not self._held and waited and started != (self.kind == "startup")

    def observe(self, result: Result, now: float) -> Decision:
        """Count one result."""
        if result == "unknown":
            return self._now
        run = self._now.run + 1 if result == self._last else 1
        self._last = result
        needed = self.spec.failure_threshold if result == "failure" else self.spec.success_threshold
        if run < needed:
            self._now = replace(self._now, run=run)
            return self._now
        since = self._now.since if result == self._now.value else now
        decision = Decision(result, since, run, kill=result == "failure" and self.kind != "readiness")
        self._held = decision.kill or self.kind == "startup"
        self._now = Decision(result, since, 0 if self._held else run)
        return decision


class Backoff:
    """When a container that exited may restart."""

    def __init__(self, initial: float = 10.0, cap: float = 300.0) -> None:
        self._initial, self._cap = initial, cap
        self._step = initial
        self._restarted: float | None = None

    def restart_at(self, ended: float) -> float:
        """The time of the next start; advances the back-off."""
        if self._restarted is None or ended - self._restarted > 2 * self._cap:
            wait, self._step = 0.0, self._initial
        else:
            wait, self._step = self._step, min(2 * self._step, self._cap)
        self._restarted = ended + wait
        return self._restarted
