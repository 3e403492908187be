"""What the tests of diagnoses share: py-spy where it may read another process, another user, and waiting."""

from __future__ import annotations

import asyncio
import os
import shutil
import time
from collections.abc import Callable
from typing import Any

import pytest

from sidecar.readings import Failed
from sidecar.signals import stack_dump

from .victims import victim


@pytest.fixture(scope="session")
def py_spy() -> str:
    """py-spy's place. Skips where it is absent, or where this machine lets nobody read another process (CI without ptrace)."""
    place = stack_dump.locate()
    if place is None:
        if os.environ.get("TEST_REQUIRE") == "1":
            pytest.fail("py-spy is not installed, and TEST_REQUIRE=1 asks that nothing is skipped for that")
        pytest.skip("py-spy is not installed")
    with victim() as target:
        if asyncio.run(stack_dump.dump(target.pid, place, 30)) == Failed(stack_dump.REFUSED):
            pytest.skip("this machine does not let one process read another (Yama, seccomp or capabilities)")
    return place


@pytest.fixture(scope="session")
def powerless() -> list[str]:
    """The words before a command that run it without any capability; with `stranger`, what a pod looks like by default."""
    place = shutil.which("setpriv")
    if place is None or os.geteuid() != 0:
        pytest.skip("to drop capabilities needs root and setpriv")
    return [place, "--inh-caps=-all", "--bounding-set=-all"]


@pytest.fixture(scope="session")
def stranger() -> dict[str, Any]:
    """Arguments of `victim` that make it another user's: one who has no engine on this machine, with an interpreter for all."""
    python = shutil.which("python3", path="/usr/local/bin:/usr/bin")
    if python is None or os.geteuid() != 0:
        pytest.skip("another user's process needs root, and a python3 that everybody may run")
    return {"python": python, "user": 65533}


@pytest.fixture
def until() -> Callable[..., None]:
    """Waits until what a function says is true; the kernel has no event for it."""

    def wait(holds: Callable[[], bool], seconds: float = 60.0) -> None:
        end = time.monotonic() + seconds
        while not holds():
            assert time.monotonic() < end, "it never came true"
            time.sleep(0.02)

    return wait
