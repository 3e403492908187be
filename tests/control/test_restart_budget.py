"""The restart budget of several replicas, over the real client library, against an API server of our own."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from sidecar.control import restart_budget as budget
from sidecar.control.k8s_lease import DURATION, Leases, connect, told
from sidecar.control.restart_budget import SharedBudget, Target, free, look, shared, target

from .lease_server import LeaseServer, lease_server

ONE = Target("models", "llm", 1)


@dataclass
class Clock:
    now: float = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
async def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[LeaseServer]:
    """The API server, which the client library is led to by a kubeconfig."""
    async with lease_server() as running:
        path = running.kubeconfig(tmp_path)
        monkeypatch.delenv("KUBERNETES_SERVICE_HOST", raising=False)
        monkeypatch.setattr("kubernetes_asyncio.config.kube_config.KUBE_CONFIG_DEFAULT_LOCATION", str(path))
        yield running


@asynccontextmanager
async def replicas(*names: str, where: Target = ONE) -> AsyncIterator[tuple[Clock, Leases, list[SharedBudget]]]:
    """Several pods that share a clock, and the client that they use."""
    clock = Clock()
    async with await connect() as client:
        yield clock, Leases(client, where.namespace), [SharedBudget(where, name, clock) for name in names]


async def test_one_place_is_held_by_one_and_passed_on(server: LeaseServer) -> None:
    """The Lease is made by whoever asks first; the other waits, knows who is before it, and is next when it is given back."""
    async with replicas("pod-a", "pod-b") as (_, leases, (a, b)):
        a.want(True)
        b.want(True)
        assert a.read().state == "unreachable", "not asked yet is no leave to kill"
        await a.step(leases)
        await b.step(leases)
        assert (a.read().state, b.read().state) == ("granted", "taken") and "pod-a" in b.read().detail
        assert server.holder("llm-0") == "pod-a"
        a.want(False)
        await a.step(leases)
        assert server.holder("llm-0") is None
        await b.step(leases)
        assert (a.read().state, b.read().state) == ("unreachable", "granted")
        assert server.leases["llm-0"]["spec"]["leaseTransitions"] == 1


async def test_n_places_let_n_replicas_restart(server: LeaseServer) -> None:
    """Three pods, two places: two are granted, one waits; never more."""
    where = Target("models", "llm", 2)
    async with replicas("pod-a", "pod-b", "pod-c", where=where) as (_, leases, pods):
        for pod in pods:
            pod.want(True)
        for _ in range(3):
            for pod in pods:
                await pod.step(leases)
        assert sorted(pod.read().state for pod in pods) == ["granted", "granted", "taken"]
    assert set(server.leases) == {"llm-0", "llm-1"}


async def test_a_holder_that_died_is_followed_after_its_duration_by_our_own_clock(server: LeaseServer) -> None:
    """Its time stamps may be of tomorrow or of last year: what counts is how long we saw no change."""
    for stamp in ("2099-01-01T00:00:00.000000Z", "1999-01-01T00:00:00.000000Z"):
        server.write("llm-0", holderIdentity="gone", leaseDurationSeconds=60, renewTime=stamp, acquireTime=stamp)
        async with replicas("pod-b") as (clock, leases, (b,)):
            b.want(True)
            await b.step(leases)
            clock.now += 59
            await b.step(leases)
            assert b.read().state == "taken"
            clock.now += 2
            await b.step(leases)
            assert b.read().state == "granted"


async def test_a_holder_that_renews_keeps_its_place(server: LeaseServer) -> None:
    """However long its restart takes, and over a restart of its own sidecar."""
    async with replicas("pod-a", "pod-b", "pod-a") as (clock, leases, (a, b, again)):
        a.want(True)
        b.want(True)
        for _ in range(40):
            await a.step(leases)
            await b.step(leases)
            clock.now += 15
            assert (a.read().state, b.read().state) == ("granted", "taken")
        again.want(True)
        await again.step(leases)
        assert again.read().state == "granted", "the same pod finds its own place"


async def test_of_two_that_grab_at_once_one_gets_it(server: LeaseServer) -> None:
    """Both have read a free Lease; the second write names a version that is gone, and loses."""
    server.write("llm-0", leaseDurationSeconds=60)
    raced = False

    def other(name: str) -> None:
        nonlocal raced
        if not raced:
            raced = True
            server.write(name, holderIdentity="pod-x", leaseDurationSeconds=60)

    async with replicas("pod-a") as (_, leases, (a,)):
        server.before_write = other
        a.want(True)
        await a.step(leases)
        assert raced and server.holder("llm-0") == "pod-x" and a.read().state == "taken"


async def test_making_the_lease_at_once_is_a_race_too(server: LeaseServer) -> None:
    """404 for both, 409 for the slower."""
    async with replicas("pod-a") as (_, leases, (a,)):
        server.before_write = lambda name: server.write(name, holderIdentity="pod-x", leaseDurationSeconds=60)
        a.want(True)
        await a.step(leases)
        assert a.read().state == "taken"


@pytest.mark.parametrize(("code", "words"), [(403, "may not get, create and update leases in models"), (500, "500")])
async def test_an_api_server_that_refuses_is_unreachable_since_then(server: LeaseServer, code: int, words: str) -> None:
    """The first refusal starts the bounded wait of the policy; a place that is held lasts until it expires."""
    async with replicas("pod-a", "pod-b") as (clock, leases, (a, b)):
        b.want(True)
        await b.step(leases)
        server.fail = code
        a.want(True)
        await a.step(leases)
        began = clock.now
        clock.now += 30
        await a.step(leases)
        await b.step(leases)
        assert a.read().state == "unreachable" and a.read().since == began and words in a.read().detail
        assert b.read().state == "granted"
        clock.now += DURATION
        await b.step(leases)
        assert b.read().state == "unreachable", "by now it can be another's"


async def test_a_place_that_another_took_is_lost(server: LeaseServer) -> None:
    """Silent for too long, then back: it sees who has it now and waits its turn."""
    async with replicas("pod-a") as (clock, leases, (a,)):
        a.want(True)
        await a.step(leases)
        server.write("llm-0", holderIdentity="pod-b", leaseDurationSeconds=60)
        clock.now += 1
        await a.step(leases)
        await a.step(leases)
        assert a.read().state == "taken" and server.holder("llm-0") == "pod-b"


async def test_the_task_talks_and_gives_back_at_the_end(server: LeaseServer) -> None:
    """`want` and `read` never wait; a place is had soon, and nobody's once the task is cancelled."""
    it = SharedBudget(ONE, "pod-a")
    task = asyncio.create_task(it.run())
    it.want(True)
    async with asyncio.timeout(60):
        while it.read().state != "granted":  # noqa: ASYNC110  it is asked as a tick asks it
            await asyncio.sleep(0.05)
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    assert server.holder("llm-0") is None


async def test_without_a_cluster_it_says_so_and_tries_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No configuration at all: unreachable, with the library's own words, and the task lives on."""
    monkeypatch.delenv("KUBERNETES_SERVICE_HOST", raising=False)
    monkeypatch.setattr("kubernetes_asyncio.config.kube_config.KUBE_CONFIG_DEFAULT_LOCATION", str(tmp_path / "none"))
    monkeypatch.setattr(budget, "RETRY", 0.01)
    it = SharedBudget(ONE, "pod-a")
    task = asyncio.create_task(it.run())
    it.want(True)
    async with asyncio.timeout(60):
        while it.read().since == 0:  # noqa: ASYNC110  it is asked as a tick asks it
            await asyncio.sleep(0.05)
    assert it.read().state == "unreachable" and "ConfigException" in it.read().detail and not task.done()
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)


async def test_a_silent_api_server_costs_one_bounded_round(
    server: LeaseServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It takes the call and never answers: the round ends by itself."""
    monkeypatch.setattr("sidecar.control.k8s_lease.ANSWER", 0.2)
    server.silent = True
    async with replicas("pod-a") as (_, leases, (a,)), asyncio.timeout(60):
        a.want(True)
        await a.step(leases)
        assert a.read().state == "unreachable" and "Timeout" in a.read().detail


def test_an_abandoned_lease_is_told_by_its_changes() -> None:
    """Unchanged keeps the time of the first look, any change begins anew, and no foreign duration is believed beyond ten minutes."""
    first = look(None, "x", "1", 60, 100.0)
    assert look(first, "x", "1", 60, 150.0) == first and look(first, "x", "2", 60, 150.0).since == 150.0
    assert not free(first, "me", 159.0) and free(first, "me", 160.0) and free(first, "x", 100.0)
    assert free(look(None, "", "1", None, 0.0), "me", 0.0)
    assert look(None, "x", "1", 10**9, 0.0).duration == 600


def test_the_target_is_read_from_the_setting() -> None:
    """NAMESPACE/NAME:N."""
    assert target("models/llm:3") == Target("models", "llm", 3) and shared("", "me") is None


def test_an_error_without_a_status_names_its_kind() -> None:
    """One line, bounded."""
    assert told(OSError("no route"), "models") == "OSError: no route" and len(told(ValueError("x" * 999), "m")) <= 200
