"""The relay's benchmarks run from end to end, and what fails is not taken for a figure."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

from routes import ends  # noqa: E402  # the path above must come first
from routes.ends import Load  # noqa: E402


@pytest.fixture(autouse=True)
def tools(requires: Callable[[str], Path]) -> None:
    """What every benchmark of a route needs."""
    requires("g++")
    requires("taskset")


@pytest.mark.parametrize(
    ("program", "titles"),
    [
        ("relay.py", ("One-token requests", "a chunk each 50 ms", "unpaced", "The sidecar's processes", "| control |")),
        ("loop_hold.py", ("| a short chat |", "| empty messages, six bodies at once |")),
    ],
)
def test_a_quick_run_prints_every_table(program: str, titles: tuple[str, ...]) -> None:
    """The command ends well next to a forwarder and a sidecar, and no request of it fails."""
    command = [sys.executable, str(BENCHMARKS / program), "--quick", "--rivals", "forwarder,sidecar"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == 0, done.stderr
    assert [title for title in titles if title not in done.stdout] == []
    for trouble in ("failed", "missing", "broken", "no answer", "status"):
        assert trouble not in done.stdout


async def test_the_client_counts_answers_that_are_errors_apart() -> None:
    """Answers of a server that refuses everything are errors, not requests."""

    async def refuse(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"}]")
        writer.write(b"HTTP/1.1 503 Service Unavailable\r\ncontent-length: 0\r\n\r\n")
        await reader.read()
        writer.close()

    async with await asyncio.start_server(refuse, "127.0.0.1", 0) as server:
        with ends.client(server.sockets[0].getsockname()[1], Load(connections=1)) as client:
            async with asyncio.timeout(30):
                figures = await asyncio.to_thread(client.look)
                while not figures.errors:
                    figures = await asyncio.to_thread(client.look)
    assert figures.requests == 0


def test_a_stream_that_ends_well_has_every_chunk() -> None:
    """Straight to the engine, each stream brings the chunks that were asked for, and none is an error."""
    with ends.engine() as port, ends.client(port, Load(connections=4, chunks=20)) as client:
        total = ended = 0
        while ended < 40:
            figures = client.look()
            assert figures.errors == 0
            total, ended = total + figures.chunks, ended + figures.requests
    assert ended * 20 <= total <= (ended + 4) * 20
