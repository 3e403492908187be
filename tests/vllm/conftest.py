"""Fixtures around one real vLLM at a time (session-wide, by model) and a sidecar next to it (one per test)."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from ..environments import made_model
from ..missing import missing
from . import environment, processes
from .processes import Engine, Sidecar

TIMES = pytest.StashKey[list[str]]()  # what took how long, for the end of the report
SCRIPT = Path(__file__).with_name("tiny_models.py")


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    """End with the times that tests took down."""
    if TIMES in config.stash:
        terminalreporter.section("next to a real vLLM")
        terminalreporter.write_line("\n".join(config.stash[TIMES]))


@pytest.fixture
def took(request: pytest.FixtureRequest) -> Callable[[str, float], None]:
    """A function: takes down what took how many seconds."""
    lines = request.config.stash.setdefault(TIMES, [])
    return lambda what, seconds: lines.append(f"{what}: {seconds:.1f} s")


@pytest.fixture(scope="session")
def vllm_python() -> Path:
    """The interpreter of the real vLLM's environment. Skips where it was not made."""
    if not environment.complete():
        missing("the real vLLM is not installed: `make test-vllm` makes its environment (12 GB of disk)")
    return environment.python()


@pytest.fixture(scope="session")
def model(vllm_python: Path) -> Callable[[str], Path]:
    """A function: "text", "vision" or "small" -> directory of the tiny model, made once per version of the script."""

    def directory(kind: str) -> Path:
        return made_model(SCRIPT, kind, vllm_python, processes.ENGINE_ENV)

    return directory


@pytest.fixture(scope="session")
def engine(
    request: pytest.FixtureRequest, model: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Engine]:
    """A vLLM that serves the model that the test's `engine` parameter names; after a comma it says what it is for.

    pytest runs the tests of one parameter in a row and ends their engine before the next one starts.
    """
    log = tmp_path_factory.mktemp("engine") / "engine.log"
    with processes.engine(model(request.param.partition(",")[0]), log, environ=processes.DEVELOPMENT) as running:
        yield running


@pytest.fixture
def start_sidecar(tmp_path: Path) -> Iterator[Callable[..., Sidecar]]:
    """A function: engine URL and settings -> a running sidecar, which ends with the test."""
    with contextlib.ExitStack() as stack:

        def start(engine_url: str, **flags: str) -> Sidecar:
            return stack.enter_context(
                processes.sidecar(engine_url, tmp_path / "state", tmp_path / "sidecar.log", **flags)
            )

        yield start


@pytest.fixture
def sidecar(engine: Engine, start_sidecar: Callable[..., Sidecar]) -> Sidecar:
    """A sidecar next to the engine, with quick settings."""
    return start_sidecar(engine.url)


@pytest.fixture
async def http() -> AsyncIterator[aiohttp.ClientSession]:
    """A client without keep-alive surprises: nothing is retried, nothing waits longer than two minutes."""
    connector = aiohttp.TCPConnector(force_close=True)
    async with aiohttp.ClientSession(connector=connector, timeout=aiohttp.ClientTimeout(total=120)) as session:
        yield session
