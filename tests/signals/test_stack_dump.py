"""Stack dumps by py-spy: what they contain, what they must not contain, and why there may be none."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
from pathlib import Path
from typing import Any

import psutil
import pytest

from sidecar.readings import Failed
from sidecar.signals import stack_dump

from .victims import victim


def script(folder: Path, text: str) -> str:
    """A program in py-spy's place."""
    path = folder / "py-spy"
    path.write_text("#!/bin/sh\n" + text)
    path.chmod(0o755)
    return str(path)


async def test_a_dump_names_the_functions_and_no_values(py_spy: str) -> None:
    """The stacks of a real process: its functions, but neither its arguments' values nor its command line."""
    with victim("spin_here") as engine:
        text = await stack_dump.dump(engine.pid, py_spy)
        assert isinstance(text, str), text
        assert "spin_here" in text and text.startswith("Thread ")
        assert "prompt" not in text and "secret" not in text


async def test_a_dump_leaves_its_process_as_it_was(py_spy: str) -> None:
    """A stopped process stays stopped, and SIGCONT resumes it: a dump does not attach."""
    with victim("spin_here") as engine:
        os.kill(engine.pid, signal.SIGSTOP)
        process = psutil.Process(engine.pid)
        assert isinstance(await stack_dump.dump(engine.pid, py_spy), str)
        assert process.status() == psutil.STATUS_STOPPED
        os.kill(engine.pid, signal.SIGCONT)
        assert isinstance(await stack_dump.dump(engine.pid, py_spy), str)
        assert process.status() != psutil.STATUS_TRACING_STOP


async def test_a_process_without_python_has_that_reason(py_spy: str) -> None:
    """An engine in another language has no Python stacks."""
    with victim(command=("sh", "-c", "echo 0; exec sleep 1000")) as engine:
        assert await stack_dump.dump(engine.pid, py_spy) == Failed(stack_dump.FOREIGN)


async def test_a_process_that_ended_has_that_reason(py_spy: str) -> None:
    """Between the finding and the dump a process may end."""
    with victim() as engine:
        pid = engine.pid
    assert await stack_dump.dump(pid, py_spy) == Failed(stack_dump.ENDED)


async def test_a_dump_that_hangs_is_killed(tmp_path: Path) -> None:
    """It costs its time and no more, and leaves no process behind."""
    stuck = script(tmp_path, f"echo $$ > {tmp_path}/pid; exec sleep 1000\n")
    failed = await stack_dump.dump(1, stuck, 0.5)
    assert isinstance(failed, Failed) and "was killed" in failed.error
    assert not psutil.pid_exists(int((tmp_path / "pid").read_text()))


async def test_a_dump_that_is_cancelled_leaves_no_process(tmp_path: Path) -> None:
    """The sidecar may end while a dump is under way."""
    os.mkfifo(tmp_path / "pid")
    stuck = script(tmp_path, f"echo $$ > {tmp_path}/pid; exec sleep 1000\n")
    dump = asyncio.create_task(stack_dump.dump(1, stuck, 60))
    pid = int(await asyncio.to_thread((tmp_path / "pid").read_text))
    dump.cancel()
    await asyncio.gather(dump, return_exceptions=True)
    assert dump.cancelled() and not psutil.pid_exists(pid)


async def test_a_dump_is_bounded(tmp_path: Path) -> None:
    """Any amount of output becomes a bounded text that is marked as cut."""
    loud = script(tmp_path, "yes 'Thread 1 (idle)' | head -c 3000000\n")
    text = await stack_dump.dump(1, loud, 30)
    assert isinstance(text, str) and len(text) <= stack_dump.MAX_DUMP_BYTES + 10 and text.endswith("(cut)")


async def test_a_dump_that_fails_by_a_race_is_tried_again_once(tmp_path: Path) -> None:
    """A process that runs while it is read can spoil a dump; the next one is good."""
    flaky = script(
        tmp_path,
        f"mkdir {tmp_path}/once 2>/dev/null && {{ echo 'Error: bad address' >&2; exit 1; }}; echo 'Thread 1 (idle)'\n",
    )
    assert await stack_dump.dump(1, flaky, 30) == "Thread 1 (idle)"


@pytest.mark.parametrize(
    ("printed", "words"),
    [
        ("Permission Denied: Try running again with elevated permissions", stack_dump.REFUSED),
        ("Error: Operation not permitted (os error 1)", stack_dump.REFUSED),
        ("Error: Failed to find python version from target process", stack_dump.FOREIGN),
        ("Error: something\x1b[0m new\nCaused by: more", "py-spy: Error: something?[0m new"),
    ],
)
async def test_what_py_spy_prints_becomes_plain_words(printed: str, words: str, tmp_path: Path) -> None:
    """Refused, no Python, or its own first line, made safe."""
    (tmp_path / "message").write_text(printed)
    refusing = script(tmp_path, f"cat {tmp_path}/message >&2; exit 1\n")
    assert await stack_dump.dump(1, refusing, 30) == Failed(words)


async def test_a_py_spy_that_cannot_be_started_is_a_reason(tmp_path: Path) -> None:
    """A broken installation is a reason, not an error."""
    failed = await stack_dump.dump(1, str(tmp_path / "absent"))
    assert isinstance(failed, Failed) and "cannot be started" in failed.error


async def test_without_the_capability_another_users_process_is_refused(
    py_spy: str, powerless: list[str], stranger: dict[str, Any]
) -> None:
    """As in a pod by default: the process is visible, reading its stacks is not permitted."""
    with victim(**stranger) as engine:
        command = [*powerless, py_spy, "dump", "--nonblocking", "--pid", str(engine.pid)]
        run = await asyncio.to_thread(subprocess.run, command, capture_output=True, text=True, timeout=60, check=False)
        assert stack_dump.explain_failure(run.stderr) == stack_dump.REFUSED
