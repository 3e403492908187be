"""The demo, run as a user runs it: the command itself, with real children, to its end."""

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
        process.communicate(timeout=30)


def finish(process: subprocess.Popen[str], said: list[str]) -> int:
    """Read to the end; the exit code."""
    assert process.stdout
    said.extend(process.stdout)
    return process.wait(timeout=20)


def left_over(scratch: Path) -> list[int]:
    """Processes that work in the scratch directory."""
    return [
        p.pid for p in psutil.process_iter(["cmdline"]) if any(str(scratch) in arg for arg in p.info["cmdline"] or ())
    ]


def engine_pids(said: list[str]) -> list[int]:
    return [int(found[1]) for line in said if (found := re.search(r"engine started \(pid (\d+)", line))]


def summary_of(said: list[str]) -> dict[str, str]:
    rows = [line.strip().split("  ", 1) for line in said if line.startswith("  ")]
    return {name: value.strip() for name, value in rows}


def read_until(process: subprocess.Popen[str], words: str, said: list[str]) -> None:
    """Read the output up to the line with these words."""
    assert process.stdout
    for line in process.stdout:
        said.append(line)
        if words in line:
            return
    pytest.fail(f"ended before it said {words!r}: {''.join(said)}")


@pytest.mark.slow
@pytest.mark.timeout(100)
def test_the_story_of_a_stall(scratch: Path, start: Start) -> None:
    """The URL first; a stall is detected, killed and recovered from; Ctrl-C sums it up with exit code 0, nothing is left."""
    said: list[str] = []
    process = start("--stall-after", "3", "--seconds", "60")
    read_until(process, "RECOVERED", said)
    process.send_signal(signal.SIGINT)
    code = finish(process, said)
    told = "".join(said)
    assert code == 0, told
    assert PAGE.match(said[0])
    order = ["STALL injected", "DETECTED", "liveness probe failed 3/3", "engine killed", "restarts: 1", "RECOVERED"]
    places = [told.index(word) for word in order]
    assert places == sorted(places)
    summary = summary_of(said)
    assert float(summary["time to detect"].split()[0]) > 0
    assert float(summary["time to recover"].split()[0]) > float(summary["time to detect"].split()[0])
    assert summary["stalls injected"] == "1"
    assert summary["false alarms"] == "0"
    assert not left_over(scratch)
    assert not any(psutil.pid_exists(pid) for pid in engine_pids(said))
    assert not list(scratch.glob("sidecar-demo-*"))


@pytest.mark.timeout(60)
def test_it_ends_by_itself(scratch: Path, start: Start) -> None:
    """With --seconds it ends by itself, says what was served, images and MU included, and exits with 0."""
    said: list[str] = []
    code = finish(start("--seconds", "18", "--stall-after", "0"), said)
    assert code == 0, "".join(said)
    assert PAGE.match(said[0])
    summary = summary_of(said)
    assert re.search(r"\b[1-9]\d* ok\b", summary["requests"])
    assert float(summary["model units"].split()[0]) > 0
    assert int(summary["images"].split()[0]) > 0
    assert summary["stalls injected"] == summary["false alarms"] == "0"
    assert not left_over(scratch)


@pytest.mark.timeout(60)
def test_a_sidecar_that_dies_fails_the_demo(scratch: Path, start: Start) -> None:
    """When the sidecar dies the demo ends with exit code 1, says so, keeps and names the logs, and leaves no process."""
    said: list[str] = []
    process = start("--stall-after", "0")
    read_until(process, "sidecar up", said)
    (pod,) = [p for p in psutil.Process(process.pid).children() if "run" in p.cmdline()]
    pod.kill()
    assert finish(process, said) == 1
    assert "FAILED: the sidecar ended (signal SIGKILL)\n" in said
    (log,) = scratch.glob("sidecar-demo-*/sidecar.log")
    assert str(log) in said[-1]
    assert not left_over(scratch)


def test_images_directory_without_images(scratch: Path, start: Start) -> None:
    """A directory without photographs ends it at once with one line and the exit code of a usage error."""
    said: list[str] = []
    assert finish(start("--images", str(scratch)), said) == 2
    assert len(said) == 1
    assert "--images:" in said[0]
    assert "holds no .jpg" in said[0]
