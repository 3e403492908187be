"""A sidecar under mixed load for long: what it holds on to, and whether every request is accounted for.

    python benchmarks/soak.py [--minutes 20] [--kills SECONDS] [--clients 24] [--write]
    python benchmarks/soak.py --minutes 3 --kills 3      # chaos: kill -9 of a random process every three seconds

Clients stream, read slowly, leave in the middle, send bodies of half a megabyte, unread calls and garbage. Once a
second each process's resident memory and open files are read. Printed are both at the start, at their highest and at
the end, how the requests ended, and what the books say of them. `--write` keeps the table and a plot in results/.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import datetime
import json
import random
import signal
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp
import psutil

from sidecar.report.usage_query import read
from sidecar.report.usage_store import USAGE_FILE
from sidecar.tools.scripted_engine.server import EngineSettings, ScriptedEngine

COLOURS = ("#1b6ca8", "#c0392b", "#2e8b57", "#8e44ad", "#888888")
SETTLE_S = 20.0  # after the load, before the end is read
BIG = "x" * (512 << 10)


@dataclass
class Soak:
    """One sidecar, its clients, and what was seen. `samples`: (second, {process: (MB, files)})."""

    relay: str
    admin: str
    process: asyncio.subprocess.Process
    session: aiohttp.ClientSession
    ends: Counter[str] = field(default_factory=Counter)
    samples: list[tuple[float, dict[str, tuple[float, int]]]] = field(default_factory=list)
    kills: Counter[str] = field(default_factory=Counter)
    chats: int = 0  # whose answer the client has whole

    async def clients(self, count: int, until: float) -> None:
        """So many clients, each with one request after the other."""
        async with asyncio.TaskGroup() as group:
            for n in range(count):
                group.create_task(self._client(random.Random(n), until))

    async def _client(self, rng: random.Random, until: float) -> None:
        acts = (self.stream, self.stream, self.plain, self.slow, self.leave, self.big, self.unread, self.garbage)
        while time.monotonic() < until:
            act = rng.choice(acts)
            try:
                async with asyncio.timeout(60):
                    end = await act()
            except TimeoutError:
                end = "hung"
            except (aiohttp.ClientError, OSError) as e:
                end = type(e).__name__
                await asyncio.sleep(0.2)
            self.ends[f"{act.__name__}: {end}"] += 1

    def chat(self, tokens: int, text: str = "hello", *, stream: bool = True) -> Any:
        body = {"model": "scripted", "stream": stream, "max_tokens": tokens, "prompt": text}
        return self.session.post(self.relay + "/v1/completions", json=body)

    async def stream(self) -> str:
        async with self.chat(20) as answer:
            body = await answer.read()
            self.chats += answer.status == 200
            return "whole" if body.endswith(b"[DONE]\n\n") else f"{answer.status}"

    async def plain(self) -> str:
        async with self.chat(20, stream=False) as answer:
            await answer.read()
            self.chats += answer.status == 200
            return "whole" if answer.status == 200 else f"{answer.status}"

    async def big(self) -> str:
        async with self.chat(1, BIG, stream=False) as answer:
            await answer.read()
            self.chats += answer.status == 200
            return "whole" if answer.status == 200 else f"{answer.status}"

    async def slow(self) -> str:
        async with self.chat(40) as answer:
            while await answer.content.read(64):  # noqa: ASYNC110  a slow reader
                await asyncio.sleep(0.02)
            self.chats += answer.status == 200
            return "whole" if answer.status == 200 else f"{answer.status}"

    async def leave(self) -> str:
        async with self.chat(1000) as answer:
            await answer.content.read(1)
        return "left"

    async def unread(self) -> str:
        async with self.session.post(self.relay + "/tokenize", json={"prompt": "a"}) as answer:
            await answer.read()
            return f"{answer.status}"

    async def garbage(self) -> str:
        host, port = self.relay.removeprefix("http://").split(":")
        reader, writer = await asyncio.open_connection(host, int(port))
        writer.write(random.randbytes(200) + b"\r\n\r\n")
        answer = await reader.read()
        writer.close()
        return answer[9:12].decode() or "closed"

    async def watch(self, began: float, kills: float) -> None:
        """Read the processes once a second, and kill one every `kills` seconds; 0: none."""
        due = time.monotonic() + kills
        while True:
            found = await asyncio.to_thread(self._processes)
            seen = {}
            for name, process in found.items():
                with contextlib.suppress(psutil.Error):
                    seen[name] = (process.memory_info().rss / 1e6, process.num_fds())
            self.samples.append((time.monotonic() - began, seen))
            if kills and time.monotonic() >= due and len(found) > 1:
                name = random.choice(sorted(set(found) - {"supervisor"}))
                found[name].send_signal(signal.SIGKILL)
                self.kills[name] += 1
                due = time.monotonic() + kills
            await asyncio.sleep(1)

    def _processes(self) -> dict[str, psutil.Process]:
        supervisor = psutil.Process(self.process.pid)
        names = {"supervisor": supervisor}
        for child in supervisor.children(recursive=True):
            with contextlib.suppress(psutil.Error):
                names[child.name()] = child
        return names


async def run(minutes: float, clients: int, kills: float) -> tuple[str, Soak]:
    """The table, and what it was made from."""
    settings = EngineSettings(listen=("127.0.0.1", 0), decode_step_ms=5.0)
    with tempfile.TemporaryDirectory() as state:
        async with ScriptedEngine(settings) as engine, aiohttp.ClientSession() as session:
            soak = await started(engine.url, state, session)
            began = time.monotonic()
            watching = asyncio.create_task(soak.watch(began, kills))
            progress = asyncio.create_task(say(began, minutes * 60))
            await soak.clients(clients, began + minutes * 60)
            progress.cancel()
            watching.cancel()
            watching = asyncio.create_task(soak.watch(began, 0))
            await asyncio.sleep(SETTLE_S)
            watching.cancel()
            load = await (await session.get(soak.admin + "/load")).json()
            soak.process.terminate()
            code = await soak.process.wait()
        rows = dict(read(Path(state) / USAGE_FILE, 0, time.time() + 3600, ("outcome",)))
    booked = {key[0]: sums.requests for key, sums in rows.items()}
    return page(soak, minutes, kills, booked, load, code), soak


async def started(engine: str, state: str, session: aiohttp.ClientSession) -> Soak:
    relay, admin = (f"127.0.0.1:{port}" for port in free_ports(2))
    given = ("--engine", engine, "--listen", relay, "--admin", admin, "--state-dir", state, "--workers", "2")
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "sidecar", "run", *given, "--images", "off", "--log-level", "error"
    )
    soak = Soak(f"http://{relay}", f"http://{admin}", process, session)
    async with asyncio.timeout(60):
        while True:
            with contextlib.suppress(aiohttp.ClientError, OSError):
                async with session.get(soak.admin + "/startupz") as answer:
                    if answer.status == 200:
                        return soak
            await asyncio.sleep(0.2)


def free_ports(count: int) -> list[int]:
    """Ports that were free a moment ago."""
    import socket

    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]


async def say(began: float, seconds: float) -> None:
    """Progress, to stderr."""
    while True:
        print(f"{max(0, seconds - (time.monotonic() - began)):.0f} s left", file=sys.stderr)
        await asyncio.sleep(30)


def page(soak: Soak, minutes: float, kills: float, booked: dict[str, int], load: Any, code: int) -> str:
    """What a person reads."""
    lines = [
        f"# Soak, {datetime.datetime.now(datetime.UTC):%Y-%m-%d}",
        f"{minutes:g} minutes, {sum(soak.ends.values())} requests; kill -9: {dict(soak.kills) or 'none'}"
        + (f", one every {kills:g} s" if kills else "")
        + f". Exit code {code}; in flight at the end: {load['requests']['in_flight']}.",
        "| process | RSS, MB: start, highest, end | open files: start, highest, end |\n|---|---|---|",
    ]
    for name in names_of(soak):
        seen = [sample[name] for _, sample in soak.samples if name in sample]
        columns = (list(column) for column in zip(*seen, strict=True))
        cells = [f"{column[0]:.0f}, {max(column):.0f}, {column[-1]:.0f}" for column in columns]
        lines[-1] += f"\n| {name} | {' | '.join(cells)} |"
    ends = "\n".join(f"| {end} | {count} |" for end, count in sorted(soak.ends.items()))
    lines.append(f"| how requests ended for their clients | |\n|---|---|\n{ends}")
    lines.append(f"Answered whole: {soak.chats}. In the books, by outcome: {json.dumps(booked, sort_keys=True)}.")
    return "\n\n".join(lines)


def names_of(soak: Soak) -> list[str]:
    return sorted({name for _, sample in soak.samples for name in sample})


def plot(soak: Soak) -> str:
    """Resident memory and open files over time, as an SVG."""
    end = soak.samples[-1][0] or 1.0
    parts = [
        '<svg xmlns="http://www.w3.org/2000/svg" width="860" height="560" font-family="sans-serif" font-size="11">'
    ]
    parts.append('<rect width="100%" height="100%" fill="white"/>')
    for place, (title, which) in enumerate((("RSS, MB", 0), ("open files", 1))):
        top = 30 + place * 265
        most = max((sample[name][which] for _, sample in soak.samples for name in sample), default=1) * 1.1
        parts.append(f'<text x="10" y="{top - 10}" font-weight="bold">{title}; highest {most / 1.1:.0f}</text>')
        parts.append(f'<rect x="10" y="{top}" width="700" height="220" fill="none" stroke="#ccc"/>')
        for i, name in enumerate(names_of(soak)):
            colour = COLOURS[i % len(COLOURS)]
            points = " ".join(
                f"{10 + 700 * at / end:.1f},{top + 220 - 220 * sample[name][which] / most:.1f}"
                for at, sample in soak.samples
                if name in sample
            )
            parts.append(f'<polyline points="{points}" fill="none" stroke="{colour}"/>')
            parts.append(f'<text x="720" y="{top + 14 + 15 * i}" fill="{colour}">{name}</text>')
    return "\n".join([*parts, "</svg>", ""])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=20.0)
    parser.add_argument("--kills", type=float, default=0.0, metavar="SECONDS")
    parser.add_argument("--clients", type=int, default=24)
    parser.add_argument("--write", action="store_true")
    chosen = parser.parse_args()
    text, soak = asyncio.run(run(chosen.minutes, chosen.clients, chosen.kills))
    print(text)
    if chosen.write:
        name = f"{'chaos' if chosen.kills else 'soak'}-{time.strftime('%Y-%m-%d')}"
        stem = Path(__file__).parent / "results" / name
        stem.with_suffix(".md").write_text(text + "\n")
        stem.with_suffix(".svg").write_text(plot(soak))


if __name__ == "__main__":
    main()
