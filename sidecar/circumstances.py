"""Pure: what a verdict needs beside the evidence: exemptions, parts that hang alone, the cause of a silence, and whom to end."""

from __future__ import annotations

from dataclasses import dataclass, field

from sidecar import reasons
from sidecar.exemptions import Orders
from sidecar.facts import CanaryResult, End
from sidecar.parts import Finding, Parts
from sidecar.progress import Key, Limits, Progress
from sidecar.readings import EngineSample, GpuSample, Reading, Value
from sidecar.verdict import FRESH


@dataclass(slots=True)
class Circumstances:
    """They are kept from tick to tick. `judged_from`: when the last exemption ended; an older canary says nothing."""

    progress: Progress
    parts: Parts
    orders: Orders
    watch: reasons.Watch
    exempt: str | None = None
    judged_from: float = 0.0
    _ends: list[tuple[int, End]] = field(default_factory=list)

    @classmethod
    def around(cls, progress: Progress, limits: Limits, now: float) -> Circumstances:
        """Those of an engine of which nothing is known yet."""
        return cls(progress, Parts(limits), Orders(limits.cap), reasons.Watch(start_at=now))

    def exemption(self, known: str | None, now: float) -> str | None:
        """The exemption that holds: the one that is `known`, or an order that passed through the relay, while no token flows.

        When one ends, silence starts anew: to be called before the silence is judged.
        """
        at = self.progress.last()[1]
        exempt = known
        if exempt is None and (at is None or now - at > FRESH):
            exempt = self.orders.active(now)
        if self.exempt is not None and exempt is None:
            self.progress.rebaseline(now)
            self.judged_from = now
        self.exempt = exempt
        return exempt

    def canary(self, last: CanaryResult | None) -> CanaryResult | None:
        """The last canary, where it counts."""
        return last if last is not None and last.started >= self.judged_from else None

    def part(self, sample: EngineSample | None, age: float | None, now: float, *, trusted: bool) -> Finding | None:
        """A part that hangs alone. Single requests that can never end are to be ended by their relay."""
        self.parts.tick(now, self.progress.last()[1], trusted=trusted)
        if not trusted:
            return None
        found, stuck = self.parts.judge(now, sample, self.progress.learned)
        self._end(stuck, "stream_stuck")
        oversized = self.parts.oversized(sample, age)
        self._end((oversized,) if oversized else (), "prompt_exceeds_kv_cache")
        return found

    def _end(self, keys: tuple[Key, ...], code: str) -> None:
        self._ends.extend((relay, End((id,), code)) for relay, id in keys)

    def take_ends(self) -> list[tuple[int, End]]:
        """Orders to relays since the last call: (relay index, what to end)."""
        ends, self._ends = self._ends, []
        return ends

    def see(self, gpus: Reading[tuple[GpuSample, ...]], unanswered: bool, now: float) -> None:
        """What else a tick shows."""
        xids = sum(n for gpu in gpus.value for _, n in gpu.xid_errors) if isinstance(gpus, Value) else None
        self.watch.see(now, unanswered, xids)

    def cause(self, sample: EngineSample | None, age: float | None, now: float) -> str:
        """The reason code of a silence of `age` seconds."""
        signs = reasons.Signs(
            age, sample, self.watch.xid_age(now), self.watch.unanswered(now), self.progress.iterating, self.parts.hint()
        )
        return reasons.cause_of(signs)

    def startup_stuck(self, now: float) -> bool:
        """Whether a start-up that is still under way has shown no sign for as long as any silence may last."""
        return now - self.watch.start_at >= self.orders.longest

    def restarted(self, now: float) -> None:
        """The engine is another process."""
        self.parts.restart()
        self.orders.clear()
        self.watch.start_at = now
