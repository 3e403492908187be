"""How the sidecar starts, serves, and ends."""

from __future__ import annotations

import asyncio
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from sidecar.tools.scripted_engine.server import ScriptedEngine

from ..waiting import PATIENCE


async def test_sigterm_turns_readiness_off_finishes_streams_and_exits_0(engine: ScriptedEngine, start: Any) -> None:
    """An open stream ends by itself; readiness fails meanwhile; liveness does not; the exit code is 0."""
    sidecar = await start(engine.url, drain_seconds="60")
    await sidecar.until_verdict("idle")
    engine.faults.start("slow")  # so that the stream outlasts the looks at the drain, on a busy machine, too
    async with sidecar.chat(tokens=400) as stream:
        await stream.content.readany()
        sidecar.process.terminate()
        snapshot = await sidecar.until(lambda s: s["draining"])
        assert snapshot["verdict"]["state"] in ("exempt", "progressing", "quiet")
        assert (await sidecar.get("/readyz"))[0] == 503
        assert (await sidecar.get("/livez"))[0] == 200
        engine.faults.clear()
        text = (await stream.read()).decode()
        assert text.rstrip().endswith("data: [DONE]")
    async with asyncio.timeout(PATIENCE):
        assert await sidecar.process.wait() == 0
    assert not (sidecar.state / "stalled").exists()


async def test_a_stream_that_does_not_end_is_cut_after_the_drain_time(engine: ScriptedEngine, start: Any) -> None:
    """The drain is bounded."""
    sidecar = await start(engine.url, drain_seconds="1")
    await sidecar.until_verdict("idle")
    async with sidecar.chat(tokens=1_000_000) as stream:
        await stream.content.readany()
        assert await sidecar.stop() == 0


@pytest.mark.parametrize("flag", ["listen", "admin"])
def test_a_taken_port_ends_with_1_and_names_the_port(flag: str, tmp_path: Path) -> None:
    """One line, exit code 1."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        ports = {"listen": "127.0.0.1:0", "admin": "127.0.0.1:0", flag: f"127.0.0.1:{port}"}
        flags = [x for k, v in ports.items() for x in (f"--{k}", v)]
        command = [sys.executable, "-m", "sidecar", "run", "--engine", "http://127.0.0.1:9", "--log-level", "error"]
        done = subprocess.run(
            [*command, *flags, "--state-dir", str(tmp_path)], capture_output=True, text=True, timeout=60, check=False
        )
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1 and f"--{flag}: port {port}" in done.stderr


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["run"], "--engine is missing"),
        (["run", "--engine", "x"], "--engine: 'x' is not an http(s) URL"),
        (["run", "--engin", "x"], "--engine"),
        (["run", "--engine", "http://h", "--coefficients", "/nowhere"], "--coefficients"),
        (["run", "--", "no-such-engine"], "COMMAND: 'no-such-engine' is not a program"),
        (["run", "--", "sleep", "9"], "--engine is missing, and the command names no --port"),
        (["nonsense"], "nonsense"),
    ],
)
def test_wrong_usage_ends_with_2_and_one_line(args: list[str], words: str) -> None:
    """Exit code 2; the line says what to do."""
    done = subprocess.run(
        [sys.executable, "-m", "sidecar", *args], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1 and words in done.stderr


async def test_several_relay_processes_share_the_port_and_one_ledger(engine: ScriptedEngine, start: Any) -> None:
    """--workers 3: requests of all relays are counted together."""
    sidecar = await start(engine.url, workers="3")
    await sidecar.until(lambda s: len(s["relays"]) == 3 and all(r["pulse_age"] is not None for r in s["relays"]))

    async def ask() -> None:
        async with sidecar.chat(tokens=3, connection="close") as answer:
            assert answer.status == 200
            await answer.read()

    await asyncio.gather(*(ask() for _ in range(30)))
    await sidecar.until(lambda s: sum(t["requests_total"] for t in s["tenants"]) == 30)
    _, load = await sidecar.get("/load")
    assert load["requests"]["in_flight"] == 0 and load["mu"]["per_minute"] > 0


async def test_load_is_held_while_a_request_is_outstanding_and_settled_after(
    engine: ScriptedEngine, start: Any
) -> None:
    """Hold, then settle: in flight while it runs, 0 after, counted once under its tenant."""
    sidecar = await start(engine.url)
    await sidecar.until_verdict("idle")
    async with sidecar.chat(tokens=300, **{"x-tenant-id": "acme"}) as stream:
        assert float(stream.headers["x-sidecar-mu"]) > 0
        await stream.content.readany()
        held = await sidecar.until(lambda s: s["load"]["requests_in_flight"] == 1)
        assert held["load"]["mu_in_flight"] > 0 and held["load"]["decode_tokens_in_flight"] > 0
        await stream.read()
    done = await sidecar.until(lambda s: s["load"]["requests_in_flight"] == 0 and bool(s["tenants"]))
    assert done["load"]["mu_in_flight"] == 0
    (acme,) = [t for t in done["tenants"] if t["tenant"] == "acme"]
    assert acme["requests_total"] == 1 and acme["tokens_total"] == 300
    await sidecar.until_metrics('sidecar_requests_total{model="scripted",outcome="ok",tenant="acme"} 1.0')


async def test_the_merged_page_and_the_orca_header_carry_the_load(engine: ScriptedEngine, start: Any) -> None:
    """Routers that see only the inference port see one complete page, and the load of each answer when they ask."""
    sidecar = await start(engine.url)
    await sidecar.until_verdict("idle")
    await sidecar.until_merged("vllm:num_requests_running", "sidecar_mu_utilization_ratio")
    header = ""
    while not header:  # the relay knows the load once the control process has reported it, within a second of its start
        async with sidecar.chat(**{"endpoint-load-metrics-format": "JSON"}) as answer:
            await answer.read()
            header = answer.headers.get("endpoint-load-metrics", "")
    assert header.startswith("JSON {") and "mu_utilization" in header
    async with sidecar.chat() as answer:
        await answer.read()
        assert "endpoint-load-metrics" not in answer.headers
