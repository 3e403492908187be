"""The control process at work: facts in, ticks, and what each tick sets going.

Rules: a tick never waits; what takes time (a canary, a file, a bundle) is an errand that is kept and awaited; one
canary and one file write at a time.
"""

from __future__ import annotations

import asyncio
import logging
import os
import sqlite3
import time
from dataclasses import dataclass
from typing import Any

from sidecar.control import saved_state
from sidecar.control.background_tasks import BackgroundTasks
from sidecar.control.canary_stats import GARBAGE
from sidecar.control.diagnosis import MAX_PAGE, Diagnoses, bundle, diagnose
from sidecar.control.relay_pool import RelayPool
from sidecar.control.state import TICK_S, ControlState, TickReadings
from sidecar.control.state_dir import StateDir
from sidecar.control.state_store import RESUME, SAVE_EVERY_TICKS, StateStore
from sidecar.events import (
    AbortRequests,
    Admitted,
    CanaryResult,
    Event,
    FirstToken,
    ImagePrepared,
    LoadReport,
    MetricsPage,
    MetricsPageRequested,
)
from sidecar.health import probes, reasons
from sidecar.load import cost_model
from sidecar.load.ledger import Settlement
from sidecar.report import orca
from sidecar.report.live_page import PageFeed
from sidecar.report.metrics import Metrics
from sidecar.report.prometheus import MetricsPages, merge_pages
from sidecar.report.tracing import Tracing
from sidecar.report.usage_store import UsageStore
from sidecar.signals import own_process
from sidecar.signals.engine_monitor import EngineMonitor
from sidecar.signals.gpu.poller import GpuSignal
from sidecar.signals.port import PortSignal
from sidecar.signals.process_examiner import ProcessExaminer

PORT_CALM, PORT_CLOSE = 1.0, 0.1  # seconds between looks at the engine's port
PUBLISH_EVERY = 2  # ticks between what goes to relays, page and files: once a second

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Signals:
    """Where readings come from."""

    contact: EngineMonitor
    port: PortSignal
    gpus: GpuSignal
    examiner: ProcessExaminer


@dataclass(frozen=True, slots=True)
class Sinks:
    """Where records and snapshots go."""

    meters: Metrics
    pages: MetricsPages
    feed: PageFeed
    diagnoses: Diagnoses
    state: StateDir
    tracing: Tracing
    keeping: StateStore
    records: UsageStore | None = None


class ControlLoop:
    """Feeds the Control with facts and readings, and acts on what it says."""

    def __init__(self, control: ControlState, signals: Signals, sinks: Sinks, dollars_per_gpu_hour: float) -> None:
        self.control = control
        self._signals = signals
        self.sinks = sinks
        self._dollars_per_mu = dollars_per_gpu_hour / 3_600_000 * control.unit_ms
        self._pool: RelayPool | None = None
        self._errands = BackgroundTasks()
        self._ticks = 0
        self._recently = orca.MovingMean()
        self.ticked_at = time.monotonic()
        self.snapshot = self.control.tick(self._readings(self.ticked_at), self.ticked_at, time.time())

    def attach(self, pool: RelayPool) -> None:
        """The relays whose facts come here."""
        self._pool = pool

    async def run(self) -> None:
        """Tick until cancelled; then await what is under way."""
        loop = asyncio.get_running_loop()
        due = loop.time()
        try:
            while True:
                self._tick()
                due = max(due + TICK_S, loop.time())
                await asyncio.sleep(due - loop.time())
        finally:
            await self._errands.close()
            await self._record(time.time())

    def stand(self) -> probes.ProbeState:
        """What probes render."""
        c = self.control
        return probes.ProbeState(
            c.verdict, c.memory.startup_done, c.draining, held=c.fleet.hold is not None, doubtful=c.doubtful
        )

    # --- facts ---

    def on_event(self, relay: int, fact: Event) -> None:
        """A record of a relay."""
        settlement = self.control.on_event(relay, fact)
        if settlement is not None:
            self._settled(settlement)
        match fact:
            case Admitted():
                self.sinks.tracing.admitted(fact)
            case FirstToken():
                self.sinks.tracing.first_token(fact)
            case ImagePrepared():
                self.sinks.meters.observe(fact)
                self.sinks.tracing.imaged(fact)
            case MetricsPageRequested():
                self._send_page(relay)
            case _:
                pass

    def on_lost(self, relay: int) -> None:
        """A relay died, or ended: nothing that it held can settle any more."""
        for settlement in self.control.relay_lost(relay, time.monotonic()):
            self._settled(settlement)

    def _settled(self, s: Settlement) -> None:
        a, e = s.admitted, s.settled
        self.sinks.tracing.settled(e, s.mu, lambda: cost_model.by_cause(s.work, self.control.upkeep.co) if s.mu else ())
        decoding = e.at - e.first_at if e.first_at is not None and s.delivered > 1 else None
        self.sinks.meters.settled(
            s.tenant, s.model, e.outcome, mu=s.mu, seconds=e.at - a.at,
            ttft=None if e.first_at is None else e.first_at - a.at,
            tpot=None if decoding is None else decoding / (s.delivered - 1),
            overhead=None if e.sent_at is None else e.overhead,
            dollars=s.mu * self._dollars_per_mu,
        )  # fmt: skip
        if self.sinks.records is not None:
            self.sinks.records.add(s, time.time())

    def _send_page(self, relay: int) -> None:
        if self._pool is not None:
            text = merge_pages(self._signals.contact.page(), self.sinks.pages.text())
            self._pool.order(MetricsPage(time.monotonic(), text), relay)

    # --- ticks ---

    def _tick(self) -> None:
        now, wall = time.monotonic(), time.time()
        held, stale = self.control.fleet.reason, self.control.upkeep.stale
        self.snapshot = self.control.tick(self._readings(now), now, wall)
        self.ticked_at = now
        self.sinks.meters.update(self.snapshot)
        self._doubted(stale)
        changed, turned = self.control.news, self.control.fleet.reason != held
        if changed:
            self._changed(wall)
        if turned:
            self._held(counted=changed)
        if changed or turned or self._ticks % SAVE_EVERY_TICKS == 0:
            self._errands.start("memory", self._keep(saved_state.dump(self.control.keep(), now)))
        for relay, end in self.control.take_ends():
            self._end(relay, end)
        allowed = self.control.canary_due()
        if allowed is not None and self._signals.contact.canary is not None:
            self.control.canary_sent(now)
            self._errands.start("canary", self._canary(allowed), lambda what: self._canary_broke(now, allowed, what))
        if changed or self._ticks % PUBLISH_EVERY == 0:
            self._publish(wall)
        if self._pool is not None and self.control.lag < TICK_S:
            self._pool.check(now)
        self._ticks += 1

    def _readings(self, now: float) -> TickReadings:
        return TickReadings(
            engine=self._signals.contact.read(),
            gpus=self._signals.gpus.read(),
            own=own_process.sample(os.getpid()),
            relays=self._pool.use(now) if self._pool is not None else (),
            refused_since=self._signals.port.refused_since,
            engine_kind=self._signals.contact.kind_name,
            unanswered=self._signals.contact.unanswered,
            resting=self._signals.contact.resting,
            diagnoses=self.sinks.diagnoses.summaries(),
            identity=self._signals.contact.identity,
        )

    def _changed(self, wall: float) -> None:
        verdict = self.control.verdict
        bad = verdict.state in ("suspect", "stalled", "dead") or verdict.reason in reasons.NOTABLE
        level = logging.WARNING if bad else logging.INFO
        _log.log(level, "verdict %s (%s): %s", verdict.state, verdict.reason, verdict.detail)
        self.sinks.meters.observe(verdict)
        # A restart can be over in a second; while one is awaited, the port is watched closely enough to see it.
        self._signals.port.period = PORT_CLOSE if verdict.state == "stalled" else PORT_CALM
        if verdict.state == "stalled":
            stamp = time.strftime("%Y%m%dT%H%M%S", time.gmtime(wall))
            content = bundle(
                self.snapshot, list(self.control.ledger.holds()), self._signals.contact.last_page(MAX_PAGE)
            )
            examined = diagnose(self.sinks.diagnoses, self._signals.examiner, content, f"{stamp}-{verdict.cause}")
            self._errands.start("diagnosis", examined)
        elif verdict.state == "starting":
            self._signals.contact.engine_restarted()

    def _doubted(self, before: str) -> None:
        """Say once when the coefficients begin or cease to hold."""
        stale = self.control.upkeep.stale
        if stale and not before:
            _log.warning("the coefficients are stale: %s; measure them again with `sidecar calibrate`", stale)
        elif before and not stale:
            _log.info("the coefficients hold again")

    def _held(self, *, counted: bool) -> None:
        """A kill is held back, for another reason than before, or not any more."""
        hold, verdict = self.control.fleet.hold, self.control.verdict
        if verdict.state != "stalled":
            return
        if not counted:
            self.sinks.meters.observe(verdict)
        if hold is None:
            _log.warning("liveness fails from now on: nothing holds the kill back any more")
        elif hold.handover:
            remedy = f"when it is mended, delete the pod or touch {self.sinks.state.path / RESUME}"
            _log.error(
                "handed over (%s): %s; until then the pod is unready and not killed; %s",
                hold.reason,
                hold.detail,
                remedy,
            )
        else:
            _log.warning("not killed yet (%s): %s", hold.reason, hold.detail)

    def _end(self, relay: int, end: AbortRequests) -> None:
        """Have a relay end requests that can never end by themselves."""
        _log.warning("ending %d request(s) of relay %d: %s", len(end.ids), relay, reasons.REASON_TEXTS[end.code])
        self.sinks.meters.observe(end)
        if self._pool is not None:
            self._pool.order(end, relay)

    def _publish(self, wall: float) -> None:
        load, engine = self.snapshot.load, self.snapshot.engine
        if self._pool is not None:
            report = orca.report(load, engine, self._recently.mean(load.pressure, self.snapshot.at))
            state, kind = self.control.verdict.state, self._signals.contact.kind_name
            forms = report.json(), report.text(), state, kind, report.binary()
            contact = self._signals.contact
            engine_is = contact.identity.prepared, contact.processes
            self._pool.order(LoadReport(*forms, load.utilization, load.mu_max_in_flight, *engine_is))
        self.sinks.feed.publish(self.snapshot)
        self._errands.start("state", self._write_state(self.stand(), wall))
        self._errands.start("records", self._record(wall))

    # --- errands ---

    async def _canary(self, allowed: float) -> None:
        canary = self._signals.contact.canary
        assert canary is not None
        before = self.control.canary
        result = await canary.send(allowed, self.control.used)
        garbage = self.control.canaries.sameness.garbage
        result = self.control.canary_ended(result)
        self.sinks.meters.observe(result)
        if self.control.canaries.sameness.garbage and not garbage:
            _log.warning("garbage_output: %s", GARBAGE)
        known = result.outcome == "rejected" and before is not None and before.detail == result.detail
        if result.outcome not in ("ok", "refused") and not known:
            _log.warning("canary %s: %s", result.outcome, result.detail)

    def _canary_broke(self, sent: float, allowed: float, what: str) -> None:
        """Our own error says nothing of the engine; but a canary that is held to be outstanding for ever would end all judging."""
        detail = f"our own canary could not run ({what})"
        self.sinks.meters.observe(
            self.control.canary_ended(CanaryResult("rejected", sent, time.monotonic(), allowed, detail))
        )

    async def _write_state(self, stand: probes.ProbeState, wall: float) -> None:
        try:
            await asyncio.to_thread(self.sinks.state.write, stand, wall)
            if await asyncio.to_thread(self.sinks.keeping.resumed):
                _log.info("an operator says that it is mended: kills are allowed again")
                self.control.fleet.resume = True
        except OSError as e:
            _log.error("cannot write to the state directory (%s); exec probes fail open", e.strerror)

    async def _record(self, wall: float) -> None:
        """Write what was settled since the last time; what cannot be written is kept and tried again."""
        records = self.sinks.records
        if records is None or not (taken := records.take()):
            return
        writing = asyncio.ensure_future(asyncio.to_thread(records.write, taken, wall))
        try:
            await asyncio.shield(writing)
        except asyncio.CancelledError:
            await asyncio.wait((writing,))  # a thread cannot be cancelled: whether it wrote must be known
            if writing.exception() is not None:
                records.restore(taken)
            raise
        except (OSError, sqlite3.Error) as e:
            records.restore(taken)
            _log.error("cannot write %s (%s); what was used is kept in memory and tried again", records.path, e)

    async def _keep(self, content: dict[str, Any]) -> None:
        try:
            await asyncio.to_thread(self.sinks.keeping.write, content)
        except OSError as e:
            _log.error("cannot write what was learned (%s); a restart of the sidecar would forget it", e.strerror)
