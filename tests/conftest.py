"""Fixtures for all tests.

`requires("gcc")` is the only way to use something from outside the package. It returns its path, or skips the test with
a reason. With TEST_REQUIRE=1 (continuous integration) an absent tool or module fails the test instead, because a skip
there would look like a pass. Material next to the repository (`../...`) is optional everywhere.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

from .missing import missing
from .postgres_server import PostgresServer, find_server

# On a busy machine, a slow example is no failure of the code. Continuous integration repeats the same examples, so that
# its result depends on the change only; everywhere else, new ones are searched for.
settings.register_profile(
    "ours",
    deadline=None,
    derandomize=os.environ.get("TEST_REQUIRE") == "1",
    suppress_health_check=[HealthCheck.too_slow],
)
settings.load_profile("ours")

ROOT = Path(__file__).resolve().parent.parent
# Tools that need another one.
PARTNERS = {"chromium": ("chromedriver",)}


@pytest.fixture(scope="session")
def requires() -> Callable[[str], Path]:
    """A function: tool name, `python:MODULE` or path relative to the repository root -> its path.

    It skips the test if the thing is absent, or fails it if TEST_REQUIRE=1 and it is not a `../` path.
    """
    return _need


def _need(what: str) -> Path:
    found = _find(what)
    if found is not None:
        return found
    if what.startswith("../"):
        pytest.skip(f"{what} is absent next to the repository")
    return missing(f"{what} is not installed")


def _find(what: str) -> Path | None:
    if what.startswith("python:"):
        spec = importlib.util.find_spec(what.removeprefix("python:"))
        return Path(spec.origin or "") if spec else None
    if what == "postgres":
        return find_server()
    if "/" in what:
        path = ROOT / what
        return path if path.exists() else None
    paths = [shutil.which(name) for name in (what, *PARTNERS.get(what, ()))]
    return Path(paths[0] or "") if all(paths) else None


@pytest.fixture(scope="session")
def postgres_data(requires: Callable[[str], Path]) -> Iterator[PostgresServer]:
    requires("python:psycopg")
    server = PostgresServer(requires("postgres"))
    yield server
    server.remove()


@pytest.fixture
def postgres(postgres_data: PostgresServer) -> Iterator[PostgresServer]:
    """A running PostgreSQL server without tables."""
    import psycopg

    postgres_data.start()
    with psycopg.connect(postgres_data.url, autocommit=True) as db:
        db.execute("DROP TABLE IF EXISTS sidecar_usage, sidecar_usage_mark")
    yield postgres_data
    postgres_data.stop()
