"""A real Envoy in front of two sidecars, one engine slower than the other: weighted round robin by ORCA reports."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import aiohttp
import pytest
import yaml

from sidecar.load.cost_model import Coefficients, to_json
from sidecar.tools.scripted_engine.server import EngineSettings, ScriptedEngine

from ..ports import free_port
from ..waiting import PATIENCE
from .conftest import Sidecar
from .test_neighbours import answering, running

SLOWER = 3.0
REQUESTS = 400  # round robin would send half to each
HOSTS = ("127.0.0.1", "127.0.0.2")  # Envoy knows one port of the stream for all endpoints
DEPLOY = Path(__file__).resolve().parents[2] / "deploy" / "envoy"


def slowed(co: Coefficients) -> str:
    """The coefficients file that `calibrate` would write for the slow engine."""
    prices = {k: v * SLOWER if isinstance(v, float) and k in "kabdfgh" else v for k, v in asdict(co).items()}
    return to_json(replace(co, **prices))


def bootstrap(by: str, ports: tuple[int, int], endpoints: list[tuple[str, int]], oob: int) -> str:
    """A file of deploy/envoy with a test's addresses and intervals. `ports`: listener and admin interface."""
    config = yaml.safe_load((DEPLOY / ("stream.yaml" if by == "stream" else "header.yaml")).read_text())

    def at(host: str, port: int) -> dict[str, Any]:
        return {"socket_address": {"address": host, "port_value": port}}

    resources = config["static_resources"]
    config["admin"]["address"], resources["listeners"][0]["address"] = (
        at("127.0.0.1", ports[1]),
        at("127.0.0.1", ports[0]),
    )
    (host,) = resources["listeners"][0]["filter_chains"][0]["filters"][0]["typed_config"]["route_config"][
        "virtual_hosts"
    ]
    if by != "stream":
        host["request_headers_to_add"][0]["header"]["value"] = by
    (cluster,) = resources["clusters"]
    cluster["type"] = "STATIC"
    cluster["load_assignment"]["endpoints"] = [{"lb_endpoints": [{"endpoint": {"address": at(*e)}} for e in endpoints]}]
    (policy,) = cluster["load_balancing_policy"]["policies"]
    typed = policy["typed_extension_config"]["typed_config"]
    typed |= {"blackout_period": "0s", "weight_update_period": "0.1s"}
    if "oob_reporting_config" in typed:
        typed |= {"oob_reporting_period": "0.2s", "oob_reporting_config": {"port_value": oob}}
    return yaml.safe_dump(config)


class Front:
    """A running Envoy: its address and its counters."""

    def __init__(self, url: str, admin: str, session: aiohttp.ClientSession) -> None:
        self.url, self.admin, self.session = url, admin, session

    async def stats(self) -> dict[str, int]:
        async with self.session.get(self.admin + "/stats?format=json&usedonly&filter=cluster.llm") as answer:
            return {s["name"]: s["value"] for s in json.loads(await answer.text())["stats"] if "value" in s}

    async def endpoints(self) -> list[dict[str, Any]]:
        """Weight and requests of each endpoint, in the order of HOSTS."""
        async with self.session.get(self.admin + "/clusters?format=json") as answer:
            (cluster,) = [c for c in json.loads(await answer.text())["cluster_statuses"] if c["name"] == "llm"]
        hosts = sorted(cluster["host_statuses"], key=lambda h: h["address"]["socket_address"]["address"])
        return [{"weight": h["weight"], **{s["name"]: int(s.get("value", 0)) for s in h["stats"]}} for h in hosts]

    async def ask(self, tokens: int = 8) -> str:
        """One short chat; returns the ORCA header."""
        body = {"model": "scripted", "max_tokens": tokens, "messages": [{"role": "user", "content": "hello"}]}
        async with self.session.post(self.url + "/v1/chat/completions", json=body) as answer:
            assert answer.status == 200, await answer.text()
            await answer.read()
            return str(answer.headers.get("endpoint-load-metrics", ""))


@asynccontextmanager
async def two_replicas(start: Any, slower: float, files: list[str]) -> AsyncIterator[tuple[list[Sidecar], int]]:
    """Two sidecars next to a fast and a slow engine, and the port of their streams. `files`: of coefficients, or ""."""
    oob, sidecars = free_port(), []
    fast = EngineSettings(listen=("127.0.0.1", 0), decode_step_ms=4.0)
    slow = replace(fast, decode_step_ms=4.0 * slower, prefill_tokens_per_second=20_000 / slower)
    async with ScriptedEngine(fast) as first, ScriptedEngine(slow) as second:
        for engine, file, host in zip((first, second), files, HOSTS, strict=True):
            named = {"coefficients": file} if file else {}
            sidecars.append(await start(engine.url, host=host, orca_grpc=f"{host}:{oob}", **named))
        for sidecar in sidecars:
            await sidecar.until_verdict("idle")
        yield sidecars, oob


@pytest.fixture
async def pair(start: Any, tmp_path: Path) -> AsyncIterator[tuple[list[Sidecar], int]]:
    """Two replicas with the coefficients that were measured on each."""
    files = tmp_path / "fast.json", tmp_path / "slow.json"
    files[0].write_text(to_json(Coefficients()))
    files[1].write_text(slowed(Coefficients()))
    async with two_replicas(start, SLOWER, [str(file) for file in files]) as replicas:
        yield replicas


@asynccontextmanager
async def fronted(by: str, sidecars: list[Sidecar], oob: int, envoy: Path, folder: Path) -> AsyncIterator[Front]:
    """An Envoy in front of the sidecars, which writes its log to `folder`."""
    ports = free_port(), free_port()
    endpoints = [(host, int(s.relay.rpartition(":")[2])) for host, s in zip(HOSTS, sidecars, strict=True)]
    config = folder / "envoy.yaml"
    config.write_text(bootstrap(by, ports, endpoints, oob))
    command = str(envoy), "-c", str(config), "--disable-hot-restart", "--concurrency", "1", "-l", "debug"
    front = Front(f"http://127.0.0.1:{ports[0]}", f"http://127.0.0.1:{ports[1]}", sidecars[0].session)
    async with running(*command, "--log-path", str(folder / "envoy.log")):
        await answering(front.session, front.admin + "/ready")
        yield front


@pytest.mark.parametrize(
    "by", ["JSON", pytest.param("TEXT", marks=pytest.mark.slow), pytest.param("BIN", marks=pytest.mark.slow), "stream"]
)
async def test_envoy_takes_every_report_and_traffic_follows_capacity(
    by: str, pair: tuple[list[Sidecar], int], requires: Any, tmp_path: Path
) -> None:
    """By header in each format and by stream: the fast engine gets three of four requests, no report is rejected.

    With even chances, 280 of 400 come about once in 10^15 runs.
    """
    envoy = requires("python:envoy").parent / "_bin" / "envoy"

    sidecars, oob = pair
    async with fronted(by, sidecars, oob, envoy, tmp_path) as front:
        async with asyncio.timeout(PATIENCE):
            while (weights := [e["weight"] for e in await front.endpoints()]) and weights[0] < 2 * weights[1]:
                await front.ask()
        before = [e.get("rq_total", 0) for e in await front.endpoints()]
        places = asyncio.Semaphore(16)

        async def one() -> str:
            async with places:
                return await front.ask()

        seen = await asyncio.gather(*(one() for _ in range(REQUESTS)))
        after = await front.endpoints()
        stats = await front.stats()
    share = (after[0]["rq_total"] - before[0]) / REQUESTS
    assert 0.7 < share < 0.8, (share, after)
    assert not any(seen), "reports are for Envoy, not for clients"
    assert "onOrcaLoadReport failed" not in (tmp_path / "envoy.log").read_text()
    if by == "stream":
        assert stats["cluster.llm.lb_orca_oob.reports_received"] > 4
        assert stats.get("cluster.llm.lb_orca_oob.report_errors", 0) == 0


@pytest.mark.slow
async def test_the_faster_of_two_uncalibrated_replicas_gets_more(start: Any, requires: Any, tmp_path: Path) -> None:
    """Equal settings, no coefficients, one engine four times slower: within minutes the fast one gets twice as much.

    Prints the time until Envoy's weights reflect it.
    """
    envoy = requires("python:envoy").parent / "_bin" / "envoy"
    async with (
        two_replicas(start, 4.0, ["", ""]) as (sidecars, oob),
        fronted("JSON", sidecars, oob, envoy, tmp_path) as front,
    ):
        began, is_over = asyncio.get_running_loop().time(), asyncio.Event()

        async def user() -> None:
            while not is_over.is_set():
                await front.ask(64)

        async with asyncio.TaskGroup() as users:
            for _ in range(8):
                users.create_task(user())
            async with asyncio.timeout(10 * PATIENCE):
                while (weights := [e["weight"] for e in await front.endpoints()]) and weights[0] < 2 * weights[1]:
                    await front.ask(64)
            took = asyncio.get_running_loop().time() - began
            before = [e["rq_total"] for e in await front.endpoints()]
            async with asyncio.timeout(10 * PATIENCE):
                while sum(counts := [e["rq_total"] for e in await front.endpoints()]) < sum(before) + REQUESTS:
                    await front.ask(64)
            is_over.set()
    fast, slow = (after - at for after, at in zip(counts, before, strict=True))
    print(f"after {took:.0f} s: {fast} : {slow}")
    assert fast >= 2 * slow
