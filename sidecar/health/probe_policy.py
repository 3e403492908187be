"""Pure: kubelet's rules for probes and restarts. Times are seconds on one monotonic clock.

After kubelet (pkg/kubelet/prober/worker.go, client-go util/flowcontrol/backoff.go):
- Liveness starts as passed, readiness and startup do not, again for each new container.
- A threshold counts consecutive failures; below it the value does not change.
- The startup probe gates the other two and stops once it has passed. A failed startup or liveness probe kills the
  container, resets the count and pauses until there is a new one. A container that exits by itself does not reset the
  count, because the worker outlives it.
- The first restart is immediate, the next 10 s after the exit, doubling to 300 s; reset after a life of twice that.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, Literal

Kind = Literal["startup", "readiness", "liveness"]


@dataclass(frozen=True, slots=True)
class ProbeSpec:
    """A probe as in a pod's spec, with Kubernetes' defaults. Seconds and counts. `url` is empty if it is no GET."""

    url: str = ""
    period: float = 10
    timeout: float = 1
    failure_threshold: int = 3


class Probe:
    """The state of one probe; like kubelet's worker, it outlives the container's restarts."""

    def __init__(self, kind: Kind, spec: ProbeSpec) -> None:
        self.kind: Final = kind
        self.spec: Final = spec
        self.passed = False
        self.failures = 0  # in a row
        self._paused = True

    @property
    def must_kill(self) -> bool:
        """True from the failure that ends the container until there is a new one."""
        return self.failures >= self.spec.failure_threshold and self.kind != "readiness"

    def container_started(self) -> None:
        """A new container: reset to the initial value and resume probing."""
        self.failures = 0 if self.must_kill else self.failures
        self.passed, self._paused = self.kind == "liveness", False

    def container_ended(self) -> None:
        """The container has exited: fail, and pause until there is a new one."""
        self.passed, self._paused = False, True

    def due(self, started: bool) -> bool:
        """Whether to probe at this tick. `started`: the container has passed its startup probe, if it has one."""
        return not self._paused and not self.must_kill and started != (self.kind == "startup")

    def observe(self, success: bool) -> None:
        """Count one result."""
        self.failures = 0 if success else self.failures + 1
        if success or self.failures >= self.spec.failure_threshold:
            self.passed = success


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
