"""deploy/compose/laptop without a container engine: the same processes, from the same files, on free ports."""

from __future__ import annotations

import asyncio
import contextlib
import gzip
import json
import os
import re
import sys
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import aiohttp
import pytest
import yaml
from aiohttp import web
from opentelemetry.proto.collector.logs.v1.logs_service_pb2 import ExportLogsServiceRequest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

from ..ports import free_port
from ..waiting import PATIENCE

FOLDER = Path(__file__).resolve().parents[2] / "deploy" / "compose" / "laptop"
COMPOSE = yaml.safe_load((FOLDER / "compose.yaml").read_text())
SERVICES = COMPOSE["services"]


def mounts() -> dict[str, dict[str, Path]]:
    """Service -> path in its container -> file of this repository."""
    found: dict[str, dict[str, Path]] = {}
    for name, service in SERVICES.items():
        for volume in service.get("volumes", []):
            source, target, *_ = volume.split(":")
            if source.startswith("."):
                found.setdefault(name, {})[target] = (FOLDER / source).resolve()
    return found


def hosts(text: str) -> set[str]:
    """Names of services that a text addresses."""
    return set(re.findall(r"(?:http://|\b)([a-z]+):\d{4,5}\b", text)) - {"localhost"}


# --- the files ---


def test_every_file_and_host_is_there() -> None:
    """Each mounted file exists, each configuration and variable addresses a service, and each port a listener of it."""
    for name, files in mounts().items():
        assert [path for path in files.values() if not path.is_file()] == [], name
    texts = [path.read_text() for files in mounts().values() for path in files.values() if path.parent == FOLDER]
    texts += [str(value) for service in SERVICES.values() for value in service.get("environment", {}).values()]
    addressed = {host for text in texts for host in hosts(text)}
    assert {"sidecar", "jaeger", "prometheus", "collector", "engine"} <= addressed <= set(SERVICES)


def test_only_this_machine_can_connect() -> None:
    """No port is published beyond loopback: nothing here has a log-in."""
    published = [port for service in SERVICES.values() for port in service.get("ports", [])]
    assert published and [port for port in published if not port.startswith("127.0.0.1:")] == []


def test_the_collector_has_a_way_for_each_signal() -> None:
    """Each pipeline uses what is defined, nothing is defined in vain, and the sidecar's endpoint is one of its own."""
    config = yaml.safe_load((FOLDER / "collector.yaml").read_text())
    pipelines = config["service"]["pipelines"]
    assert set(pipelines) == {"traces", "metrics", "logs"}
    for kind in ("receivers", "processors", "exporters"):
        used = {name for pipeline in pipelines.values() for name in pipeline[kind]}
        assert used == set(config[kind]), kind
    port = SERVICES["sidecar"]["environment"]["OTEL_EXPORTER_OTLP_ENDPOINT"].rsplit(":", 1)[1]
    assert config["receivers"]["otlp"]["protocols"]["http"]["endpoint"].endswith(f":{port}")


def test_grafana_finds_its_dashboard_and_source() -> None:
    """The provider's folder is where the dashboard is mounted; its data source is the Prometheus of this file."""
    files = mounts()["grafana"]
    (provider,) = yaml.safe_load((FOLDER / "grafana-dashboards.yaml").read_text())["providers"]
    dashboards = [path for target, path in files.items() if target.startswith(provider["options"]["path"] + "/")]
    assert [json.loads(path.read_text())["title"] for path in dashboards] == ["Inference sidecar"]
    sources = yaml.safe_load((FOLDER / "grafana-datasources.yaml").read_text())["datasources"]
    (default,) = [source for source in sources if source.get("isDefault")]
    assert default["type"] == "prometheus" and hosts(default["url"]) == {"prometheus"}


# --- the processes ---


class Laptop:
    """The services that run here, each with its own port on loopback instead of a name."""

    def __init__(self) -> None:
        self.ports = {name: free_port() for name in ("engine:8000", "sidecar:8080", "sidecar:9400", "prometheus:9090")}
        self.received: dict[str, list[Any]] = {"/v1/traces": [], "/v1/logs": [], "/v1/metrics": []}

    def placed(self, text: str) -> str:
        """A text of the files, with names of services as addresses of this machine and defaults filled in."""
        text = re.sub(r"\$\{\w+:-([^}]*)\}", r"\1", text)
        for name, port in self.ports.items():
            text = text.replace(name, f"127.0.0.1:{port}")
        return text

    def url(self, service: str) -> str:
        return f"http://127.0.0.1:{self.ports[service]}"


@contextlib.asynccontextmanager
async def process(*command: str, environ: dict[str, str] | None = None) -> AsyncIterator[None]:
    """A process that ends with the block."""
    env = {k: v for k, v in os.environ.items() if not k.startswith(("SIDECAR_", "OTEL_"))} | (environ or {})
    running = await asyncio.create_subprocess_exec(
        *command, env=env, stdout=asyncio.subprocess.DEVNULL, stderr=asyncio.subprocess.DEVNULL
    )
    try:
        yield
    finally:
        with contextlib.suppress(ProcessLookupError):
            running.terminate()
        await running.wait()


async def collector(laptop: Laptop) -> web.AppRunner:
    """A receiver in the collector's place."""
    forms = {"/v1/traces": ExportTraceServiceRequest, "/v1/logs": ExportLogsServiceRequest}

    async def take(request: web.Request) -> web.Response:
        body = await request.read()
        body = gzip.decompress(body) if body[:2] == b"\x1f\x8b" else body
        form = forms.get(request.path)
        laptop.received[request.path].append(form.FromString(body) if form else body)
        return web.Response(content_type="application/x-protobuf")

    app = web.Application()
    app.router.add_post("/v1/{signal}", take)
    runner = web.AppRunner(app)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    laptop.ports["collector:4318"] = runner.addresses[0][1]
    return runner


async def until(is_there: Callable[[], Any]) -> None:
    """Wait for what other processes do; their pages have no events."""
    async with asyncio.timeout(PATIENCE):
        while True:
            with contextlib.suppress(aiohttp.ClientError, ValueError, KeyError):
                if await is_there():
                    return
            await asyncio.sleep(0.2)


def command(laptop: Laptop, service: str, *, ports: dict[str, str] | None = None) -> list[str]:
    words = [laptop.placed(word) for word in SERVICES[service]["command"]]
    return [(ports or {}).get(word, word) for word in words]


@pytest.mark.slow
async def test_the_same_processes_from_the_same_files(requires: Callable[[str], Path], tmp_path: Path) -> None:
    """Engine, sidecar, traffic and Prometheus find each other; spans and verdicts reach the collector's place."""
    prometheus, laptop, sidecar = str(requires("prometheus")), Laptop(), [sys.executable, "-m", "sidecar"]
    runner = await collector(laptop)
    environ = {name: laptop.placed(value) for name, value in SERVICES["sidecar"]["environment"].items()}
    environ |= {"SIDECAR_STATE_DIR": str(tmp_path / "state"), "OTEL_BSP_SCHEDULE_DELAY": "100"}
    environ |= {
        f"SIDECAR_{flag}": laptop.placed(f"sidecar:{port}") for flag, port in (("LISTEN", 8080), ("ADMIN", 9400))
    }
    for target, path in mounts()["prometheus"].items():
        (tmp_path / Path(target).name).write_text(laptop.placed(path.read_text()))
    scraper = (  # the flags of its image
        f"--config.file={tmp_path}/prometheus.yml",
        f"--storage.tsdb.path={tmp_path}/data",
        f"--web.listen-address={laptop.placed('prometheus:9090')}",
    )
    engine = command(laptop, "engine", ports={"0.0.0.0:8000": laptop.placed("engine:8000")})
    try:
        async with (
            aiohttp.ClientSession() as http,
            process(*sidecar, *engine),
            process(*sidecar, *command(laptop, "sidecar"), environ=environ),
            process(prometheus, *scraper),
        ):

            async def status() -> Any:
                async with http.get(f"{laptop.url('sidecar:9400')}/status") as answer:
                    return await answer.json()

            async def asked(query: str) -> Any:
                async with http.get(f"{laptop.url('prometheus:9090')}/api/v1/query", params={"query": query}) as answer:
                    return (await answer.json())["data"]["result"]

            async def is_idle() -> bool:
                return bool((await status())["state"] == "idle")

            async def is_served() -> bool:
                found = await asked('sidecar_request_outcomes_total{outcome="ok"} > 0')
                return bool(found) and bool(laptop.received["/v1/traces"])

            async def has_rules() -> bool:
                async with http.get(f"{laptop.url('prometheus:9090')}/api/v1/rules") as answer:
                    groups = (await answer.json())["data"]["groups"]
                return bool(groups) and all(r["health"] != "err" for g in groups for r in g["rules"])

            await until(is_idle)
            async with process(*sidecar, *command(laptop, "traffic")):
                await until(is_served)
            await until(has_rules)
            assert (await status())["pod"] == "laptop"
            assert (await asked("up"))[0]["value"][1] == "1"
            events = [
                r.event_name
                for sent in laptop.received["/v1/logs"]
                for x in sent.resource_logs
                for scope in x.scope_logs
                for r in scope.log_records
            ]
            assert "sidecar.verdict" in events
    finally:
        await runner.cleanup()
