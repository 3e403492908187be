"""A scripted engine that the verdict sees through evidence only, for the tests of the verdict."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from sidecar.events import CanaryResult, State
from sidecar.health.progress import Evidence
from sidecar.health.verdict import VerdictInputs, VerdictState, judge

ALLOWED = 8.0
KILL = 20.0


def evidence(now: float, *, age: float | None = None, at: float | None = None, allowed: float = ALLOWED) -> Evidence:
    """Evidence with `age` of silence over one outstanding request, or none outstanding."""
    return Evidence(
        now=now,
        outstanding=int(age is not None),
        waiting=0,
        engine_busy=False,
        progress_at=at,
        progress_kind="delivered",
        age=age,
        steps_age=None,
        prefill_age=None,
        allowed=allowed,
        ruled_by="floor",
        predicted=0.0,
        learned=True,
        kill_after=KILL,
    )


@dataclass
class World:
    """A scripted engine seen through evidence only; time passes in ticks of 0.5 s."""

    now: float = 100.0
    memory: VerdictState = field(default_factory=lambda: VerdictState(since=100.0, engine_since=100.0))
    canary: CanaryResult | None = None
    refused_since: float | None = None
    progress_at: float | None = None
    work_since: float | None = None
    seen: list[tuple[State, str]] = field(default_factory=list)

    def tick(self, **changes: object) -> VerdictState:
        self.now += 0.5
        age = None if self.work_since is None else self.now - max(self.work_since, self.progress_at or 0.0)
        inputs = VerdictInputs(
            self.now, evidence(self.now, age=age, at=self.progress_at), self.canary, self.refused_since
        )
        self.memory, _ = judge(self.memory, replace(inputs, **changes))  # type: ignore[arg-type]
        if not self.seen or self.seen[-1][0] != self.memory.state:
            self.seen.append((self.memory.state, self.memory.reason))
        return self.memory

    def wait(self, seconds: float) -> VerdictState:
        for _ in range(int(seconds * 2)):
            self.tick()
        return self.memory

    def canary_ends(self, outcome: str, took: float = 0.1) -> None:
        self.now += 0.2
        self.canary = CanaryResult(outcome, self.now - took, self.now, ALLOWED)  # type: ignore[arg-type]

    def started(self) -> World:
        self.tick()
        self.canary_ends("ok")
        self.tick()
        assert self.memory.state == "idle" and self.memory.served
        self.seen.clear()
        return self

    def states(self) -> list[State]:
        return [state for state, _ in self.seen]
