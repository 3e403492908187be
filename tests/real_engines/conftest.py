"""One real engine after the other, a sidecar beside each, and what they showed, kept with `--write`."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any

import aiohttp
import pytest

from ..missing import missing
from ..vllm.processes import Sidecar
from . import environments, seen
from .engines import RealEngine
from .scene import EnginePlace, EngineScene, beside, place

NOTES = pytest.StashKey[dict[str, dict[str, str]]]()


def pytest_addoption(parser: pytest.Parser) -> None:
    """`--write` keeps what the engines showed in this run, for docs/engines/seen.md."""
    parser.addoption("--write", action="store_true", help="keep what the engines showed")


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    """Print what each engine showed."""
    for engine, cells in config.stash.get(NOTES, {}).items():
        terminalreporter.section(engine)
        terminalreporter.write_line("\n".join(f"{case}: {cell}" for case, cell in cells.items()))


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Keep what was shown."""
    if session.config.getoption("--write", default=False):
        seen.keep(session.config.stash.get(NOTES, {}))


@pytest.fixture
def note(request: pytest.FixtureRequest) -> Callable[[str, str, str], None]:
    """A function: takes down what an engine showed in a case."""
    notes = request.config.stash.setdefault(NOTES, {})

    def take_down(engine: str, case: str, cell: str) -> None:
        notes.setdefault(engine, {})[case] = cell

    return take_down


@pytest.fixture(scope="session")
def engine(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[EnginePlace]:
    """The engine of a row, serving. pytest runs the cases of one row together, and ends it before the next starts."""
    row: RealEngine = request.param
    for environment in row.needed:
        if not environment.complete():
            if why := environments.why_not(environment):  # tried, and not possible here
                pytest.skip(f"{environment.name} is not there: {why}")
            missing(f"{environment.name} is not there: `make test-engines` makes its environment")
    with place(row, tmp_path_factory.mktemp("engine")) as running:
        yield running


@pytest.fixture(scope="session")
def sidecar(engine: EnginePlace, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Sidecar]:
    with beside(engine, tmp_path_factory.mktemp("sidecar")) as running:
        yield running


@pytest.fixture
async def scene(engine: EnginePlace, sidecar: Sidecar) -> AsyncIterator[EngineScene]:
    """The engine, running, with its sidecar and a client that retries nothing."""
    engine.ensure()
    connector = aiohttp.TCPConnector(force_close=True, ssl=engine.trust or True)
    async with aiohttp.ClientSession(connector=connector, timeout=aiohttp.ClientTimeout(total=120)) as http:
        yield EngineScene(engine, sidecar, http)
