"""A real vLLM is killed, as a restart or by kill -9 of one of its processes, and restarts on the same port.

Each test ends what it finds at the port and leaves a successor to the next: starting a vLLM is what takes the time.
"""

from __future__ import annotations

import contextlib
import signal
import time
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import pytest

from . import client, processes
from .client import Http
from .processes import Engine, Sidecar

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(400)]


@dataclass
class Place:
    """A port at which one vLLM runs after the other."""

    model: Path
    folder: Path
    port: int = field(default_factory=processes.free_port)
    stack: contextlib.ExitStack = field(default_factory=contextlib.ExitStack)
    starts: int = 0
    engine: Engine | None = None

    def start(self, *, ready: bool) -> Engine:
        """Stop what runs there, and start again."""
        self.stack.close()
        self.starts += 1
        log = self.folder / f"engine{self.starts}.log"
        self.engine = self.stack.enter_context(processes.engine(self.model, log, port=self.port, ready=ready))
        return self.engine


@pytest.fixture(scope="module")
def place(model: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    """One port for the tests of this module: each kills what it finds there and leaves a served successor."""
    there = Place(model("text"), tmp_path_factory.mktemp("killed"))
    with there.stack:
        yield there
        there.stack.close()


async def test_a_restart_heals_a_hang(place: Place, start_sidecar: Callable[..., Sidecar], http: Http) -> None:
    """A hung engine that is killed and restarted on its port is not ready until its first token, then live."""
    engine = place.engine or place.start(ready=True)
    sidecar = start_sidecar(engine.url)
    await client.until(answers(http, sidecar, "/livez", 200, "idle"), "idle before the hang")
    engine.process("EngineCore").send_signal(signal.SIGSTOP)
    await client.until(answers(http, sidecar, "/livez", 503, "stalled"), "/livez 503")
    kill(engine)
    await client.until(answers(http, sidecar, "/startupz", 503), "/startupz 503 while it is gone")
    place.start(ready=False)
    await client.until(answers(http, sidecar, "/livez", 200, "idle"), "idle after the restart", processes.START_SECONDS)
    assert await client.status(http, f"{sidecar.admin}/startupz") == 200


@pytest.mark.parametrize("title", ["Worker", "EngineCore", "API server"])
async def test_a_killed_process_is_found_and_its_successor_is_served(
    place: Place, start_sidecar: Callable[..., Sidecar], http: Http, took: Callable[[str, float], None], title: str
) -> None:
    """A kill during a stream fails liveness; after a restart on the port the sidecar is live and started."""
    engine = place.engine or place.start(ready=True)
    sidecar = start_sidecar(engine.url)

    await client.until(answers(http, sidecar, "/livez", 200, "idle"), "idle before the kill")
    victim = engine.root if title == "API server" else engine.process(title)
    body = client.completion("A stream that does not end well.", max_tokens=3500, stream=True)
    async with http.post(f"{sidecar.url}/v1/completions", json=body) as answer:
        await answer.content.readline()
        began = time.monotonic()
        victim.kill()
        await client.until(answers(http, sidecar, "/livez", 503), "/livez 503")
        found = time.monotonic() - began
    _, verdict, reason = await client.probe(http, f"{sidecar.admin}/livez")
    took(f"kill -9 of the {title} found ({verdict}, {reason})", found)
    stalls = ("no_progress", "canary_lost", "refuses_work")  # by what the API still says of its requests
    assert (verdict, reason) in {("dead", "engine_gone"), *(("stalled", code) for code in stalls)}
    kill(engine)
    began = time.monotonic()
    place.start(ready=False)
    await client.until(answers(http, sidecar, "/livez", 200, "idle"), "idle after the restart", processes.START_SECONDS)
    assert await client.status(http, f"{sidecar.admin}/startupz") == 200
    took(f"the successor of the killed {title} served, vLLM's own start-up included", time.monotonic() - began)


def kill(engine: Engine) -> None:
    """End what is left of the engine, as a container's restart does."""
    with contextlib.suppress(psutil.NoSuchProcess):
        for process in (*engine.root.children(recursive=True), engine.root):
            process.kill()


def answers(http: Http, sidecar: Sidecar, path: str, status: int, verdict: str = "") -> Callable[[], Awaitable[bool]]:
    """A function: whether a probe answers so now."""

    async def holds() -> bool:
        answer = await client.probe(http, sidecar.admin + path)
        return answer[0] == status and verdict in ("", answer[1])

    return holds
