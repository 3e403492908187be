"""The fixture `requires`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest


def test_requires_skips_or_fails(requires: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """What is absent skips a test, and fails it where nothing may be skipped; optional material never fails."""
    monkeypatch.delenv("TEST_REQUIRE", raising=False)
    assert requires("sh").name == "sh"
    assert requires("python:aiohttp").name == "__init__.py"
    for missing in ("no-such-tool", "python:no_such_module", "../no-such-place"):
        with pytest.raises(pytest.skip.Exception):
            requires(missing)
    monkeypatch.setenv("TEST_REQUIRE", "1")
    with pytest.raises(pytest.fail.Exception, match="no-such-tool is not installed"):
        requires("no-such-tool")
    with pytest.raises(pytest.skip.Exception):
        requires("../no-such-place")
