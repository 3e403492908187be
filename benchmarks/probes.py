"""Response time of probes: while relay and image workers are saturated, and after a kill -9 of a sidecar process.

    python benchmarks/probes.py [--seconds 30] [--rounds 10] [--write]

A probe is the same as kubelet's: a new connection, GET, an answer of 200 to 399 within 1 s. Latency: /livez ten times a
second, idle and under load: 64 streams of the scripted engine, and eight clients with 1080p photographs; prober,
clients, engine and sidecar share the cores. After kill -9: probes one after the other until one passes; the time runs
from the signal. For comparison, the time that a fresh interpreter needs from its start to its first /livez: what a
restart without fork would take.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import contextlib
import json
import multiprocessing
import os
import platform
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp

from sidecar.tools.synthetic_photos import photo

# Kubelet's default.
PROBE_TIMEOUT_S = 1.0
STREAMS, PHOTOGRAPHERS = 64, 8
# Between kills: longer than the supervisor's limit for a crash loop.
KILL_INTERVAL_S = 10.5
PROCESSOR = {
    "image_processor_type": "Qwen2VLImageProcessor",
    "min_pixels": 3136,
    "max_pixels": 1_003_520,
    "patch_size": 14,
    "merge_size": 2,
    "temporal_patch_size": 2,
}
SIDECAR_FLAGS = {"images": "inline", "log-level": "error", "canary-interval": "10"}


@dataclass
class Sidecar:
    """A running sidecar next to a scripted engine."""

    process: subprocess.Popen[bytes]
    relay: int
    admin: int

    def health(self) -> Any:
        return json.loads(urllib.request.urlopen(f"http://127.0.0.1:{self.admin}/healthz").read())

    def pid(self, who: str) -> int:
        health = self.health()
        return int(health["pid"] if who == "control" else health["relays"][0]["pid"])


# --- probes ---


def probe(port: int, path: str = "/livez") -> float | None:
    """Seconds until a probe passed; None if it failed."""
    began = time.perf_counter()
    try:
        with socket.create_connection(("127.0.0.1", port), PROBE_TIMEOUT_S) as sock:
            sock.settimeout(PROBE_TIMEOUT_S)
            sock.sendall(f"GET {path} HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n".encode())
            passed = sock.recv(64).startswith((b"HTTP/1.1 2", b"HTTP/1.1 3"))
    except OSError:
        return None
    took = time.perf_counter() - began
    return took if passed and took <= PROBE_TIMEOUT_S else None


def latencies(port: int, seconds: float) -> tuple[list[float], int]:
    """Seconds of each probe that passed, and how many failed; ten a second."""
    times: list[float] = []
    failed = 0
    due, until = time.monotonic(), time.monotonic() + seconds
    while due < until:
        took = probe(port)
        if took is None:
            failed += 1
        else:
            times.append(took)
        due = max(due + 0.1, time.monotonic())
        time.sleep(max(0.0, due - time.monotonic()))
    return times, failed


def after_kill(sidecar: Sidecar, who: tuple[str, ...], port: int, path: str) -> tuple[float, int]:
    """(seconds from kill -9 until a probe passed, probes that failed before)."""
    pids = [sidecar.pid(name) for name in who]
    began = time.perf_counter()
    for pid in pids:
        os.kill(pid, signal.SIGKILL)
    failed = 0
    while probe(port, path) is None:
        failed += 1
        time.sleep(0.005)
    return time.perf_counter() - began, failed


# --- load ---


async def crowd(port: int) -> None:
    """Streams and photographs until killed."""
    url = f"http://127.0.0.1:{port}/v1/chat/completions"
    text = {"model": "scripted", "stream": True, "max_tokens": 400, "messages": [{"role": "user", "content": "go on"}]}
    data = base64.b64encode(photo(1920, 1080)).decode()
    part = {"type": "image_url", "image_url": {"url": f"data:image/jpeg;base64,{data}"}}
    picture = {"model": "scripted", "max_tokens": 1, "messages": [{"role": "user", "content": [part]}]}
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session:

        async def ask(body: dict[str, Any]) -> None:
            while True:
                with contextlib.suppress(aiohttp.ClientError):
                    async with session.post(url, json=body) as answer:
                        while await answer.content.readany():
                            pass

        await asyncio.gather(*(ask(text) for _ in range(STREAMS)), *(ask(picture) for _ in range(PHOTOGRAPHERS)))


@contextlib.contextmanager
def load(port: int) -> Iterator[None]:
    process = multiprocessing.get_context("spawn").Process(target=_crowd, args=(port,), daemon=True)
    process.start()
    time.sleep(5)  # imports, the first photograph, full speed
    try:
        yield
    finally:
        process.kill()
        process.join()


def _crowd(port: int) -> None:
    asyncio.run(crowd(port))


# --- processes ---


def start(*args: str) -> subprocess.Popen[bytes]:
    return subprocess.Popen([sys.executable, "-m", "sidecar", *args], stdout=subprocess.DEVNULL)


def run(engine: int, model: str, state: str) -> Sidecar:
    relay, admin = free_port(), free_port()
    flags = {"engine": f"http://127.0.0.1:{engine}", "listen": f"127.0.0.1:{relay}", "admin": f"127.0.0.1:{admin}"}
    flags |= SIDECAR_FLAGS | {"model": model, "state-dir": state}
    return Sidecar(start("run", *(x for k, v in flags.items() for x in (f"--{k}", v))), relay, admin)


@contextlib.contextmanager
def house() -> Iterator[tuple[Sidecar, Callable[[], Sidecar]]]:
    """A sidecar that serves, and a function that starts another one next to the same engine."""
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        (folder / "preprocessor_config.json").write_text(json.dumps(PROCESSOR))
        port = free_port()
        engine = start("engine", "--listen", f"127.0.0.1:{port}", "--decode-step-ms", "2", "--image-ms", "0")
        stack.callback(end, engine)
        count = iter(range(1000))

        def another() -> Sidecar:
            return run(port, str(folder), str(folder / f"state{next(count)}"))

        sidecar = another()
        stack.callback(end, sidecar.process)
        until(lambda: probe(sidecar.admin, "/startupz") is not None and probe(sidecar.relay, "/v1/models") is not None)
        yield sidecar, another


def end(process: subprocess.Popen[bytes]) -> None:
    process.terminate()
    process.wait(60)


def fresh(another: Callable[[], Sidecar]) -> float:
    """Seconds from the start of an interpreter until /livez passes."""
    began = time.perf_counter()
    sidecar = another()
    try:
        until(lambda: probe(sidecar.admin) is not None)
        return time.perf_counter() - began
    finally:
        end(sidecar.process)


def until(holds: Callable[[], bool]) -> None:
    limit = time.monotonic() + 120
    while not holds():
        if time.monotonic() > limit:
            raise SystemExit("the sidecar never served")
        time.sleep(0.005)


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


# --- the table ---

KILLS = {
    "control, until /livez": (("control",), "admin", "/livez"),
    "relay, until it serves": (("relay",), "relay", "/v1/models"),
    "both, until /livez": (("control", "relay"), "admin", "/livez"),
    "both, until the relay serves": (("control", "relay"), "relay", "/v1/models"),
}


def kills(sidecar: Sidecar, rounds: int, when: str) -> list[str]:
    rows = []
    for name, (who, door, path) in KILLS.items():
        results = []
        for n in range(rounds):
            print(f"kill {name}, {when}: {n + 1} of {rounds}", file=sys.stderr)
            time.sleep(KILL_INTERVAL_S)
            until(lambda: probe(sidecar.admin, "/healthz") is not None)
            results.append(after_kill(sidecar, who, getattr(sidecar, door), path))
        seconds = [s * 1e3 for s, _ in results]
        missed = max(f for _, f in results)
        rows.append(f"| kill -9 of {name}, {when} | {statistics.median(seconds):.0f} | {max(seconds):.0f} | {missed} |")
    return rows


def answers(sidecar: Sidecar, seconds: float, when: str) -> str:
    times, failed = latencies(sidecar.admin, seconds)
    ms = sorted(t * 1e3 for t in times)
    p99 = ms[min(len(ms) - 1, int(0.99 * len(ms)))]
    return f"| /livez, {when} | {statistics.median(ms):.2f} | {p99:.2f} | {ms[-1]:.2f} | {len(ms)} | {failed} |"


def measure(seconds: float, rounds: int) -> tuple[list[str], list[str]]:
    with house() as (sidecar, another):
        latency = [answers(sidecar, seconds, "idle")]
        restart = kills(sidecar, rounds, "idle")
        starts = [fresh(another) * 1e3 for _ in range(rounds)]
        restart.append(
            f"| a fresh interpreter, until /livez, idle | {statistics.median(starts):.0f} | {max(starts):.0f} | |"
        )
        with load(sidecar.relay):
            latency.append(answers(sidecar, seconds, "loaded"))
            restart += kills(sidecar, rounds, "loaded")
            starts = [fresh(another) * 1e3 for _ in range(rounds)]
            restart.append(
                f"| a fresh interpreter, until /livez, loaded | {statistics.median(starts):.0f} | {max(starts):.0f} | |"
            )
    return latency, restart


def report(latency: list[str], restart: list[str], args: argparse.Namespace, others: float) -> str:
    names = [x.partition(":")[2].strip() for x in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in x]
    return "\n".join(
        [
            f"# Probes, {time.strftime('%Y-%m-%d')}",
            "",
            f"{names[0] if names else platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}; "
            f"load before: {others:.1f}. "
            f"`python benchmarks/probes.py --seconds {args.seconds:.0f} --rounds {args.rounds}`.",
            f"Loaded: {STREAMS} streams, {PHOTOGRAPHERS} clients with 1080p photographs; "
            "they, the engine and the prober share the cores.",
            "",
            "| probe | p50 ms | p99 ms (target < 50) | max ms | passed | failed |",
            "|---|---|---|---|---|---|",
            *latency,
            "",
            "| until a probe passes again | median ms | worst ms (target < 2000) | most 1 s probes failed |",
            "|---|---|---|---|",
            *restart,
            "",
        ]
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=30.0)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--write", action="store_true")
    args = parser.parse_args()
    if args.rounds < 1 or args.seconds <= 0:
        parser.error("--rounds must be at least 1, --seconds over 0")
    others = os.getloadavg()[0]
    text = report(*measure(args.seconds, args.rounds), args, others)
    print(text)
    if args.write:
        (Path(__file__).parent / "results" / f"probes-{time.strftime('%Y-%m-%d')}.md").write_text(text)


if __name__ == "__main__":
    main()
