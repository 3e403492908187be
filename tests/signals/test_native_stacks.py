"""Processes without Python are dumped by gdb or eu-stack: names only, and the process runs on."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from sidecar.readings import Failed
from sidecar.signals import native_stacks, stack_dump
from sidecar.signals.process_examiner import dump_all
from sidecar.signals.process_state import EngineProcess

from ..missing import missing

SECRET = "12345"


@pytest.fixture
def command(py_spy: str) -> list[str]:
    """How native processes are dumped here."""
    found = native_stacks.locate()
    if found is None:
        missing("neither gdb nor eu-stack is installed")
    return found


@pytest.fixture
def sleeper() -> Iterator[int]:
    """The pid of a process without Python."""
    with subprocess.Popen(["/bin/sleep", SECRET]) as process:
        yield process.pid
        process.kill()


def state(pid: int) -> str:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]


async def test_a_native_process_is_dumped_and_runs_on(command: list[str], sleeper: int, py_spy: str) -> None:
    """Where py-spy finds no Python: the functions that it is in, and nothing of its arguments."""
    process = EngineProcess(sleeper, "llama-server", "api", 0)
    text = (await dump_all((process,), py_spy, 30, native=command))[sleeper]
    assert isinstance(text, str) and "nanosleep" in text and SECRET not in text and "=" not in text, text
    assert state(sleeper) == "S"


async def test_on_a_doubt_it_is_left_alone(sleeper: int, py_spy: str) -> None:
    """Native dumps stop a process: only a stalled engine gets them."""
    process = EngineProcess(sleeper, "llama-server", "api", 0)
    assert (await dump_all((process,), py_spy, 30))[sleeper] == Failed(stack_dump.FOREIGN)


async def test_a_stopped_process_stays_stopped(
    command: list[str], sleeper: int, until: Callable[[Callable[[], bool]], None]
) -> None:
    """A debugger that lets go could resume it, and with it the evidence."""
    os.kill(sleeper, signal.SIGSTOP)
    until(lambda: state(sleeper) == "T")
    assert await native_stacks.dump(sleeper, command, 30) == Failed(native_stacks.STOPPED)
    assert state(sleeper) == "T"


async def test_failures_have_reasons(command: list[str]) -> None:
    """A process that is not there, a dumper that is not, and one that never ends."""
    gone = await native_stacks.dump(2**22 - 1, command, 30)
    assert isinstance(gone, Failed) and gone.error
    missing = await native_stacks.dump(os.getpid(), ["/nonexistent/gdb", "-p"])
    assert missing == Failed("gdb cannot be started (No such file or directory)")
    slow = await native_stacks.dump(os.getpid(), ["/bin/sleep", "100"], 0.2)
    assert slow == Failed("sleep made no dump in 0 s and was killed")
