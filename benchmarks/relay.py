"""What the relay costs: the same requests straight to an engine and through a relay process, in turns, in one run.

    python benchmarks/relay.py [--rounds N] [--streams N] [--write]

The engine is a small aiohttp server in its own process that answers from memory, so that only the path is timed.
Latency: one-token chat requests at concurrency 1, direct and relayed alternating, medians over all rounds. Throughput:
streams of 200 events at concurrency 32. Every answer is compared before timing. `--write` adds a file to results/.
"""

from __future__ import annotations

import argparse
import asyncio
import datetime
import json
import os
import platform
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import AsyncExitStack, contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

import aiohttp
import uvloop
from aiohttp import web

from sidecar import settings
from sidecar.events import Heartbeat
from sidecar.runtime.channel import Channel

EVENTS, CONCURRENCY = 200, 32
RUN = """
import socket, sys
from sidecar import settings; from sidecar.load.cost_model import Coefficients
from sidecar.relay.process import RelayContext, main
context = RelayContext(settings.from_json(sys.argv[1]), Coefficients(), sys.argv[2], b"")
sys.exit(main(context, socket.socket(fileno=int(sys.argv[3]))))
"""
CHUNK = {"id": "chatcmpl-0", "object": "chat.completion.chunk", "created": 0, "model": "m"}
EVENT = b"data: " + json.dumps({**CHUNK, "choices": [{"index": 0, "delta": {"content": " word"}}]}).encode() + b"\n\n"
PRICE_HEADER = b'data: {"choices":[],"usage":{"prompt_tokens":9,"completion_tokens":200}}\n\n'
DONE = b"data: [DONE]\n\n"
ANSWER = json.dumps(
    {
        "id": "chatcmpl-0",
        "object": "chat.completion",
        "created": 0,
        "model": "m",
        "choices": [{"index": 0, "message": {"role": "assistant", "content": "x"}, "finish_reason": "length"}],
        "usage": {"prompt_tokens": 9, "completion_tokens": 1, "total_tokens": 10},
    }
).encode()
ONE = {"model": "m", "max_tokens": 1, "messages": [{"role": "user", "content": "Say one word. " * 20}]}
MANY = {**ONE, "max_tokens": EVENTS, "stream": True}


async def answer(request: web.BaseRequest) -> web.StreamResponse:
    """The engine: one answer, or a stream that yields to the loop after each event, as an engine's does."""
    if b'"stream": true' not in await request.read():
        return web.Response(body=ANSWER, content_type="application/json")
    response = web.StreamResponse(headers={"content-type": "text/event-stream"})
    await response.prepare(request)
    for _ in range(EVENTS):
        await response.write(EVENT)
        await asyncio.sleep(0)
    await response.write(PRICE_HEADER + DONE)
    return response


async def serve_engine(fd: int) -> None:
    server = web.Server(answer, access_log=None)
    await asyncio.get_running_loop().create_server(server, sock=socket.socket(fileno=fd))
    await asyncio.Event().wait()


@contextmanager
def child(args: list[str], fds: tuple[int, ...]) -> Any:
    process = subprocess.Popen([sys.executable, *args, *map(str, fds)], pass_fds=fds)
    try:
        yield process
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()


async def start(stack: AsyncExitStack) -> tuple[str, str, int]:
    """(direct URL, relayed URL, the relay's pid) of a fresh engine and a fresh relay process that reports to us."""
    engine, listener = socket.create_server(("127.0.0.1", 0)), socket.create_server(("127.0.0.1", 0))
    urls = [f"http://127.0.0.1:{s.getsockname()[1]}" for s in (engine, listener)]
    stack.enter_context(child([__file__, "--serve"], (engine.fileno(),)))
    ready = asyncio.Event()
    path = str(Path(stack.enter_context(tempfile.TemporaryDirectory())) / "control")
    await asyncio.get_running_loop().create_unix_server(
        lambda: Channel(lambda fact: ready.set() if isinstance(fact, Heartbeat) else None, lambda: None), path
    )
    own = settings.to_json(settings.Settings(engine=urls[0], engine_kind="vllm"))
    relay = stack.enter_context(child(["-c", RUN, own, path], (listener.fileno(),)))
    for sock in (engine, listener):
        sock.close()
    await ready.wait()
    return urls[0], urls[1], relay.pid


async def one(client: aiohttp.ClientSession, url: str) -> float:
    began = time.perf_counter()
    async with client.post(url + "/v1/chat/completions", json=ONE) as got:
        body = await got.read()
    took = time.perf_counter() - began
    assert body == ANSWER
    return took


async def latency(
    client: aiohttp.ClientSession, direct: str, relayed: str, rounds: int
) -> tuple[list[float], list[float]]:
    """Seconds of each request, direct and relayed, in turns; who goes first changes every round."""
    times: dict[str, list[float]] = {direct: [], relayed: []}
    for url in (direct, relayed) * 100:
        await one(client, url)
    for i in range(rounds):
        for url in (direct, relayed)[:: 1 if i % 2 else -1]:
            times[url].append(await one(client, url))
    return times[direct], times[relayed]


async def stream(client: aiohttp.ClientSession, url: str, usage: bytes) -> None:
    async with client.post(url + "/v1/chat/completions", json=MANY) as got:
        assert await got.read() == EVENT * EVENTS + usage + DONE


async def throughput(client: aiohttp.ClientSession, url: str, streams: int, usage: bytes) -> float:
    """Events per second over `streams` streams, CONCURRENCY at a time."""
    gate = asyncio.Semaphore(CONCURRENCY)

    async def gated() -> None:
        async with gate:
            await stream(client, url, usage)

    began = time.perf_counter()
    async with asyncio.TaskGroup() as group:
        for _ in range(streams):
            group.create_task(gated())
    return streams * EVENTS / (time.perf_counter() - began)


def cpu_seconds(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def resident_mib(pid: int) -> float:
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20


async def measure(rounds: int, streams: int) -> list[tuple[str, str]]:
    async with AsyncExitStack() as stack:
        direct, relayed, pid = await start(stack)
        connector = aiohttp.TCPConnector(limit=0)
        client = await stack.enter_async_context(aiohttp.ClientSession(connector=connector))
        before = cpu_seconds(pid)
        d, r = await latency(client, direct, relayed, rounds)
        per_request = (cpu_seconds(pid) - before) / (rounds + 100)
        before = cpu_seconds(pid)
        rates: dict[str, list[float]] = {direct: [], relayed: []}
        for _ in range(5):
            rates[direct].append(await throughput(client, direct, streams, PRICE_HEADER))
            rates[relayed].append(await throughput(client, relayed, streams, b""))
        per_event = (cpu_seconds(pid) - before) / (5 * streams * EVENTS)
        memory = resident_mib(pid)
    md, mr = statistics.median(d) * 1e3, statistics.median(r) * 1e3
    added = statistics.median(b - a for a, b in zip(d, r, strict=True)) * 1e3
    ed, er = statistics.median(rates[direct]), statistics.median(rates[relayed])
    p99 = [statistics.quantiles(x, n=100)[98] * 1e3 for x in (d, r)]
    return [
        ("one token, direct, median ms (p99)", f"{md:.3f} ({p99[0]:.2f})"),
        ("one token, relayed, median ms (p99)", f"{mr:.3f} ({p99[1]:.2f})"),
        ("ratio relayed / direct", f"{mr / md:.2f}"),
        ("added, median of pairs, ms (target <= 1)", f"{added:.3f}"),
        ("relay CPU per request, ms", f"{per_request * 1e3:.3f}"),
        (f"events/s at c={CONCURRENCY}, direct", f"{ed:,.0f}"),
        (f"events/s at c={CONCURRENCY}, relayed", f"{er:,.0f}"),
        ("relay CPU per event, µs", f"{per_event * 1e6:.1f}"),
        ("relay resident memory, MiB", f"{memory:.0f}"),
    ]


def machine() -> str:
    models = [
        line.partition(":")[2].strip()
        for line in Path("/proc/cpuinfo").read_text().splitlines()
        if "model name" in line
    ]
    return f"{models[0] if models else platform.machine()}, {os.cpu_count()} cores"


def report(rows: list[tuple[str, str]], rounds: int, streams: int) -> str:
    packages = ", ".join(f"{name} {version(name)}" for name in ("aiohttp", "uvloop"))
    return "\n".join(
        [
            f"# Relay, {datetime.date.today()}",
            "",
            f"{machine()}; Python {platform.python_version()}, {packages}; load {os.getloadavg()[0]:.1f}.",
            f"`python benchmarks/relay.py --rounds {rounds} --streams {streams}`; all processes share the cores.",
            "",
            "| figure | value |",
            "|---|---|",
            *(f"| {name} | {value} |" for name, value in rows),
            "",
        ]
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=2000)
    parser.add_argument("--streams", type=int, default=128)
    parser.add_argument("--write", action="store_true")
    parser.add_argument("--serve", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.serve is not None:
        uvloop.run(serve_engine(args.serve))
        return
    text = report(uvloop.run(measure(args.rounds, args.streams)), args.rounds, args.streams)
    print(text)
    if args.write:
        place = Path(__file__).parent / "results" / f"relay-{datetime.date.today()}.md"
        place.parent.mkdir(exist_ok=True)
        place.write_text(text)


if __name__ == "__main__":
    main()
