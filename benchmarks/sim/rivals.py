"""The field's detectors at one engine, polled once a second, and the canaries that some of them send."""

from __future__ import annotations

from dataclasses import dataclass, field

from sidecar.readings import EngineSample, Reading, Value
from sim.detectors import CHECKS, Baseline, Seen
from sim.engine import Engine
from sim.seqs import Seq
from sim.surface import health

CANARY_INTERVAL_S = 10.0  # seconds between the canaries of one detector


@dataclass(slots=True)
class Rivals:
    """All baselines. `forget` when the engine is another one, or a stretch of the simulation begins."""

    baselines: list[Baseline] = field(default_factory=list)
    _canaries: dict[str, tuple[Seq | None, float]] = field(default_factory=dict)  # by detector: open one, started

    def forget(self) -> None:
        """Reset."""
        self.baselines = [Baseline(check) for check in CHECKS]
        self._canaries.clear()

    def poll(self, e: Engine, reading: Reading[EngineSample], users: int, now: float) -> None:
        """One look of each. While the engine starts, kubelet's startup probe keeps their liveness probes off."""
        if e.how.loading or not e.how.port_open:
            self.forget()
            return
        status, seconds = health(e)
        sample = reading.value if isinstance(reading, Value) else EngineSample()
        seen = Seen(
            now,
            status,
            seconds,
            sample.running or 0.0,
            sample.waiting or 0.0,
            now - e.token_at,
            now - e.loop_at,
            now - e.chunk_at,
            e.counters.iterations,
            users,
            lambda whose, limit: self._ask(e, whose, limit, now),
        )
        for baseline in self.baselines:
            baseline.poll(seen)

    def _ask(self, e: Engine, whose: str, limit: float, now: float) -> bool | None:
        """A detector's canary: passed, failed, or None while it is open, or none is due."""
        seq, started = self._canaries.get(whose, (None, -1e9))
        if seq is not None:
            if seq.first_at is None and now - started < limit:
                return None
            e.abort(seq, now)
            self._canaries[whose] = (None, started)
            return seq.first_at is not None
        if now - started < CANARY_INTERVAL_S:
            return None
        seq = e.submit(f"canary {whose}", 8, 1, now, owner=whose)
        self._canaries[whose] = (seq, now)
        return False if seq is None else None
