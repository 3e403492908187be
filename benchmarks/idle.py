"""What an idle sidecar costs: CPU share and memory of each of its processes, next to an idle engine.

    python benchmarks/idle.py [--seconds 60] [--write]

CPU is user + system time of the process over wall time, as a share of one core. RSS is resident memory, PSS counts
shared pages once. The engine is the scripted one, with vLLM's metric names; the real vLLM's page is larger (about 100
KB), so its size is printed.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path
from typing import Any

import psutil


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--write", action="store_true")
    chosen = parser.parse_args()
    seconds = chosen.seconds
    engine_port, relay_port, admin_port = (free_port() for _ in range(3))
    engine = start("engine", "--listen", f"127.0.0.1:{engine_port}")
    with tempfile.TemporaryDirectory() as state:
        sidecar = start(
            "run",
            "--engine",
            f"http://127.0.0.1:{engine_port}",
            "--listen",
            f"127.0.0.1:{relay_port}",
            "--admin",
            f"127.0.0.1:{admin_port}",
            "--state-dir",
            state,
            "--images",
            "off",
            "--log-level",
            "error",
        )
        try:
            wait_for(f"http://127.0.0.1:{admin_port}/startupz")
            size = len(urllib.request.urlopen(f"http://127.0.0.1:{engine_port}/metrics").read())
            health = json.loads(urllib.request.urlopen(f"http://127.0.0.1:{admin_port}/healthz").read())
            text = report(measure(sidecar.pid, health, seconds), seconds, size)
            print(text)
            if chosen.write:
                folder = Path(__file__).parent / "results"
                (folder / f"idle-{time.strftime('%Y-%m-%d')}.md").write_text(text + "\n")
        finally:
            for process in (sidecar, engine):
                process.terminate()
                process.wait(30)


def measure(supervisor: int, health: Any, seconds: float) -> list[tuple[str, float, float, float]]:
    """(name, share of a core, RSS MB, PSS MB) of each process of a sidecar. `health` is the body of /healthz."""
    time.sleep(5)  # past startup
    pids = {"supervisor": supervisor, "control": health["pid"]}
    pids |= {f"relay {relay['index']}": relay["pid"] for relay in health["relays"]}
    processes = {name: psutil.Process(pid) for name, pid in pids.items()}
    before = {name: used(p) for name, p in processes.items()}
    started = time.monotonic()
    for left in range(int(seconds), 0, -10):
        print(f"measuring, {left} s left", file=sys.stderr)
        time.sleep(min(10, left))
    wall = time.monotonic() - started
    return [
        (name, (used(p) - before[name]) / wall, p.memory_info().rss / 1e6, p.memory_full_info().pss / 1e6)
        for name, p in processes.items()
    ]


def report(rows: list[tuple[str, float, float, float]], seconds: float, page: int) -> str:
    lines = [
        f"# Idle, {time.strftime('%Y-%m-%d')}",
        "",
        f"{cpu_name()}; `python benchmarks/idle.py --seconds {seconds:.0f}`; "
        f"engine metrics page {page / 1000:.1f} KB, load {os.getloadavg()[0]:.1f}.",
        "",
        "| process | CPU (share of a core) | RSS MB | PSS MB |",
        "|---|---|---|---|",
        *(f"| {name} | {share:.2%} | {rss:.1f} | {pss:.1f} |" for name, share, rss, pss in rows),
    ]
    return "\n".join(lines)


def used(process: psutil.Process) -> float:
    times = process.cpu_times()
    return times.user + times.system


def start(*args: str) -> subprocess.Popen[bytes]:
    return subprocess.Popen([sys.executable, "-m", "sidecar", *args], stdout=subprocess.DEVNULL)


def wait_for(url: str) -> None:
    for _ in range(300):
        try:
            urllib.request.urlopen(url).close()
            return
        except OSError:
            time.sleep(0.1)
    raise SystemExit(f"{url} did not respond")


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


def cpu_name() -> str:
    names = [
        line.split(":", 1)[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line
    ]
    return f"{names[0] if names else platform.processor()}, {len(names)} cores, Python {platform.python_version()}"


if __name__ == "__main__":
    main()
