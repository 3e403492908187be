"""What a test needs and this machine lacks."""

from __future__ import annotations

import os
from typing import NoReturn

import pytest


def missing(why: str) -> NoReturn:
    """Skip the test with the reason; with TEST_REQUIRE=1 (continuous integration) fail it: there, a skip hides a gap.

    For what could be installed. What a machine cannot have (a kernel's feature, another architecture) is `pytest.skip`.
    """
    if os.environ.get("TEST_REQUIRE") == "1":
        pytest.fail(f"{why}; TEST_REQUIRE=1 forbids skipping it")
    pytest.skip(why)
