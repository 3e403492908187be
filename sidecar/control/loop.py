"""The control process at work: events in, ticks, and what each tick sets going.

A tick never waits. What takes time (a canary, a file, a bundle) is a background task that is kept and awaited; at most
one of a kind runs.
"""

from __future__ import annotations

import asyncio
import logging
import os
import socket
import sqlite3
import time
from collections import deque
from collections.abc import Callable, Mapping
from contextlib import suppress
from functools import partial
from typing import Any, Final

import aiohttp

from sidecar import __version__
from sidecar.control import saved_state
from sidecar.control.background_tasks import BackgroundTasks, run_abandonable
from sidecar.control.diagnosis import MAX_PAGE_BYTES, Diagnoses, bundle, diagnose
from sidecar.control.relay_pool import RelayPool
from sidecar.control.state import ControlState
from sidecar.control.state_dir import StateDir
from sidecar.control.state_store import RESUME, SAVE_INTERVAL_TICKS, StateStore
from sidecar.engines.registry import PLUGIN_KINDS
from sidecar.errors import UsageError
from sidecar.events import (
    AbortRequests,
    CanariesOver,
    CanaryResult,
    Directing,
    Event,
    LoadReport,
    MetricsPage,
    MetricsPageRequested,
)
from sidecar.health import probes, reasons
from sidecar.health.garbage import GARBAGE
from sidecar.health.monitor import DOUBTED_STATES, TICK_S, TickReadings
from sidecar.load import cost_model
from sidecar.load.cost_model import Coefficients
from sidecar.report import orca
from sidecar.report.fan_out import FanOut, make_log_handler, make_server_metrics
from sidecar.report.live_page import PageFeed
from sidecar.report.merged_page import merge_pages
from sidecar.report.metrics import Metrics
from sidecar.report.prometheus import MetricsPages
from sidecar.report.request_log import RequestLog
from sidecar.report.semantic_conventions import Service, verdict_attributes
from sidecar.report.tracing import Tracing
from sidecar.report.usage_database import STATEMENT_TIMEOUT_S, UsageDatabase
from sidecar.report.usage_rows import Eviction
from sidecar.report.usage_store import UsageStore
from sidecar.runtime.limited_log import LimitedLog
from sidecar.runtime.own_gpu_use import UNUSED, OwnGpuUse
from sidecar.settings import Settings
from sidecar.signals import own_process
from sidecar.signals.engine_monitor import EngineMonitor
from sidecar.signals.engine_steps import EngineSteps
from sidecar.signals.gpu.poller import GpuSignal
from sidecar.signals.hang_watch import HangWatch
from sidecar.signals.limits_file import LimitsFile
from sidecar.signals.port import PortSignal
from sidecar.signals.process_examiner import ProcessExaminer
from sidecar.snapshot import PodNames

# Between checks of the engine's port. A restart can be over in a second, so it is checked often while one is awaited.
PORT_INTERVAL_S, RESTART_PORT_INTERVAL_S = 1.0, 0.1
MAX_ANNOUNCED: Final = 256
# Ticks between what goes to relays, page and files: once a second.
PUBLISH_INTERVAL_TICKS: Final = 2
GPU_COUNT_TICKS: Final = 120  # a minute, after which the engine and NVML have reported the number of GPUs
DATABASE_INTERVAL_TICKS: Final = 120  # a minute
LAST_WRITE_TIMEOUT_S: Final = 2  # the supervisor waits 5 s for the end of control
LIMITS_INTERVAL_TICKS: Final = 4  # between checks of the tenant limits file

_log = logging.getLogger(__name__)


class ControlLoop:
    """Feeds the ControlState with events and readings, and acts on each tick."""

    def __init__(
        self,
        settings: Settings,
        co: Coefficients,
        state_dir: StateDir,
        session: aiohttp.ClientSession,
        own_gpu: Callable[[], OwnGpuUse] = lambda: UNUSED,
    ) -> None:
        now, wall = time.monotonic(), time.time()
        pod = ".".join(filter(None, (os.environ.get("POD_NAME"), os.environ.get("POD_UID"))))
        self._host, self._listen_port = socket.gethostname(), settings.listen[1]
        self.control = control = ControlState(settings, co, now, wall, pod, pod_names(os.environ, self._host))
        self._state_dir = state_dir
        self._state_store = StateStore(state_dir, settings.engine, co.fingerprint)
        self._state_store.restore(control, now)
        self.engine = EngineMonitor(session, settings)
        self.port = PortSignal(settings.engine)
        self.gpus = GpuSignal(own=own_gpu)
        self._examiner = ProcessExaminer(settings.engine)
        self._hang_watch = HangWatch(settings.engine)
        self.steps = EngineSteps(state_dir.path)
        self.tracing = Tracing(settings.otlp_endpoint, __version__)
        self._usage: UsageStore | None = None
        if settings.usage_bytes:
            self._usage = UsageStore(state_dir.path, settings.usage_days, settings.usage_bytes)
        self._has_usage = False  # written by this process
        self._database: UsageDatabase | None = None
        self._database_due = 0  # in ticks
        if settings.usage_url:
            self._database = UsageDatabase(settings.usage_url, os.environ.get("POD_NAME") or socket.gethostname())
        metrics, labels, priced = Metrics(), control.ledger.labels, (co.fingerprint, cost_model.unit_ms(co))
        self._request_log: RequestLog | None = None
        if settings.request_log_bytes:
            self._request_log = RequestLog(state_dir.path, settings.request_log_bytes)
        self.server_metrics = make_server_metrics(settings.otlp_endpoint, __version__)
        self.log_handler = make_log_handler(settings.otlp_endpoint, __version__)
        reports = metrics, self.tracing, self._usage, labels, control.price_terms
        self._fan_out = FanOut(*reports, *priced, self._request_log, self.server_metrics)
        self._limits = LimitsFile(settings.tenant_limits) if settings.tenant_limits else None
        self.pages, self.feed, self.diagnoses = MetricsPages(metrics.registry), PageFeed(), Diagnoses(state_dir)
        self.pool = RelayPool(settings.workers, self.on_event, self.on_lost)
        self._tasks = BackgroundTasks()
        self._announced: deque[tuple[int, int]] = deque(maxlen=MAX_ANNOUNCED)  # calls that wait for a canary's end
        self._log = LimitedLog(_log)  # of what fails for as long as a disk is full
        self._ticks = 0
        self._pressure = orca.MovingMean()
        self.ticked_at = now
        self.snapshot = control.tick(self._readings(now), now, wall)

    async def run(self) -> None:
        """Tick until cancelled."""
        loop = asyncio.get_running_loop()
        due = loop.time()
        while True:
            self._tick()
            due = max(due + TICK_S, loop.time())
            await asyncio.sleep(due - loop.time())

    @property
    def status(self) -> str:
        """The verdict as one line."""
        verdict = self.control.health.verdict
        return f"{verdict.state} ({verdict.reason}): {verdict.detail}"

    async def close(self) -> None:
        """Await what is under way, and write the last usage. Not a part of `run`, which may be cancelled twice."""
        await self._tasks.close()
        self._count_gpu_time(time.monotonic(), time.time())
        await self._write_usage(time.time())
        await self._write_requests()
        with suppress(TimeoutError):  # the rows stay in usage.db
            async with asyncio.timeout(LAST_WRITE_TIMEOUT_S + 1):
                await self._write_database(time.time(), LAST_WRITE_TIMEOUT_S)

    # --- events ---

    def on_event(self, relay: int, event: Event) -> None:
        """Handle an event of a relay."""
        settlement = self.control.on_event(relay, event)
        if settlement is not None:
            self._fan_out.on_settlement(settlement, self.control.gpu_price, time.time())
        else:
            self._fan_out.on_event(event)
        if isinstance(event, Directing) and event.on:
            self._announced.append((relay, event.id))
            self._let_calls_go()
        if isinstance(event, MetricsPageRequested):
            text = merge_pages(self.engine.scrape.page(), self.pages.text())
            self.pool.send(MetricsPage(time.monotonic(), text), relay)

    def on_lost(self, relay: int) -> None:
        """A relay died, or ended: nothing that it held can settle any more."""
        for settlement in self.control.relay_lost(relay, time.monotonic()):
            self._fan_out.on_settlement(settlement, self.control.gpu_price, time.time())

    # --- ticks ---

    def _tick(self) -> None:
        now, wall = time.monotonic(), time.time()
        health = self.control.health
        hold_before, stale_before = health.kill_policy.reason, self.control.coefficients.stale
        slowness_before = self.control.coefficients.capacity.slowness
        self.snapshot = self.control.tick(self._readings(now), now, wall)
        self.ticked_at = now
        self.engine.set_busy(health.verdict.state != "idle")
        self._fan_out.metrics.update(self.snapshot)
        unlogged = self.log_handler.dropped if self.log_handler is not None else 0
        self._fan_out.metrics.exports_dropped(self.tracing.dropped, unlogged)
        self.tracing.service = Service(self.engine.kind_name, self._host, self._listen_port)
        self._log_coefficients(stale_before)
        self._log_capacity(slowness_before)
        is_new_verdict, is_new_hold = health.has_changed, health.kill_policy.reason != hold_before
        if is_new_verdict:
            self._on_verdict(wall)
        if is_new_hold:
            self._on_hold(counted=is_new_verdict)
        if is_new_verdict or is_new_hold or self._ticks % SAVE_INTERVAL_TICKS == 0:
            self._tasks.start("memory", self._save(saved_state.dump(self.control.save(), now)))
        if self.engine.kind_name in PLUGIN_KINDS:
            self._tasks.start("steps", asyncio.to_thread(self.steps.refresh))
        self.gpus.closely = health.verdict.state in DOUBTED_STATES
        if self._hang_watch.is_due(now, health.verdict.state):
            self._tasks.start("processes", self._hang_watch.look())
        for relay, command in health.take_aborts():
            self._abort(relay, command)
        allowed = health.canary_due()
        if allowed is not None and self.engine.canary is not None:
            health.canary_sent(now)
            self._tasks.start("canary", self._canary(allowed), lambda error: self._canary_failed(now, allowed, error))
        if is_new_verdict or self._ticks % PUBLISH_INTERVAL_TICKS == 0:
            self._publish(wall)
        if self._ticks == GPU_COUNT_TICKS and self.control.is_gpu_count_assumed:
            count = self.control.gpu_count.gpus
            _log.warning("number of the engine's GPUs is unknown: billing %d; set --gpus", count)
        if self._limits is not None and self._ticks % LIMITS_INTERVAL_TICKS == 0:
            self._tasks.start("limits", self._name_tenants(self._limits))
        if health.lag < TICK_S:
            self.pool.check(now)
        self._ticks += 1

    def _readings(self, now: float) -> TickReadings:
        engine = self.engine
        return TickReadings(
            engine=engine.read(),
            gpus=self.gpus.read(),
            own=own_process.sample(os.getpid()),
            relays=self.pool.use(now),
            refused_since=self.port.refused_since,
            engine_kind=engine.kind_name,
            unanswered=engine.unanswered,
            resting=engine.resting,
            denied_rests=dict(engine.denied_rests),
            diagnoses=self.diagnoses.summaries(),
            identity=engine.identity,
            is_fcfs=engine.kind is not None and engine.kind.is_fcfs,
            canary_disturbs=engine.canary_disturbs,
            wakes=engine.wakes,
            trouble=engine.trouble or self.port.trouble,
            hang_signs=self._hang_watch.read(),
            steps=self.steps.read(),
        )

    def _on_verdict(self, wall: float) -> None:
        verdict = self.control.health.verdict
        is_bad = verdict.state in ("suspect", "stalled", "dead") or verdict.reason in reasons.NOTABLE
        level = logging.WARNING if is_bad else logging.INFO
        event = {"otlp_event": ("sidecar.verdict", verdict_attributes(verdict, self.tracing.service))}
        _log.log(level, "verdict %s (%s): %s", verdict.state, verdict.reason, verdict.detail, extra=event)
        self._fan_out.on_decision(verdict)
        self.port.period = RESTART_PORT_INTERVAL_S if verdict.state == "stalled" else PORT_INTERVAL_S
        if verdict.state == "stalled":
            id = f"{time.strftime('%Y%m%dT%H%M%S', time.gmtime(wall))}-{verdict.cause}"
            page = self.engine.scrape.last_page(MAX_PAGE_BYTES)
            content = bundle(self.snapshot, list(self.control.ledger.holds()), page, self._hang_watch.read())
            self._tasks.start("diagnosis", diagnose(self.diagnoses, self._examiner, content, id))
        elif verdict.state == "starting":
            self.engine.engine_restarted()

    def _log_coefficients(self, before: str) -> None:
        """Log once when the coefficients become stale or match again."""
        stale = self.control.coefficients.stale
        if stale and not before:
            _log.warning("the coefficients are stale: %s; measure them again with `sidecar calibrate`", stale)
        elif before and not stale:
            _log.info("coefficients match measured load again")

    def _log_capacity(self, before: float) -> None:
        """Log that the capacity follows a changed engine speed."""
        if (slowness := self.control.coefficients.capacity.slowness) != before:
            text = "the engine needs %.3g times the predicted time: capacity is now %.4g MU per minute"
            _log.info(text, slowness, self.snapshot.load.mu_max_per_minute)

    def _on_hold(self, *, counted: bool) -> None:
        """A kill is held back for another reason than before, or no longer. `counted`: the metrics have the verdict."""
        hold, verdict = self.control.health.kill_policy.hold, self.control.health.verdict
        if verdict.state != "stalled":
            return
        if not counted:
            self._fan_out.on_decision(verdict)
        if hold is None:
            _log.warning("liveness fails from now on: nothing holds the kill back any more")
        elif hold.handover:
            text = "escalated to an operator (%s): %s; until then the pod stays unready and is not killed; %s"
            remedy = f"after the repair, delete the pod or touch {self._state_dir.path / RESUME}"
            _log.error(text, hold.reason, hold.detail, remedy)
        else:
            _log.warning("not killed yet (%s): %s", hold.reason, hold.detail)

    def _abort(self, relay: int, command: AbortRequests) -> None:
        """Have a relay abort requests that can never end by themselves."""
        reason = reasons.REASON_TEXTS[command.code]
        _log.warning("aborting %d request(s) of relay %d: %s", len(command.ids), relay, reason)
        self._fan_out.on_decision(command)
        self.pool.send(command, relay)

    def _publish(self, wall: float) -> None:
        load, health, engine = self.snapshot.load, self.control.health, self.engine
        report = orca.report(load, self.snapshot.engine, self._pressure.mean(load.pressure, self.snapshot.at))
        forms = report.json(), report.text(), health.verdict.state, engine.kind_name, report.binary()
        takes = engine.images_pass, engine.processes
        share = load.cached_share
        self.pool.publish(LoadReport(*forms, load.utilization, load.mu_max_in_flight, *takes, cached_share=share))
        self.feed.publish(self.snapshot)
        self._tasks.start("state", self._write_state(health.probe_state(), wall))
        self._count_gpu_time(self.snapshot.at, wall)
        if self._usage is not None and self._usage.is_due:
            self._tasks.start("records", self._write_records(wall))
        if self._ticks >= self._database_due and self._has_usage:
            self._database_due = self._ticks + DATABASE_INTERVAL_TICKS
            self._tasks.start("database", self._write_database(wall))

    def _count_gpu_time(self, now: float, wall: float) -> None:
        """Account for the GPU time that has passed, used or idle."""
        if self._usage is not None:
            evicted = self._usage.elapse(now, wall, self.control.gpu_price, self._fan_out.fingerprint)
            self._report_evictions(evicted)

    # --- background tasks ---

    async def _canary(self, allowed: float) -> None:
        canary, health = self.engine.canary, self.control.health
        garbage, last = health.garbage, health.canaries.last
        assert canary is not None
        result = await canary.send(allowed, health.used_model, health.used_route)
        before = garbage.found
        result = self.control.canary_ended(result)
        self._let_calls_go()
        self._fan_out.on_decision(result)
        if garbage.found and not before:
            _log.warning("garbage_output: %s", GARBAGE)
        if is_canary_news(result, last):
            level = logging.INFO if result.outcome == "moot" else logging.WARNING
            _log.log(level, "canary %s: %s", result.outcome, result.detail)

    def _let_calls_go(self) -> None:
        """Notify the calls that stop the engine's work that no canary is with it."""
        if self.control.health.canaries.since is None:
            for relay, call in self._announced:
                self.pool.send(CanariesOver((call,)), relay)
            self._announced.clear()

    def _canary_failed(self, sent: float, allowed: float, error: str) -> None:
        """End a canary that the sidecar could not run: one that stays outstanding forever would end all judging."""
        detail = f"the sidecar could not run its canary ({error})"
        result = CanaryResult("rejected", sent, time.monotonic(), allowed, detail)
        self._fan_out.on_decision(self.control.canary_ended(result))
        self._let_calls_go()

    async def _write_state(self, state: probes.ProbeState, wall: float) -> None:
        try:
            await asyncio.to_thread(self._state_dir.write, state, wall)
            if await asyncio.to_thread(self._state_store.take_resume):
                _log.info("operator resumed automatic restarts")
                self.control.health.kill_policy.resume = True
        except OSError as e:
            self._log.error("state", "cannot write to the state directory (%s); exec probes fail open", e.strerror)

    async def _name_tenants(self, file: LimitsFile) -> None:
        """Tenants with limits always have a label. The relays log errors in the file."""
        with suppress(UsageError):
            limits = await asyncio.to_thread(file.read_changed)
            if limits is not None:
                self.control.name_tenants(limits.tenants)

    async def _write_usage(self, wall: float) -> None:
        """Write what was settled since the last time; what cannot be written is kept and retried."""
        usage = self._usage
        if usage is None or not (taken := usage.take()):
            return
        writing = asyncio.ensure_future(asyncio.to_thread(usage.write, taken, wall))
        try:
            self._report_evictions(await asyncio.shield(writing))
            self._has_usage = True
        except asyncio.CancelledError:
            await asyncio.wait((writing,))  # a thread cannot be cancelled: whether it wrote must be known
            self._report_evictions(usage.restore(taken) if writing.exception() is not None else writing.result())
            raise
        except (OSError, sqlite3.Error) as e:
            self._report_evictions(usage.restore(taken))
            text = "cannot write %s (%s); the usage is kept in memory and the write retried"
            self._log.error("usage", text, usage.path, e)

    async def _write_records(self, wall: float) -> None:
        """Usage first: what it counts has a line, and a line that kill -9 loses is counted."""
        await self._write_usage(wall)
        await self._write_requests()

    async def _write_requests(self) -> None:
        """Write the lines of requests that were settled since the last time."""
        log = self._request_log
        if log is None or not (taken := log.take()):
            return
        writing = asyncio.ensure_future(asyncio.to_thread(log.write, taken))
        try:
            await asyncio.shield(writing)
        except asyncio.CancelledError:
            await asyncio.wait((writing,))
            if writing.exception() is not None:
                self._fan_out.metrics.requests_unlogged(log.restore(taken))
            raise
        except OSError as e:
            self._fan_out.metrics.requests_unlogged(log.restore(taken))
            text = "cannot write %s (%s); the lines are kept in memory and the write retried"
            self._log.error("requests", text, log.path, e.strerror or e)

    async def _write_database(self, wall: float, within: int = STATEMENT_TIMEOUT_S) -> None:
        """Bring the database up to date; what it cannot take stays in the file, and is written with a later time."""
        if self._database is None or self._usage is None or not self._has_usage:
            return
        try:
            await run_abandonable(partial(self._database.write, self._usage.path, wall, within))
        except Exception as e:  # noqa: BLE001  psycopg.Error, of a module that only this setting imports
            self._fan_out.on_database_write("failed")
            text = "cannot write usage records to --usage-url (%s); they are kept in the state directory until then"
            self._log.error("database", text, self._database.explain(e))
        else:
            self._fan_out.on_database_write("ok")

    def _report_evictions(self, evictions: list[Eviction]) -> None:
        """Billable usage is never dropped silently: counters have all of it, and a line comes at most once a minute."""
        self._fan_out.on_evictions(evictions)
        for eviction in evictions:
            if eviction.is_billable and eviction.why == "age":  # as --usage-days says
                _log.info("%s", describe(eviction))
            elif eviction.is_billable:
                self._log.warning(f"dropped: {eviction.why}", "%s", describe(eviction))

    async def _save(self, content: dict[str, Any]) -> None:
        try:
            await asyncio.to_thread(self._state_store.write, content)
        except OSError as e:
            text = "cannot save the learned state (%s); a restart of the sidecar would forget it"
            self._log.error("memory", text, e.strerror)


def pod_names(env: Mapping[str, str], host: str) -> PodNames:
    """Where this runs, by the variables of the printed manifests; a host's name where there is no pod's."""
    return PodNames(env.get("POD_NAME") or host, env.get("POD_NAMESPACE", ""), env.get("NODE_NAME", ""))


def describe(eviction: Eviction) -> str:
    """Log text for dropped usage records."""
    why = {"age": "older than --usage-days", "size": "over --usage-bytes", "memory": "not written for too long"}
    first, last = (time.strftime("%Y-%m-%dT%H:%MZ", time.gmtime(at)) for at in (eviction.first, eviction.last))
    sums = f"{eviction.rows} rows of {eviction.requests} requests, {eviction.mu:.1f} MU, from {first} to {last}"
    return f"usage records dropped, {why[eviction.why]}: {sums}"


def is_canary_news(result: CanaryResult, last: CanaryResult | None) -> bool:
    """Whether a canary's end is worth a line: it did not pass, and the one before did not end in the same way."""
    if result.outcome in ("ok", "refused"):
        return False
    return last is None or (last.outcome, last.detail) != (result.outcome, result.detail)
