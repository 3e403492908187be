"""The demo as a user runs it: the command with real child processes, to its end."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from ..waiting import PATIENCE

COMMAND = (sys.executable, "-m", "sidecar", "demo", "--listen", "127.0.0.1:0", "--admin", "127.0.0.1:0")
PAGE = re.compile(r"page:\s+http://127\.0\.0\.1:\d+/$")


Start = Callable[..., subprocess.Popen[str]]


@pytest.fixture
def scratch() -> Iterator[Path]:
    """A temporary directory with a short name (it will hold Unix sockets) for all that the demo writes."""
    with tempfile.TemporaryDirectory(prefix="d-") as path:
        yield Path(path)


@pytest.fixture
def start(scratch: Path) -> Iterator[Start]:
    """A function that starts the demo with these flags; what it started has ended when the test has."""
    started: list[subprocess.Popen[str]] = []

    def run(*flags: str) -> subprocess.Popen[str]:
        env = {**os.environ, "TMPDIR": str(scratch)}
        started.append(
            subprocess.Popen([*COMMAND, *flags], env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        )
        return started[-1]

    yield run
    for process in started:
        process.terminate()
        process.communicate(timeout=PATIENCE)


def finish(process: subprocess.Popen[str], lines: list[str]) -> int:
    """Read to the end; the exit code."""
    assert process.stdout
    lines.extend(process.stdout)
    return process.wait(timeout=PATIENCE)


def nothing_left(scratch: Path) -> bool:
    """Whether no process uses the scratch directory; children of a killed parent need a moment to die."""
    found = [p for p in psutil.process_iter(["cmdline"]) if any(str(scratch) in arg for arg in p.info["cmdline"] or ())]
    return not psutil.wait_procs(found, PATIENCE)[1]


def engine_pids(lines: list[str]) -> list[int]:
    return [int(found[1]) for line in lines if (found := re.search(r"engine started \(pid (\d+)", line))]


def summary_of(lines: list[str]) -> dict[str, str]:
    rows = [line.strip().split("  ", 1) for line in lines if line.startswith("  ")]
    return {name: value.strip() for name, value in rows}


def read_until(process: subprocess.Popen[str], words: str, lines: list[str]) -> None:
    """Read the output up to the line with these words, a pattern."""
    assert process.stdout
    for line in process.stdout:
        lines.append(line)
        if re.search(words, line):
            return
    pytest.fail(f"ended before it said {words!r}: {''.join(lines)}")


@pytest.mark.slow
def test_the_story_of_a_stall(scratch: Path, start: Start) -> None:
    """A stall is detected, killed and recovered from; Ctrl-C prints the summary with exit code 0."""
    lines: list[str] = []
    process = start("--stall-after", "3", "--seconds", "240")
    read_until(process, "RECOVERED", lines)
    process.send_signal(signal.SIGINT)
    code = finish(process, lines)
    output = "".join(lines)
    assert code == 0, output
    assert PAGE.match(lines[0])
    order = ["STALL injected", "DETECTED", "liveness probe failed 3/3", "engine killed", "restarts: 1", "RECOVERED"]
    places = [output.index(word) for word in order]
    assert places == sorted(places)
    summary = summary_of(lines)
    assert float(summary["time to detect"].split()[0]) > 0
    assert float(summary["time to recover"].split()[0]) > float(summary["time to detect"].split()[0])
    assert summary["stalls injected"] == "1"
    assert summary["false alarms"] == "0"
    assert nothing_left(scratch)
    assert not any(psutil.pid_exists(pid) for pid in engine_pids(lines))
    assert not list(scratch.glob("sidecar-demo-*"))


def test_it_ends_by_itself(scratch: Path, start: Start) -> None:
    """With --seconds it ends by itself at any stage; an engine that is not ready by then is a reported failure."""
    lines: list[str] = []
    assert finish(start("--seconds", "0.5", "--stall-after", "0"), lines) == 1
    assert PAGE.match(lines[0])
    assert summary_of(lines)["requests"] == "0"
    assert "FAILED: the engine never became ready\n" in lines
    assert nothing_left(scratch)


@pytest.mark.slow
def test_it_sums_up_what_was_served(scratch: Path, start: Start) -> None:
    """The summary includes the requests, images and MU of the run."""
    lines: list[str] = []
    process = start("--stall-after", "0")
    read_until(process, r"[1-9]\d* requests ok.* [1-9]\d* images", lines)
    process.send_signal(signal.SIGTERM)
    code = finish(process, lines)
    assert code == 0, "".join(lines)
    assert PAGE.match(lines[0])
    summary = summary_of(lines)
    assert re.search(r"\b[1-9]\d* ok\b", summary["requests"])
    assert float(summary["model units"].split()[0]) > 0
    assert int(summary["images"].split()[0]) > 0
    assert summary["stalls injected"] == summary["false alarms"] == "0"
    assert nothing_left(scratch)


def test_a_sidecar_that_dies_fails_the_demo(scratch: Path, start: Start) -> None:
    """When the sidecar dies, the demo reports it, exits with 1, keeps and names the logs, and leaves no process."""
    lines: list[str] = []
    process = start("--stall-after", "0")
    read_until(process, "sidecar up", lines)
    (pod,) = [p for p in psutil.Process(process.pid).children() if "run" in p.cmdline()]
    pod.kill()
    assert finish(process, lines) == 1
    assert "FAILED: the sidecar exited (signal SIGKILL)\n" in lines
    (log,) = scratch.glob("sidecar-demo-*/sidecar.log")
    assert str(log) in lines[-1]
    assert nothing_left(scratch)


def test_images_directory_without_images(scratch: Path, start: Start) -> None:
    """A directory without photographs ends it at once with one line and the exit code of a usage error."""
    lines: list[str] = []
    assert finish(start("--images", str(scratch)), lines) == 2
    assert len(lines) == 1
    assert "--images:" in lines[0]
    assert "contains no .jpg" in lines[0]
