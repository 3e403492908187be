"""Pure: what a verdict needs beside the evidence: exemptions, parts that hang alone, the cause of a silence, and whom to end."""

from __future__ import annotations

from dataclasses import dataclass, field

from sidecar.events import AbortRequests, CanaryResult, Directing
from sidecar.health import reasons
from sidecar.health.exemptions import Exemptions
from sidecar.health.partial_hangs import PartialHang, PartialHangDetector
from sidecar.health.progress import Key, Progress, SilenceLimits
from sidecar.health.verdict import FRESH_PROGRESS_S
from sidecar.readings import EngineSample, GpuSample, Reading, Value


@dataclass(slots=True)
class HealthMonitor:
    """They are kept from tick to tick. `judged_from`: when the last exemption ended; an older canary says nothing.

    `proven`: whether one held at the last tick that rests on more than calls which the engine has not answered;
    `doubted_at`: since when the engine has been thought to hang.
    """

    progress: Progress
    parts: PartialHangDetector
    orders: Exemptions
    watch: reasons.ClueHistory
    judged_from: float = 0.0
    proven: bool = False
    looked_at: float = 0.0
    doubted_at: float | None = None
    _ends: list[tuple[int, AbortRequests]] = field(default_factory=list)

    @classmethod
    def begin(cls, progress: Progress, limits: SilenceLimits, now: float) -> HealthMonitor:
        """Those of an engine of which nothing is known yet."""
        return cls(
            progress,
            PartialHangDetector(limits),
            Exemptions(limits.cap),
            reasons.ClueHistory(start_at=now),
            looked_at=now,
        )

    def exemption(self, known: str | None, now: float, *, proof: float | None, doubted: bool) -> str | None:
        """The exemption that holds: what is `known`, or an order or a call that passed the relay, while no token flows.

        When one ends that was proven, a new silence begins: to be called before the silence is judged. `proof`: when
        the engine last did anything; `doubted`: whether it is thought to hang.
        """
        at = self.progress.last()[1]
        self.doubted_at = (self.doubted_at or self.looked_at) if doubted else None  # the last look's tick thought so
        elapsed, self.looked_at = now - self.looked_at, now
        exempt, silent = known, at is None or now - at > FRESH_PROGRESS_S
        if exempt is None and silent:
            exempt = self.orders.active(now)
        if self.proven and exempt is None:
            self._judge_from(now)
        self.proven = exempt is not None
        if exempt is None and silent:
            exempt = self.orders.under_way(now, elapsed, max(proof or 0.0, self.judged_from), self.doubted_at)
        return exempt

    def call(self, relay: int, fact: Directing) -> None:
        """A call that directs the engine is with it, or over; one that it took has been its work until now."""
        self.orders.call(relay, fact)
        if fact.taken:
            self._judge_from(fact.at)

    def _judge_from(self, now: float) -> None:
        self.progress.rebaseline(now)
        self.judged_from = now

    def canary(self, last: CanaryResult | None) -> CanaryResult | None:
        """The last canary, where it counts."""
        return last if last is not None and last.started >= self.judged_from else None

    def part(self, sample: EngineSample | None, age: float | None, now: float, *, trusted: bool) -> PartialHang | None:
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
        self._ends.extend((relay, AbortRequests((id,), code)) for relay, id in keys)

    def take_ends(self) -> list[tuple[int, AbortRequests]]:
        """Orders to relays since the last call: (relay index, what to end)."""
        ends, self._ends = self._ends, []
        return ends

    def see(self, gpus: Reading[tuple[GpuSample, ...]], unanswered: bool, now: float) -> None:
        """What else a tick shows."""
        xids = sum(n for gpu in gpus.value for _, n in gpu.xid_errors) if isinstance(gpus, Value) else None
        self.watch.see(now, unanswered, xids)

    def cause(self, sample: EngineSample | None, age: float | None, now: float) -> str:
        """The reason code of a silence of `age` seconds."""
        signs = reasons.HangClues(
            age,
            sample,
            self.watch.xid_age(now),
            self.watch.unanswered(now),
            self.progress.iterating,
            self.parts.suspected_cause(),
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
