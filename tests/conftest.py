"""What every test may need and no test may quietly miss.

`requires("gcc")` is the one way to ask for something outside the package: it returns where the thing is, and where it
is absent it skips with a reason. With TEST_REQUIRE=1 (continuous integration) an absent tool or module fails the test
instead: a skip there would look like a pass. Material beside the repository (`../...`) is optional everywhere.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

# On a machine that is busy with other work, an example that takes long is no failure of the code. Continuous
# integration tries the same examples each time, so that what it says is about the change; new ones are searched for
# everywhere else.
settings.register_profile(
    "ours",
    deadline=None,
    derandomize=os.environ.get("TEST_REQUIRE") == "1",
    suppress_health_check=[HealthCheck.too_slow],
)
settings.load_profile("ours")

ROOT = Path(__file__).resolve().parent.parent
PARTNERS = {"chromium": ("chromedriver",)}  # a tool that is of no use without another one


@pytest.fixture(scope="session")
def requires() -> Callable[[str], Path]:
    """A function: tool name, `python:MODULE`, or path relative to the repository root (`../shared/images`) -> its place.

    Skips the test where the thing is absent; fails it instead when TEST_REQUIRE=1 and it is no `../` path.
    """
    return _need


def _need(what: str) -> Path:
    found = _find(what)
    if found is not None:
        return found
    if os.environ.get("TEST_REQUIRE") == "1" and not what.startswith("../"):
        pytest.fail(f"{what} is not installed, and TEST_REQUIRE=1 asks that nothing is skipped for that")
    pytest.skip(f"{what} is not installed" if not what.startswith("../") else f"{what} is absent beside the repository")


def _find(what: str) -> Path | None:
    if what.startswith("python:"):
        spec = importlib.util.find_spec(what.removeprefix("python:"))
        return Path(spec.origin or "") if spec else None
    if "/" in what:
        path = ROOT / what
        return path if path.exists() else None
    places = [shutil.which(name) for name in (what, *PARTNERS.get(what, ()))]
    return Path(places[0] or "") if all(places) else None
