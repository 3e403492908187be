"""Pure: a demo's events -> how well the stalls were handled, and the false alarms. Times are monotonic seconds.

- A stall lasts from its injection to the first request served by a ready, restarted engine.
- It is detected by the first verdict after the injection that fails liveness (`stalled`, `dead`).
- A false alarm is such a verdict, or a kill, without a stall or an engine that exited by itself. `suspect` is no alarm:
  it only withdraws readiness.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

ALARMS: Final = frozenset({"stalled", "dead"})


@dataclass(slots=True)
class Stall:
    """One injected stall; None: has not happened yet."""

    injected: float
    detected: float | None = None
    killed: float | None = None
    ready: float | None = None
    recovered: float | None = None


@dataclass(slots=True)
class Scorecard:
    """Collects the events in the order in which they happen."""

    stalls: list[Stall] = field(default_factory=list)
    false_alarms: list[str] = field(default_factory=list)
    crashes: int = 0
    _down: bool = False  # the engine exited outside a stall and is not ready again
    _alarmed: bool = False  # since last ready: verdict and kill together are one false alarm
    _killing: bool = False

    @property
    def open_stall(self) -> Stall | None:
        """The current stall, if any."""
        return self.stalls[-1] if self.stalls and self.stalls[-1].recovered is None else None

    def injected(self, at: float) -> None:
        """A stall was injected."""
        self.stalls.append(Stall(at))

    def verdict(self, state: str, reason: str, at: float) -> bool:
        """The verdict changed. True if this detected a stall."""
        if state not in ALARMS:
            return False
        # a verdict may be read after the recovery
        stall = next((s for s in self.stalls if s.injected <= at and (s.recovered is None or at <= s.recovered)), None)
        if stall is None:
            self._alarm(f"verdict {state} ({reason})")
        elif stall.detected is None:
            stall.detected = at
            return True
        return False

    def _alarm(self, what: str) -> None:
        if not self._down and not self._alarmed:
            self.false_alarms.append(what)
            self._alarmed = True

    def killed(self, probe: str, at: float) -> None:
        """The kubelet kills the engine because of a probe."""
        self._killing = True
        stall = self.open_stall
        if stall is None:
            self._alarm(f"killed by its {probe} probe")
        elif stall.killed is None:
            stall.killed = at

    def exited(self) -> None:
        """The engine's process has exited, killed or not."""
        if self.open_stall is None:
            self.crashes += not self._killing
            self._down = True
        self._killing = False

    def ready(self, at: float) -> None:
        """The engine became ready."""
        self._down = self._alarmed = False
        stall = self.open_stall
        if stall is not None and stall.killed is not None:
            stall.ready = at

    def served(self, at: float) -> bool:
        """A request succeeded. True if this ended a stall."""
        stall = self.open_stall
        if stall is None or stall.ready is None or at < stall.ready:
            return False
        stall.recovered = at
        return True

    def failures(self) -> list[str]:
        """The failures, a line each."""
        lines = [f"false alarm: {what}" for what in self.false_alarms]
        if self.crashes:
            lines.append(f"the engine exited by itself {self.crashes} time(s)")
        if any(stall.detected is None for stall in self.stalls):
            lines.append("a stall was not detected")
        elif self.open_stall:
            lines.append("the engine had not recovered from the last stall at the end")
        return lines


def summary(
    card: Scorecard, requests: Mapping[str, int], pictures: int, mu: Mapping[str, float] | None, seconds: float
) -> list[str]:
    """The last lines of a demo. `mu`: model units settled by the sidecar, by outcome; None if unknown."""
    total = sum(requests.values())
    by_outcome = ", ".join(f"{n} {name}" for name, n in requests.items() if n)
    rows = [
        ("ran for", f"{seconds:.0f} s"),
        ("requests", f"{total}: {by_outcome}" if total else "0"),
        ("images", f"{pictures} in successful requests"),
        ("model units", _format_units(mu)),
        ("stalls injected", str(len(card.stalls))),
        ("time to detect", _format_durations(card, lambda s: s.detected, "not detected")),
        ("time to recover", _format_durations(card, lambda s: s.recovered, "not recovered")),
        ("false alarms", str(len(card.false_alarms))),
    ]
    return [f"  {name:<16} {value}" for name, value in rows]


def summary_json(
    card: Scorecard,
    requests: Mapping[str, int],
    pictures: int,
    mu: Mapping[str, float] | None,
    seconds: float,
    failures: Sequence[str],
) -> dict[str, Any]:
    """The same for programs. Times are seconds since the stall; null for what did not happen."""

    def after(stall: Stall, at: float | None) -> float | None:
        return None if at is None else at - stall.injected

    return {
        "seconds": seconds,
        "requests": dict(requests),
        "images": pictures,
        "mu": None if mu is None else dict(mu),
        "stalls": [{"detected": after(s, s.detected), "recovered": after(s, s.recovered)} for s in card.stalls],
        "false_alarms": list(card.false_alarms),
        "failures": list(failures),
    }


def _format_units(mu: Mapping[str, float] | None) -> str:
    if mu is None:
        return "unknown: the sidecar's metrics page did not answer"
    parts = ", ".join(f"{n:.2f} {name}" for name, n in sorted(mu.items(), key=lambda item: -item[1]) if n)
    return f"{sum(mu.values()):.2f} MU" + (f": {parts}" if parts else "")


def _format_durations(card: Scorecard, end: Callable[[Stall], float | None], missing: str) -> str:
    ends = ((stall.injected, end(stall)) for stall in card.stalls)
    return ", ".join(missing if at is None else f"{at - start:.1f} s" for start, at in ends) or "-"
