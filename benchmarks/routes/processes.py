"""Processes on a core of their own, and what all processes of one program use."""

from __future__ import annotations

import contextlib
import functools
import os
import re
import socket
import subprocess
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil

CPUCLOCK_SCHED = 2  # linux/posix-timers.h
START_TIMEOUT_S = 60.0


@functools.cache
def cores() -> tuple[int, int]:
    """(the core of engine and client, the core of what stands between them); one and the same where there is one."""
    allowed = sorted(os.sched_getaffinity(0))
    return allowed[0], allowed[-1]


def stay_off_the_route() -> None:
    """Keep this process off the route's core."""
    os.sched_setaffinity(0, {cores()[0]})


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


@contextlib.contextmanager
def running(core: int, command: list[str]) -> Iterator[subprocess.Popen[bytes]]:
    """A program pinned to a core until the block ends."""
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(["taskset", "-c", str(core), *command], stdout=log, stderr=log)
        try:
            yield process
        except StartFailed:
            log.seek(0)
            raise StartFailed(f"{command[0]}: {log.read()[-800:].decode(errors='replace')}") from None
        finally:
            process.terminate()
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


class StartFailed(Exception):
    """A program did not begin to serve."""


def until(ready: Callable[[], bool], process: subprocess.Popen[bytes]) -> None:
    """Wait for a program that starts. Raises StartFailed."""
    deadline = time.monotonic() + START_TIMEOUT_S
    while not ready():
        if process.poll() is not None or time.monotonic() > deadline:
            raise StartFailed
        time.sleep(0.05)


def answers(url: str) -> bool:
    """Whether a GET is answered 200."""
    try:
        with urllib.request.urlopen(url, timeout=5) as answer:
            return bool(answer.status == 200)
    except (OSError, urllib.error.URLError):
        return False


def tree(pid: int) -> list[int]:
    return [pid, *(child.pid for child in psutil.Process(pid).children(recursive=True))]


def cpu_seconds(pids: list[int]) -> dict[int, float]:
    """User and system time by process."""
    return {pid: _cpu_seconds(pid) for pid in pids}


def _cpu_seconds(pid: int) -> float:
    """User and system time of a process with all its threads, by its CPU clock, which counts nanoseconds."""
    try:
        return time.clock_gettime((~pid << 3) | CPUCLOCK_SCHED)
    except OSError:
        return 0.0  # it has ended


def resident_mib(pid: int) -> tuple[float, float]:
    """(RSS, PSS): pages shared with other processes count in each, or in parts."""
    try:
        page = Path(f"/proc/{pid}/smaps_rollup").read_text()
    except OSError:
        return 0.0, 0.0  # it has ended
    rss, pss = (int(kib) / 1024 for kib in re.findall(r"^(?:Rss|Pss): +(\d+)", page, re.MULTILINE))
    return rss, pss


def machine_busy_seconds() -> float:
    """Seconds of all cores that anything used, or that the hypervisor gave to others, since boot."""
    times = psutil.cpu_times()
    return float(sum(times)) - times.idle - times.iowait - times.guest - times.guest_nice


def cpu_name() -> str:
    """The processor, as the kernel calls it."""
    names = [x.partition(":")[2].strip() for x in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in x]
    return names[0] if names else os.uname().machine
