"""Pure: kubelet's rules for probes and restarts. Every call is given the time, in seconds on one monotonic clock.

As kubelet has them (pkg/kubelet/prober/worker.go, client-go util/flowcontrol/backoff.go):
- liveness starts as success, readiness as failure, startup as unknown; each new container starts there again;
- a threshold counts consecutive results; below it the value stays; an errored probe is thrown away, not counted;
- the startup probe gates the other two and holds once it has passed; a failed startup or liveness probe kills the
  container, sets the count back and holds until there is a new one. A container that ends by itself does not set the
  count back: the worker outlives it;
- the first restart is immediate; then 10 s after the end, doubling to 300 s; forgotten after twice that long a life.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Final, Literal

Kind = Literal["startup", "readiness", "liveness"]
Result = Literal["success", "failure", "unknown"]

INITIAL: Final[dict[Kind, Result]] = {"startup": "unknown", "readiness": "failure", "liveness": "success"}


@dataclass(frozen=True, slots=True)
class HttpGet:
    """A probe by GET; a new connection each time, as kubelet does."""

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
    """What one result led to: the probe's value since when, how many alike in a row, and whether the container must die."""

    value: Result
    since: float
    run: int
    kill: bool = False


class Probe:
    """One probe of one container: pure state, which outlives the container's restarts as kubelet's worker does."""

    def __init__(self, kind: Kind, spec: ProbeSpec) -> None:
        self.kind: Final = kind
        self.spec: Final = spec
        self._now = Decision(INITIAL[kind], 0.0, 0)
        self._last: Result = "unknown"
        self._held = True
        self._container_since = 0.0

    @property
    def value(self) -> Result:
        """The value that the thresholds let through."""
        return self._now.value

    def container_started(self, now: float) -> None:
        """There is a new container: back to the initial value, and probing goes on."""
        self._now = Decision(INITIAL[self.kind], now, self._now.run)
        self._held, self._container_since = False, now

    def container_ended(self, now: float) -> None:
        """A container that does not run has failed every probe; no more until there is a new one."""
        self._now = Decision("failure", now, self._now.run)
        self._held = True

    def due(self, now: float, started: bool) -> bool:
        """Whether this tick probes. `started`: the container has passed its startup probe, or has none."""
        waited = int(now - self._container_since) >= self.spec.initial_delay  # kubelet counts whole seconds
        return not self._held and waited and started != (self.kind == "startup")

    def observe(self, result: Result, now: float) -> Decision:
        """Count one result in."""
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
    """When a container that ended may start again."""

    def __init__(self, initial: float = 10.0, cap: float = 300.0) -> None:
        self._initial, self._cap = initial, cap
        self._step = initial
        self._restarted: float | None = None

    def restart_at(self, ended: float) -> float:
        """The moment of the next start; moves the step on."""
        if self._restarted is None or ended - self._restarted > 2 * self._cap:
            wait, self._step = 0.0, self._initial
        else:
            wait, self._step = self._step, min(2 * self._step, self._cap)
        self._restarted = ended + wait
        return self._restarted
