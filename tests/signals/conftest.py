"""Shared by the tests of diagnoses: a usable py-spy, another user, and waiting."""

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

from ..missing import missing
from .victims import victim


@pytest.fixture(scope="session")
def py_spy() -> str:
    """Path of py-spy. Skips if it is absent, or if no process here may read another one (CI without ptrace)."""
    path = stack_dump.locate()
    if path is None:
        missing("py-spy is not installed")
    with victim() as target:
        if asyncio.run(stack_dump.dump(target.pid, path, 30)) == Failed(stack_dump.REFUSED):
            pytest.skip("this machine does not let one process read another (Yama, seccomp or capabilities)")
    return path


@pytest.fixture(scope="session")
def powerless() -> list[str]:
    """A command prefix that drops all capabilities; with `stranger`, this is a pod by default. Users have none."""
    if os.geteuid() != 0:
        return []
    place = shutil.which("setpriv")
    if place is None:
        missing("setpriv is not installed, which drops capabilities")
    return [place, "--inh-caps=-all", "--bounding-set=-all"]


@pytest.fixture(scope="session")
def stranger() -> dict[str, Any]:
    """Arguments of `victim` for another user, one without an engine on this machine."""
    python = shutil.which("python3", path="/usr/local/bin:/usr/bin")
    if python is None or os.geteuid() != 0:
        pytest.skip("another user's process needs root, and a python3 that every user may run")
    return {"python": python, "user": 65533}


@pytest.fixture
def until() -> Callable[..., None]:
    """Wait until a function returns True, for conditions without an event."""

    def wait(holds: Callable[[], bool], seconds: float = 60.0) -> None:
        end = time.monotonic() + seconds
        while not holds():
            assert time.monotonic() < end, "the condition never became true"
            time.sleep(0.02)

    return wait
