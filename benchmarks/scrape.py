"""What scrapers cost: four request the relay's merged page every 50 ms, as llm-d's router does.

    python benchmarks/scrape.py [--seconds 20] [--rounds 3] [--write]

Quiet and scraped spans alternate; what the scrapers cost is the difference, in percent of one core. Scrapers keep their
connections. The engine is the scripted one, in this process, which counts what it is asked; it is busy with a few
streams, so that its page and ours are not empty.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import platform
import statistics
import sys
import tempfile
import time
import urllib.request
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path

import aiohttp

from sidecar.tools.scripted_engine.server import EngineSettings, ScriptedEngine

SCRAPERS, SCRAPE_INTERVAL_S = 4, 0.05
STREAMS, TOKENS = 4, 200
TARGET_CORE_PERCENT = 2.0


@dataclass(frozen=True, slots=True)
class Span:
    """CPU percent of control and relay, scrapes and pages per second, median and maximum time of a page in ms."""

    control: float
    relay: float
    engine: float
    pages: float
    p50: float
    most: float


def cpu(pid: int) -> float:
    """Seconds of CPU that a process and its threads used so far."""
    return sum(int((task / "schedstat").read_text().split()[0]) for task in Path(f"/proc/{pid}/task").iterdir()) / 1e9


async def scrape(session: aiohttp.ClientSession, url: str, until: float, times: list[float]) -> None:
    """Ask for the page every 50 ms."""
    due = time.perf_counter()
    while due < until:
        began = time.perf_counter()
        async with session.get(url) as answer:
            await answer.read()
            assert answer.status == 200
        times.append(time.perf_counter() - began)
        due = max(due + SCRAPE_INTERVAL_S, time.perf_counter())
        await asyncio.sleep(due - time.perf_counter())


async def stream(session: aiohttp.ClientSession, url: str) -> None:
    """One stream after the other, until cancelled."""
    body = {"model": "scripted", "stream": True, "max_tokens": TOKENS, "messages": [{"role": "user", "content": "go"}]}
    while True:
        async with session.post(url + "/v1/chat/completions", json=body) as answer:
            await answer.read()


async def span(engine: ScriptedEngine, pids: tuple[int, int], relay: str, seconds: float, scrapers: int) -> Span:
    """Measure for `seconds` with so many scrapers."""
    times: list[float] = []
    before, asked, began = [cpu(pid) for pid in pids], engine.scrapes, time.perf_counter()
    async with contextlib.AsyncExitStack() as stack:
        sessions = [await stack.enter_async_context(aiohttp.ClientSession()) for _ in range(scrapers)]
        await asyncio.gather(
            asyncio.sleep(seconds), *(scrape(s, relay + "/metrics", began + seconds, times) for s in sessions)
        )
    took = time.perf_counter() - began
    used = [100 * (cpu(pid) - b) / took for pid, b in zip(pids, before, strict=True)]
    milliseconds = [1000 * t for t in times] or [0.0]
    rates = (engine.scrapes - asked) / took, len(times) / took
    return Span(*used, *rates, statistics.median(milliseconds), max(milliseconds))


@contextlib.asynccontextmanager
async def house() -> AsyncIterator[tuple[ScriptedEngine, tuple[int, int], str]]:
    """A scripted engine and a sidecar: (engine, process ids of control and relay, URL of the relay)."""
    with tempfile.TemporaryDirectory() as folder:
        async with ScriptedEngine(EngineSettings(listen=("127.0.0.1", 0))) as engine:
            relay, admin = free_port(), free_port()
            flags = {"engine": engine.url, "listen": f"127.0.0.1:{relay}", "admin": f"127.0.0.1:{admin}"}
            flags |= {"state-dir": folder, "images": "off", "log-level": "error"}
            command = [sys.executable, "-m", "sidecar", "run", *(x for k, v in flags.items() for x in (f"--{k}", v))]
            process = await asyncio.create_subprocess_exec(*command)
            try:
                yield engine, await served(admin), f"http://127.0.0.1:{relay}"
            finally:
                process.terminate()
                await process.wait()


async def served(admin: int) -> tuple[int, int]:
    """Wait until the engine is known; process ids of control and relay."""
    async with asyncio.timeout(60):
        while True:
            with contextlib.suppress(OSError):
                await asyncio.to_thread(ask, admin, "/startupz")
                health = json.loads(await asyncio.to_thread(ask, admin, "/healthz"))
                return int(health["pid"]), int(health["relays"][0]["pid"])
            await asyncio.sleep(0.1)


def ask(port: int, path: str) -> bytes:
    return bytes(urllib.request.urlopen(f"http://127.0.0.1:{port}{path}", timeout=5).read())


def free_port() -> int:
    import socket

    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


async def measure(seconds: float, rounds: int) -> tuple[list[Span], list[Span], int]:
    """(quiet spans, scraped spans, bytes of the page)."""
    quiet, scraped = [], []
    async with house() as (engine, pids, relay), aiohttp.ClientSession() as session:
        streams = [asyncio.create_task(stream(session, relay)) for _ in range(STREAMS)]
        await asyncio.sleep(3)
        for _ in range(rounds):
            quiet.append(await span(engine, pids, relay, seconds, 0))
            scraped.append(await span(engine, pids, relay, seconds, SCRAPERS))
        async with session.get(relay + "/metrics") as answer:
            page = len(await answer.read())
        for task in streams:
            task.cancel()
        await asyncio.gather(*streams, return_exceptions=True)
    return quiet, scraped, page


def report(quiet: list[Span], scraped: list[Span], page: int, command: str) -> str:
    """The result as Markdown."""
    costs = [s.control + s.relay - q.control - q.relay for q, s in zip(quiet, scraped, strict=True)]
    lines = [
        f"# Scrapers, {time.strftime('%Y-%m-%d')}",
        "",
        f"{processor()}, {os.cpu_count()} cores, Python {platform.python_version()}; "
        f"load before: {os.getloadavg()[0]:.1f}. `{command}`.",
        f"{SCRAPERS} scrapers, each every {SCRAPE_INTERVAL_S * 1000:.0f} ms; a page of {page:,} bytes; "
        f"{STREAMS} streams throughout.",
        "",
        "| | control, % of a core | relay, % of a core | pages a second | p50 ms | max ms "
        "| scrapes of the engine a second |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, spans in (("quiet", quiet), ("scraped", scraped)):
        cells = [
            statistics.median(getattr(s, f) for s in spans)
            for f in ("control", "relay", "pages", "p50", "most", "engine")
        ]
        lines.append(f"| {name} | {' | '.join(f'{c:.2f}' for c in cells)} |")
    rows = ", ".join(f"{cost:.2f}" for cost in costs)
    lines += [
        "",
        f"Cost of the scrapers: {statistics.median(costs):.2f} % of a core (rounds: {rows}); "
        f"target: < {TARGET_CORE_PERCENT:g} %.",
    ]
    return "\n".join(lines) + "\n"


def processor() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()


def main() -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--seconds", type=float, default=20.0, help="length of one span")
    parser.add_argument("--rounds", type=int, default=3, help="pairs of spans")
    parser.add_argument("--write", action="store_true", help="keep the result in benchmarks/results")
    chosen = parser.parse_args()
    if chosen.rounds < 1 or chosen.seconds <= 0:
        parser.error("--rounds must be at least 1, --seconds over 0")
    command = f"python benchmarks/scrape.py --seconds {chosen.seconds:g} --rounds {chosen.rounds}"
    text = report(*asyncio.run(measure(chosen.seconds, chosen.rounds)), command)
    print(text)
    if chosen.write:
        results = Path(__file__).resolve().parent / "results"
        (results / f"scrape-{time.strftime('%Y-%m-%d')}.md").write_text(text)


if __name__ == "__main__":
    main()
