"""Real neighbours: nginx in front of the relay, Prometheus scraping both ports."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from sidecar.tools.scripted_engine.server import ScriptedEngine

from ..ports import free_port
from ..waiting import PATIENCE

RULES = Path(__file__).resolve().parents[2] / "deploy" / "prometheus" / "rules.yaml"
NGINX = """
daemon off; pid {folder}/nginx.pid; error_log {folder}/error.log; worker_processes 1;
events {{ worker_connections 64; }}
http {{
  access_log off; client_body_temp_path {folder}; proxy_temp_path {folder}; fastcgi_temp_path {folder};
  uwsgi_temp_path {folder}; scgi_temp_path {folder};
  server {{
    listen 127.0.0.1:{port};
    location / {{ proxy_pass {relay}; proxy_http_version 1.1; proxy_buffering off; }}
  }}
}}
"""
PROMETHEUS = """
global: {{scrape_interval: 1s, scrape_timeout: 1s, evaluation_interval: 1s}}
rule_files: ["{rules}"]
scrape_configs:
  - {{job_name: admin, static_configs: [{{targets: ["{admin}"]}}]}}
  - {{job_name: relay, static_configs: [{{targets: ["{relay}"]}}]}}
"""


@contextlib.asynccontextmanager
async def running(*command: str) -> AsyncIterator[None]:
    process = await asyncio.create_subprocess_exec(
        *command, stdout=asyncio.subprocess.DEVNULL, stderr=asyncio.subprocess.DEVNULL
    )
    try:
        yield
    finally:
        process.terminate()
        await process.wait()


async def answering(session: aiohttp.ClientSession, url: str) -> None:
    """Wait until `url` answers 200."""
    async with asyncio.timeout(PATIENCE):
        while True:
            with contextlib.suppress(aiohttp.ClientError):
                async with session.get(url) as answer:
                    if answer.status == 200:
                        return
            await asyncio.sleep(0.1)


async def test_streams_pass_nginx_event_by_event_and_its_client_can_leave(
    engine: ScriptedEngine, start: Any, requires: Any, tmp_path: Path
) -> None:
    """Behind an ingress, events are streamed, and a disconnecting client frees the engine."""
    nginx = str(requires("nginx"))
    sidecar = await start(engine.url)
    port = free_port()
    config = tmp_path / "nginx.conf"
    config.write_text(NGINX.format(folder=tmp_path, port=port, relay=sidecar.relay))
    async with running(nginx, "-e", str(tmp_path / "error.log"), "-c", str(config)):
        front = f"http://127.0.0.1:{port}"
        await answering(sidecar.session, front + "/v1/models")
        body = {
            "model": "scripted",
            "stream": True,
            "max_tokens": 100_000,
            "messages": [{"role": "user", "content": "hi"}],
        }
        async with sidecar.session.post(front + "/v1/chat/completions", json=body) as stream:
            assert (await stream.content.readline()).startswith(b"data: {")
            assert engine.open == 1
            stream.close()
        async with asyncio.timeout(PATIENCE):
            await engine.until(lambda: engine.open == 0)
    await sidecar.until_metrics('outcome="client_cancelled"')


async def test_prometheus_scrapes_both_ports(engine: ScriptedEngine, start: Any, requires: Any, tmp_path: Path) -> None:
    """A real Prometheus scrapes both ports, with the engine's series on the relay's, and evaluates the rules."""
    prometheus = str(requires("prometheus"))
    sidecar = await start(engine.url)
    await sidecar.until_verdict("idle")
    port = free_port()
    config = tmp_path / "prometheus.yml"
    config.write_text(
        PROMETHEUS.format(
            admin=sidecar.admin.removeprefix("http://"), relay=sidecar.relay.removeprefix("http://"), rules=RULES
        )
    )
    listen = f"--web.listen-address=127.0.0.1:{port}"
    async with running(prometheus, f"--config.file={config}", f"--storage.tsdb.path={tmp_path}/data", listen):
        api = f"http://127.0.0.1:{port}"
        await answering(sidecar.session, api + "/-/ready")
        for query, expected in (
            ("up == 1", {"admin", "relay"}),
            ("sidecar_mu_in_flight", {"admin", "relay"}),
            ('sidecar_verdict{verdict="idle"} == 1', {"admin", "relay"}),
            ('{__name__="vllm:num_requests_running"}', {"relay"}),
            ("job:sidecar_mu_utilization_ratio:sum", {"admin", "relay"}),
        ):
            await queried(sidecar.session, api, query, expected)


async def queried(session: aiohttp.ClientSession, api: str, query: str, expected: set[str]) -> None:
    """Wait until the jobs that have a series for `query` are `expected`."""
    found: set[str] = set()
    try:
        async with asyncio.timeout(PATIENCE):
            while found != expected:
                async with session.get(api + "/api/v1/query", params={"query": query}) as answer:
                    found = {series["metric"]["job"] for series in json.loads(await answer.text())["data"]["result"]}
                await asyncio.sleep(0.2)
    except TimeoutError:
        pytest.fail(f"{query}: jobs {found}, not {expected}")


async def test_scrapers_do_not_reach_the_engine(engine: ScriptedEngine, start: Any) -> None:
    """Despite six scrapers of both ports at full speed, the engine is scraped once a second."""
    sidecar = await start(engine.url)
    await sidecar.until_merged("vllm:num_requests_running", "sidecar_mu_utilization_ratio")
    loop = asyncio.get_running_loop()
    asked, began, pages = engine.scrapes, loop.time(), 0

    async def scrape(url: str) -> None:
        nonlocal pages
        while engine.scrapes < asked + 4 or pages < 60:
            async with sidecar.session.get(url + "/metrics") as answer:
                assert answer.status == 200
                assert "sidecar_mu_utilization_ratio" in await answer.text()
            pages += 1

    async with asyncio.timeout(PATIENCE):
        await asyncio.gather(*(scrape(url) for url in [sidecar.relay] * 4 + [sidecar.admin] * 2))
    assert (
        engine.scrapes - asked < loop.time() - began + 3
    )  # one that was sent before may come late, and both ends count
