"""A kubelet for one container, here a child process: run, probe, kill and restart it. probe_policy.py decides.

- A probe is a GET on a new connection; 200 <= code < 400 is success, a timeout is a failure.
- A kill is SIGTERM to the first process, then SIGKILL to all when it has exited or the grace period is over.
- The container's processes never outlive the `async with`.

Missing compared to the real kubelet: exec probes, initial delays, the random delay after its own start, and following
redirects (any 3xx is success).
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import time
from asyncio.subprocess import DEVNULL, STDOUT, Process
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, Literal, Self

import aiohttp

from sidecar.health.probe_policy import Backoff, Kind, Probe, ProbeSpec

EventKind = Literal["started", "probe_failed", "ready", "unready", "killing", "exited", "backing_off"]

MAX_BODY_BYTES: Final = 10 << 10  # read of the response to a probe


@dataclass(frozen=True, slots=True)
class Container:
    """What to run and how to probe it. `log` receives stdout and stderr; None discards them."""

    command: tuple[str, ...]
    probes: Mapping[Kind, ProbeSpec] = field(default_factory=dict)
    grace: float = 30.0  # terminationGracePeriodSeconds
    backoff: float = 10.0
    backoff_cap: float = 300.0
    env: Mapping[str, str] | None = None
    log: Path | None = None


@dataclass(frozen=True, slots=True)
class KubeletEvent:
    """An event as kubelet reports it. A probe has failed `run` times in a row of the `threshold` that it may."""

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
        self._probes = {kind: Probe(kind, spec) for kind, spec in container.probes.items()}
        self._was_ready = False
        self._task: asyncio.Task[None] | None = None

    async def __aenter__(self) -> Self:
        self._task = asyncio.create_task(self._run(), name="kubelet")
        return self

    async def __aexit__(self, *_: object) -> None:
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
        return kind not in self._probes or self._probes[kind].passed

    def _report(self, kind: EventKind, **more: object) -> None:
        self._on_event(KubeletEvent(kind, time.monotonic(), self.pid, self.restarts, **more))  # type: ignore[arg-type]

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
        log, env = self.container.log, self.container.env
        with log.open("ab") if log else contextlib.nullcontext(DEVNULL) as output:
            process = await asyncio.create_subprocess_exec(
                *self.container.command, stdin=DEVNULL, stdout=output, stderr=STDOUT, env=env, start_new_session=True
            )
        self.pid = process.pid
        for probe in self._probes.values():
            probe.container_started()
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
            probe.container_ended()
        detail = f"signal {signal.Signals(-code).name}" if code and code < 0 else f"exit code {code}"
        self._report("exited", detail=detail)
        self.pid = 0
        self._report_readiness()

    async def _probe(self, http: aiohttp.ClientSession, probe: Probe) -> Kind:
        """Probe at each tick. Returns when the container must be killed."""
        tick, spec = time.monotonic(), probe.spec
        while True:
            if probe.due(self._has_passed("startup")):
                success, detail = await _get(http, spec)
                probe.observe(success)
                if not success:
                    run, threshold = probe.failures, spec.failure_threshold
                    self._report("probe_failed", probe=probe.kind, run=run, threshold=threshold, detail=detail)
                self._report_readiness()
                if probe.must_kill:
                    return probe.kind
            # a late tick runs at once, missed ones are skipped
            tick += spec.period * max(1, (time.monotonic() - tick) // spec.period)
            await asyncio.sleep(tick - time.monotonic())


async def _get(http: aiohttp.ClientSession, spec: ProbeSpec) -> tuple[bool, str]:
    """One probe: whether it succeeded, and a short explanation."""
    try:
        timeout = aiohttp.ClientTimeout(total=spec.timeout)
        async with http.get(spec.url, timeout=timeout, allow_redirects=False) as response:
            await response.content.read(MAX_BODY_BYTES)
    except TimeoutError:
        return False, f"no answer within {spec.timeout:g} s"
    except aiohttp.ClientError as e:
        return False, type(e).__name__
    return 200 <= response.status < 400, f"HTTP {response.status}"
