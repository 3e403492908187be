"""The demo's kubelet: the probe rules as a table, and real child processes probed, killed and restarted."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from aiohttp import web

from sidecar.health.probe_policy import Backoff, Kind, Probe, ProbeSpec
from sidecar.tools.demo.kubelet import Container, Kubelet, KubeletEvent

from ..waiting import PATIENCE

SLEEP = (sys.executable, "-c", "import time; time.sleep(600)")


def quick(url: str, failures: int = 3) -> ProbeSpec:
    """A probe with a short period and a timeout that a busy machine does not reach."""
    return ProbeSpec(url, period=0.02, timeout=PATIENCE, failure_threshold=failures)


@asynccontextmanager
async def answering(**passes: Callable[[], bool]) -> AsyncIterator[str]:
    """The URL of a server that answers each path with 200 while its function says so, else with 503."""

    async def answer(request: web.Request) -> web.Response:
        return web.Response(status=200 if passes[request.path[1:]]() else 503)

    async with serving(answer) as url:
        yield url


@asynccontextmanager
async def serving(answer: Callable[[web.Request], Awaitable[web.Response]]) -> AsyncIterator[str]:
    app = web.Application()
    app.router.add_get("/{path}", answer)
    runner = web.AppRunner(app)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    try:
        yield f"http://127.0.0.1:{runner.addresses[0][1]}"
    finally:
        await runner.cleanup()


# kind, failure threshold, results in, whether it passes after each, the index of the kill or None
TABLE: list[tuple[Kind, int, str, str, int | None]] = [
    ("liveness", 3, "ff", "ss", None),
    ("liveness", 3, "fff", "ssf", 2),
    ("liveness", 3, "ffsff", "sssss", None),
    ("liveness", 1, "f", "f", 0),
    ("readiness", 3, "s", "s", None),
    ("readiness", 2, "sffffs", "ssfffs", None),
    ("readiness", 2, "sfsf", "ssss", None),
    ("startup", 3, "ffs", "ffs", None),
    ("startup", 3, "fff", "fff", 2),
    ("startup", 2, "ff", "ff", 1),
]


def _probe(kind: Kind, failure_threshold: int = 3) -> Probe:
    probe = Probe(kind, ProbeSpec("http://127.0.0.1:1/", failure_threshold=failure_threshold))
    probe.container_started()
    return probe


@pytest.mark.parametrize(("kind", "failures", "results", "passes", "kill"), TABLE)
def test_thresholds(kind: Kind, failures: int, results: str, passes: str, kill: int | None) -> None:
    """A probe fails after enough failures in a row, passes with one success, and only some kinds kill."""
    probe, seen = _probe(kind, failures), []
    for result in results:
        probe.observe(result == "s")
        seen.append((probe.passed, probe.must_kill))
    assert [passed for passed, _ in seen] == [p == "s" for p in passes]
    assert [i for i, (_, must_kill) in enumerate(seen) if must_kill] == ([] if kill is None else [kill])


@pytest.mark.parametrize(
    ("kind", "started", "due"),
    [
        ("liveness", True, True),
        ("liveness", False, False),
        ("readiness", False, False),
        ("startup", False, True),
        ("startup", True, False),
    ],
)
def test_due(kind: Kind, started: bool, due: bool) -> None:
    """Start-up gates the other probes and then stops."""
    assert _probe(kind).due(started) is due


def test_hold_after_a_kill_until_the_next_container() -> None:
    """After a kill nothing is probed until a new container, which starts with the initial value and count 0."""
    probe = _probe("liveness")
    for killed in (False, False, True):
        probe.observe(False)
        assert probe.must_kill is killed
    assert not probe.due(True)
    probe.container_ended()
    assert not probe.passed
    assert not probe.due(True)
    probe.container_started()
    assert probe.passed
    assert probe.due(True)
    for killed in (False, False, True):
        probe.observe(False)
        assert probe.must_kill is killed


def test_a_crash_keeps_the_count() -> None:
    """As in kubelet, a container that exits by itself keeps the count: two failures before and one after make three."""
    probe = _probe("liveness")
    probe.observe(False)
    probe.observe(False)
    probe.container_ended()
    probe.container_started()
    probe.observe(False)
    assert probe.must_kill


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

    seen = Seen()
    async with serving(live) as url:
        container = Container(SLEEP, {"liveness": quick(f"{url}/livez")}, grace=30)
        async with Kubelet(container, seen) as kubelet:
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


async def test_startup_gates_readiness() -> None:
    """Readiness is probed only after the startup probe passed; the container becomes ready, and unready again."""
    up, ready = asyncio.Event(), asyncio.Event()
    ready.set()
    seen = Seen()
    async with answering(up=up.is_set, ready=ready.is_set) as url:
        probes: dict[Kind, ProbeSpec] = {
            "startup": quick(f"{url}/up", 100_000),
            "readiness": quick(f"{url}/ready", 2),
        }
        async with Kubelet(Container(SLEEP, probes), seen) as kubelet:
            await seen.until(lambda e: e.kind == "probe_failed" and e.run == 3)
            assert {e.probe for e in seen.all if e.probe} == {"startup"}
            assert not kubelet.started
            up.set()
            await seen.kind("ready")
            assert kubelet.started
            ready.clear()
            await seen.kind("unready")
            assert kubelet.started
            assert not kubelet.ready


async def test_failed_startup_kills() -> None:
    """A container that fails its startup probe too often is killed."""
    seen = Seen()
    async with (
        answering(up=lambda: False) as url,
        Kubelet(Container(SLEEP, {"startup": quick(f"{url}/up", 2)}), seen),
    ):
        assert (await seen.kind("killing")).probe == "startup"


async def test_grace_then_sigkill(tmp_path: Path) -> None:
    """A container that ignores SIGTERM is ended by SIGKILL after its grace period, with the processes that it left."""
    script = (
        "import signal, subprocess, time; signal.signal(signal.SIGTERM, signal.SIG_IGN);"
        "print(subprocess.Popen(['sleep', '600']).pid, flush=True); time.sleep(600)"
    )
    seen, log = Seen(), tmp_path / "log"
    async with answering(silent=lambda: not log.exists() or not log.stat().st_size) as url:
        probes: dict[Kind, ProbeSpec] = {"liveness": quick(f"{url}/silent", 1)}
        async with Kubelet(Container((sys.executable, "-c", script), probes, grace=0.2, log=log), seen):
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


async def test_a_hanging_answer_is_a_failure() -> None:
    """A probe whose answer does not come fails at its timeout."""
    seen = Seen()
    with socket.create_server(("127.0.0.1", 0)) as never_accepts:
        url = f"http://127.0.0.1:{never_accepts.getsockname()[1]}/livez"
        hanging = ProbeSpec(url, failure_threshold=1, period=0.02, timeout=0.05)
        async with Kubelet(Container(SLEEP, {"liveness": hanging}), seen):
            assert (await seen.kind("probe_failed")).detail == "no answer within 0.05 s"


async def test_refused_connection_is_a_failure(unused_tcp_port: int) -> None:
    """A probe of a closed port is a failure."""
    seen = Seen()
    spec = quick(f"http://127.0.0.1:{unused_tcp_port}/", 1)
    async with Kubelet(Container(SLEEP, {"liveness": spec}), seen):
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
