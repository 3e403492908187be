"""A kubelet for one container, here a child process: run, probe, kill and restart it. probe_policy.py decides.

- HTTP: 200 <= code < 400 is success, on a new connection each time; exec: exit code 0; a timeout is a failure.
- A kill is SIGTERM to the first process, then SIGKILL to all when it has exited or the grace period is over.
- The container's processes never outlive the `async with`.

Missing compared to the real kubelet: the random delay after its own start, and following redirects (any 3xx is
success).
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import time
from asyncio.subprocess import DEVNULL, STDOUT, Process
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import Final, Literal, Self

import aiohttp

from sidecar.tools.demo.probe_policy import Backoff, Decision, HttpGet, Kind, Probe, ProbeSpec, Result

EventKind = Literal["started", "probe_failed", "probe_passed", "ready", "unready", "killing", "exited", "backing_off"]

# kubelet's maxProbeRetries: an errored probe (not a failed one) is retried at once.
MAX_PROBE_ATTEMPTS: Final = 3
# Bytes read of the response to an HTTP probe.
MAX_BODY_BYTES: Final = 10 << 10


@dataclass(frozen=True, slots=True)
class Container:
    """What to run and how to probe it. `log` receives stdout and stderr; None discards them."""

    command: tuple[str, ...]
    startup: ProbeSpec | None = None
    readiness: ProbeSpec | None = None
    liveness: ProbeSpec | None = None
    grace: float = 30.0  # terminationGracePeriodSeconds
    backoff: float = 10.0
    backoff_cap: float = 300.0
    env: Mapping[str, str] | None = None
    log: Path | None = None


@dataclass(frozen=True, slots=True)
class KubeletEvent:
    """An event as kubelet reports it. `run` of `threshold` results in a row for a probe."""

    kind: EventKind
    at: float
    pid: int
    restarts: int
    probe: Kind | None = None
    run: int = 0
    threshold: int = 0
    detail: str = ""
    seconds: float = 0.0


class Kubelet:
    """Runs, probes and restarts one container inside `async with`."""

    def __init__(self, container: Container, on_event: Callable[[KubeletEvent], None]) -> None:
        self.container: Final = container
        self.restarts = 0
        self.pid = 0  # 0 while no container runs
        self._on_event = on_event
        specs: dict[Kind, ProbeSpec | None] = {
            "startup": container.startup,
            "readiness": container.readiness,
            "liveness": container.liveness,
        }
        self._probes: dict[Kind, Probe] = {kind: Probe(kind, spec) for kind, spec in specs.items() if spec}
        self._was_ready = False
        self._task: asyncio.Task[None] | None = None

    async def __aenter__(self) -> Self:
        self._task = asyncio.create_task(self._run(), name="kubelet")
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._task
        self._task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await self._task

    async def failed(self) -> None:
        """Wait until the kubelet itself fails, and raise its exception."""
        assert self._task
        await asyncio.shield(self._task)

    @property
    def started(self) -> bool:
        """The container runs and has passed its startup probe, if it has one."""
        return bool(self.pid) and self._has_passed("startup")

    @property
    def ready(self) -> bool:
        """The container would receive traffic."""
        return self.started and self._has_passed("readiness")

    def _has_passed(self, kind: Kind) -> bool:
        return kind not in self._probes or self._probes[kind].value == "success"

    def _report(self, kind: EventKind, **more: object) -> None:
        self._on_event(replace(KubeletEvent(kind, time.monotonic(), self.pid, self.restarts), **more))  # type: ignore[arg-type]

    def _report_readiness(self) -> None:
        if self.ready != self._was_ready:
            self._was_ready = self.ready
            self._report("ready" if self.ready else "unready")

    async def _run(self) -> None:
        backoff = Backoff(self.container.backoff, self.container.backoff_cap)
        connector = aiohttp.TCPConnector(force_close=True)
        async with aiohttp.ClientSession(connector=connector, headers={"User-Agent": "kube-probe/1.33"}) as http:
            while True:
                await self._run_once(http)
                now = time.monotonic()
                wait = backoff.restart_at(now) - now
                if wait:
                    self._report("backing_off", seconds=wait)
                await asyncio.sleep(wait)
                self.restarts += 1

    async def _run_once(self, http: aiohttp.ClientSession) -> None:
        """Run the container once, to its end."""
        try:
            process = await self._start()
        except OSError as e:  # no such command: kubelet retries with growing back-off
            self._report("exited", detail=f"could not start: {e.strerror}")
            return
        exited = asyncio.create_task(process.wait(), name="container")
        probes = [asyncio.create_task(self._probe(http, probe), name=probe.kind) for probe in self._probes.values()]
        try:
            done, _ = await asyncio.wait([exited, *probes], return_when=asyncio.FIRST_COMPLETED)
            for task in done - {exited}:
                self._report("killing", probe=task.result())
        finally:
            for task in probes:
                task.cancel()
            await asyncio.gather(*probes, return_exceptions=True)
            await self._end(process)
            await exited
            self._ended(process.returncode)

    async def _start(self) -> Process:
        container = self.container
        with contextlib.ExitStack() as stack:
            output = stack.enter_context(container.log.open("ab")) if container.log else DEVNULL
            process = await asyncio.create_subprocess_exec(
                *container.command,
                stdin=DEVNULL,
                stdout=output,
                stderr=STDOUT,
                env=container.env,
                start_new_session=True,
            )
        self.pid = process.pid
        for probe in self._probes.values():
            probe.container_started(time.monotonic())
        self._report("started")
        self._report_readiness()
        return process

    async def _end(self, process: Process) -> None:
        """SIGTERM, the grace period, SIGKILL; all processes die with the first, as in a container."""
        try:
            if process.returncode is None:
                process.terminate()
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(self.container.grace):
                        await process.wait()
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)

    def _ended(self, code: int | None) -> None:
        for probe in self._probes.values():
            probe.container_ended(time.monotonic())
        detail = f"signal {signal.Signals(-code).name}" if code and code < 0 else f"exit code {code}"
        self._report("exited", detail=detail)
        self.pid = 0
        self._report_readiness()

    async def _probe(self, http: aiohttp.ClientSession, probe: Probe) -> Kind:
        """Probe at each tick. Returns when the container must be killed."""
        tick = time.monotonic()
        while True:
            if probe.due(time.monotonic(), self._has_passed("startup")):
                result, detail = await _attempt(http, probe.spec)
                decision = probe.observe(result, time.monotonic())
                self._report_result(probe, result, decision, detail)
                if decision.kill:
                    return probe.kind
            period = probe.spec.period
            tick += period * max(
                1, (time.monotonic() - tick) // period
            )  # a late tick runs at once, missed ones are skipped
            await asyncio.sleep(tick - time.monotonic())

    def _report_result(self, probe: Probe, result: Result, decision: Decision, detail: str) -> None:
        if result == "failure":
            needed = probe.spec.failure_threshold
            self._report("probe_failed", probe=probe.kind, run=decision.run, threshold=needed, detail=detail)
        elif decision.value == "success" and decision.run == probe.spec.success_threshold:
            self._report("probe_passed", probe=probe.kind, run=decision.run, threshold=decision.run, detail=detail)
        self._report_readiness()


async def _attempt(http: aiohttp.ClientSession, spec: ProbeSpec) -> tuple[Result, str]:
    """One probe: its result and a short explanation."""
    for _ in range(MAX_PROBE_ATTEMPTS):
        if isinstance(spec.action, HttpGet):
            result, detail = await _http_get(http, spec.action.url, spec.timeout)
        else:
            result, detail = await _exec(spec.action.command, spec.timeout)
        if result != "unknown":
            break
    return result, detail


async def _http_get(http: aiohttp.ClientSession, url: str, seconds: float) -> tuple[Result, str]:
    try:
        async with http.get(url, timeout=aiohttp.ClientTimeout(total=seconds), allow_redirects=False) as response:
            await response.content.read(MAX_BODY_BYTES)
    except TimeoutError:
        return "failure", f"no answer within {seconds:g} s"
    except aiohttp.ClientError as e:
        return "failure", type(e).__name__
    return ("success" if 200 <= response.status < 400 else "failure"), f"HTTP {response.status}"


async def _exec(command: tuple[str, ...], seconds: float) -> tuple[Result, str]:
    try:
        process = await asyncio.create_subprocess_exec(
            *command, stdin=DEVNULL, stdout=DEVNULL, stderr=DEVNULL, start_new_session=True
        )
    except OSError as e:
        return "unknown", f"could not run: {e.strerror}"
    try:
        async with asyncio.timeout(seconds):
            code = await process.wait()
    except TimeoutError:
        return "failure", f"no answer within {seconds:g} s"
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        await process.wait()
    return ("success" if code == 0 else "failure"), f"exit code {code}"
