"""The demo's kubelet: the probe rules as a table, and real child processes probed, killed and restarted."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from aiohttp import web

from sidecar.tools.demo.kubelet import Container, Kubelet, KubeletEvent
from sidecar.tools.demo.probe_policy import Backoff, Exec, HttpGet, Kind, Probe, ProbeSpec

from ..waiting import PATIENCE

TRUE = Exec(("/bin/true",))
SLEEP = (sys.executable, "-c", "import time; time.sleep(600)")
RESULTS = {"s": "success", "f": "failure", "u": "unknown"}


def quick(action: HttpGet | Exec, failures: int = 3) -> ProbeSpec:
    """A probe with a short period and a timeout that a busy machine does not reach."""
    return ProbeSpec(action, period=0.02, timeout=PATIENCE, failure_threshold=failures)


# kind, failure threshold, success threshold, results in, value after each, the index of the kill or None
TABLE: list[tuple[Kind, int, int, str, str, int | None]] = [
    ("liveness", 3, 1, "ff", "ss", None),
    ("liveness", 3, 1, "fff", "ssf", 2),
    ("liveness", 3, 1, "ffsff", "sssss", None),
    ("liveness", 3, 1, "fuff", "sssf", 3),
    ("liveness", 1, 1, "f", "f", 0),
    ("readiness", 3, 1, "s", "s", None),
    ("readiness", 3, 2, "ss", "fs", None),
    ("readiness", 3, 2, "sfss", "fffs", None),
    ("readiness", 2, 1, "sffffs", "ssfffs", None),
    ("readiness", 2, 1, "sfsf", "ssss", None),
    ("startup", 3, 1, "ffs", "uus", None),
    ("startup", 3, 1, "fff", "uuf", 2),
    ("startup", 2, 1, "fuf", "uuf", 2),
]


def _probe(kind: Kind, **spec: float) -> Probe:
    probe = Probe(kind, ProbeSpec(TRUE, **spec))  # type: ignore[arg-type]
    probe.container_started(0.0)
    return probe


@pytest.mark.parametrize(("kind", "failures", "successes", "results", "values", "kill"), TABLE)
def test_thresholds(kind: Kind, failures: int, successes: int, results: str, values: str, kill: int | None) -> None:
    """A value changes after enough equal results in a row, errored probes do not count, and only some kinds kill."""
    probe = _probe(kind, failure_threshold=failures, success_threshold=successes)
    seen = [probe.observe(RESULTS[r], float(i)) for i, r in enumerate(results)]  # type: ignore[arg-type]
    assert [d.value for d in seen] == [RESULTS[v] for v in values]
    assert [i for i, d in enumerate(seen) if d.kill] == ([] if kill is None else [kill])


def test_since_is_when_the_value_changed() -> None:
    """A decision has the time since when its value holds, not of its last confirmation."""
    probe = _probe("readiness", failure_threshold=2)
    assert [probe.observe(r, at).since for r, at in (("success", 5.0), ("success", 6.0), ("failure", 7.0))] == [5, 5, 5]
    assert probe.observe("failure", 8.0).since == 8.0


@pytest.mark.parametrize(
    ("kind", "delay", "now", "started", "due"),
    [
        ("liveness", 0, 0.0, True, True),
        ("liveness", 0, 0.0, False, False),
        ("readiness", 0, 0.0, False, False),
        ("startup", 0, 0.0, False, True),
        ("startup", 0, 0.0, True, False),
        ("liveness", 3, 2.9, True, False),
        ("liveness", 3, 3.0, True, True),
    ],
)
def test_due(kind: Kind, delay: float, now: float, started: bool, due: bool) -> None:
    """Start-up gates the other probes and then stops; none runs within its initial delay."""
    assert _probe(kind, initial_delay=delay).due(now, started) is due


def test_hold_after_a_kill_until_the_next_container() -> None:
    """After a kill nothing is probed until a new container, which starts with the initial value and count 0."""
    probe = _probe("liveness")
    assert [probe.observe("failure", 1.0).kill for _ in range(3)] == [False, False, True]
    assert not probe.due(2.0, True)
    probe.container_ended(3.0)
    assert probe.value == "failure"
    probe.container_started(4.0)
    assert probe.value == "success"
    assert probe.due(4.0, True)
    assert [probe.observe("failure", 5.0).kill for _ in range(3)] == [False, False, True]


def test_a_crash_keeps_the_count() -> None:
    """As in kubelet, a container that exits by itself keeps the count: two failures before and one after make three."""
    probe = _probe("liveness")
    probe.observe("failure", 1.0)
    probe.observe("failure", 2.0)
    probe.container_ended(3.0)
    probe.container_started(3.0)
    assert probe.observe("failure", 4.0).kill


@pytest.mark.parametrize(
    ("lives", "waits"),
    [
        ([1, 1, 1, 1, 1, 1, 1, 1], [0, 10, 20, 40, 80, 160, 300, 300]),
        ([1, 1, 1, 601, 1], [0, 10, 20, 0, 10]),
        ([1, 1, 599, 1], [0, 10, 20, 40]),
    ],
)
def test_backoff(lives: list[float], waits: list[float]) -> None:
    """The first restart is at once, then 10 s doubling to 300 s, from the start again after a life of over 600 s."""
    backoff, now, seen = Backoff(), 0.0, []
    for life in lives:
        ended = now + life
        now = backoff.restart_at(ended)
        seen.append(now - ended)
    assert seen == waits


class Seen:
    """Events to wait for."""

    def __init__(self) -> None:
        self.all: list[KubeletEvent] = []
        self._queue: asyncio.Queue[KubeletEvent] = asyncio.Queue()

    def __call__(self, event: KubeletEvent) -> None:
        self.all.append(event)
        self._queue.put_nowait(event)

    async def until(self, wanted: Callable[[KubeletEvent], bool]) -> KubeletEvent:
        while not wanted(event := await self._queue.get()):
            pass
        return event

    async def kind(self, kind: str) -> KubeletEvent:
        return await self.until(lambda e: e.kind == kind)


async def test_liveness_kills_and_restarts() -> None:
    """Enough liveness failures in a row end the container by SIGTERM and restart it with a new pid."""
    codes = iter([200, 302, 503, 200, 503, 503, 503])

    async def live(_: web.Request) -> web.Response:
        return web.Response(status=next(codes, 200))

    app = web.Application()
    app.router.add_get("/livez", live)
    runner = web.AppRunner(app)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    port = runner.addresses[0][1]
    seen = Seen()
    spec = quick(HttpGet(f"http://127.0.0.1:{port}/livez"))
    async with Kubelet(Container(SLEEP, liveness=spec, grace=30), seen) as kubelet:
        first = (await seen.kind("started")).pid
        assert kubelet.ready
        killing = await seen.kind("killing")
        assert (killing.pid, killing.probe) == (first, "liveness")
        assert (await seen.kind("exited")).detail == "signal SIGTERM"
        second = await seen.kind("started")
        assert second.pid != first
        assert second.restarts == 1
    failures = [(e.run, e.threshold, e.detail) for e in seen.all if e.kind == "probe_failed"]
    assert failures == [(1, 3, "HTTP 503"), (1, 3, "HTTP 503"), (2, 3, "HTTP 503"), (3, 3, "HTTP 503")]
    with pytest.raises(ProcessLookupError):
        os.kill(second.pid, 0)
    await runner.cleanup()


async def test_startup_gates_readiness(tmp_path: Path) -> None:
    """Readiness is probed only after the startup probe passed; the container becomes ready, and unready again."""
    up, ready = tmp_path / "up", tmp_path / "ready"
    ready.touch()
    seen = Seen()
    container = Container(
        SLEEP,
        startup=quick(Exec(("/usr/bin/test", "-e", str(up))), 100_000),
        readiness=quick(Exec(("/usr/bin/test", "-e", str(ready))), 2),
    )
    async with Kubelet(container, seen) as kubelet:
        await seen.until(lambda e: e.kind == "probe_failed" and e.run == 3)
        assert {e.probe for e in seen.all if e.probe} == {"startup"}
        assert not kubelet.started
        up.touch()
        await seen.kind("ready")
        assert kubelet.started
        ready.unlink()
        await seen.kind("unready")
        assert kubelet.started
        assert not kubelet.ready
    assert next(e.probe for e in seen.all if e.kind == "probe_passed") == "startup"


async def test_failed_startup_kills() -> None:
    """A container that fails its startup probe too often is killed."""
    seen = Seen()
    spec = quick(Exec(("/bin/false",)), 2)
    async with Kubelet(Container(SLEEP, startup=spec), seen):
        assert (await seen.kind("killing")).probe == "startup"


async def test_grace_then_sigkill(tmp_path: Path) -> None:
    """A container that ignores SIGTERM is ended by SIGKILL after its grace period, with the processes that it left."""
    script = (
        "import signal, subprocess, time; signal.signal(signal.SIGTERM, signal.SIG_IGN);"
        "print(subprocess.Popen(['sleep', '600']).pid, flush=True); time.sleep(600)"
    )
    seen, log = Seen(), tmp_path / "log"
    spec = quick(Exec(("/usr/bin/test", "!", "-s", str(log))), 1)
    async with Kubelet(Container((sys.executable, "-c", script), liveness=spec, grace=0.2, log=log), seen):
        assert (await seen.kind("exited")).detail == "signal SIGKILL"
        await _gone(_first_number(log))


def _first_number(log: Path) -> int:
    return int(log.read_text().split()[0])


async def _gone(pid: int) -> None:
    """Wait until a process that need not be our child has ended."""
    try:
        fd = os.pidfd_open(pid)
    except ProcessLookupError:
        return
    ended = asyncio.Event()
    asyncio.get_running_loop().add_reader(fd, ended.set)
    await ended.wait()
    asyncio.get_running_loop().remove_reader(fd)
    os.close(fd)


async def test_crash_backoff_is_reported() -> None:
    """A container that keeps ending by itself restarts at once, and then waits longer each time."""
    seen = Seen()
    crash = (sys.executable, "-c", "raise SystemExit(7)")
    async with Kubelet(Container(crash, backoff=0.05, backoff_cap=0.1), seen):
        await seen.until(lambda e: e.kind == "backing_off" and e.seconds > 0.09)
    assert [e.detail for e in seen.all if e.kind == "exited"][:2] == ["exit code 7"] * 2
    kinds = [e.kind for e in seen.all]
    assert kinds[:7] == ["started", "ready", "exited", "unready", "started", "ready", "exited"]
    assert kinds.index("backing_off") > 6


async def test_command_that_does_not_exist() -> None:
    """A command that cannot be started is reported with its reason and retried, not raised."""
    seen = Seen()
    async with Kubelet(Container(("/nonexistent/engine",), backoff=0.01), seen):
        assert "No such file" in (await seen.kind("exited")).detail
        await seen.kind("backing_off")


async def test_exec_probe_outcomes(tmp_path: Path) -> None:
    """A hung probe command fails at its timeout; one that cannot run is discarded and never kills."""
    seen = Seen()
    hanging = ProbeSpec(Exec(("/bin/sleep", "600")), failure_threshold=1, period=0.02, timeout=0.05)
    async with Kubelet(Container(SLEEP, liveness=hanging), seen):
        assert (await seen.kind("probe_failed")).detail == "no answer within 0.05 s"
    seen = Seen()
    absent = quick(Exec(("/nonexistent/probe",)), 1)
    gate = tmp_path / "gate"
    ticks = quick(Exec(("/bin/sh", "-c", f"echo >> {gate}; test $(wc -l < {gate}) -ge 5")))
    async with Kubelet(Container(SLEEP, liveness=absent, readiness=ticks), seen):
        await seen.kind("ready")
    assert {e.probe for e in seen.all if e.kind == "probe_failed"} <= {"readiness"}
    assert "killing" not in [e.kind for e in seen.all]


async def test_refused_connection_is_a_failure(unused_tcp_port: int) -> None:
    """An HTTP probe of a closed port is a failure, not a discarded error."""
    seen = Seen()
    spec = quick(HttpGet(f"http://127.0.0.1:{unused_tcp_port}/"), 1)
    async with Kubelet(Container(SLEEP, liveness=spec), seen):
        assert (await seen.kind("killing")).probe == "liveness"


async def test_cancelled_owner_ends_the_container() -> None:
    """A container dies with the `async with` that owns it, also when that is cancelled."""
    seen = Seen()

    async def own() -> None:
        async with Kubelet(Container(SLEEP), seen):
            await asyncio.Event().wait()

    task = asyncio.create_task(own())
    pid = (await seen.kind("started")).pid
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    with pytest.raises(ProcessLookupError):
        os.kill(pid, signal.SIGTERM)
