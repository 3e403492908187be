"""The engine's processes are found by its port and examined without touching them, or there is a reason."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

from sidecar.labels import printable
from sidecar.readings import Absent, Failed
from sidecar.signals.engine_processes import MAX_THREADS, find, look
from sidecar.signals.process_state import EngineProcess, ProcessLook

from .victims import victim

ROOT = Path(__file__).resolve().parent.parent.parent
PARENT = """
import socket, subprocess, sys, time
listener = socket.create_server(("127.0.0.1", 0))
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(1000)"])
print(listener.getsockname()[1], flush=True)
child.wait()
"""


NAMED = """
import pathlib, socket, time
listener = socket.create_server(("127.0.0.1", 0))
pathlib.Path("/proc/self/comm").write_text("VLLM::EngineCor")
print(listener.getsockname()[1], flush=True)
time.sleep(1000)
"""
AT_A_PATH = """
import socket, sys, time
listener = socket.socket(socket.AF_UNIX)
listener.bind(sys.argv[1])
listener.listen()
print(0, flush=True)
time.sleep(1000)
"""
# Front ends and cores side by side, below a parent whose name says nothing; "/" begins another engine below one parent.
SIBLINGS = """
import subprocess, sys, time
CHILD = '''
import pathlib, socket, sys, time
pathlib.Path("/proc/self/comm").write_text(sys.argv[1])
listener = socket.create_server(("127.0.0.1", 0))
print(listener.getsockname()[1], flush=True)
time.sleep(1000)
'''
LAUNCHER = '''
import subprocess, sys
start = lambda name: subprocess.Popen([sys.executable, "-c", sys.argv[1], name], stdout=subprocess.PIPE, text=True)
children = [start(name) for name in sys.argv[2:]]
print(*(child.stdout.readline().strip() for child in children), flush=True)
children[0].wait()
'''
def engine(names):
    command = [sys.executable, "-c", LAUNCHER, CHILD, *names]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
engines = [engine(names.split(",")) for names in sys.argv[1].split("/")]
ports = [each.stdout.readline().split() for each in engines]
print(ports[0][0], flush=True)
time.sleep(1000)
"""
PROGRAM = """
import sys
from sidecar.signals.engine_processes import find, look
processes = find(sys.argv[1])
print(processes)
print([look(process) for process in processes] if isinstance(processes, tuple) else "")
"""


def found(url: str) -> tuple[EngineProcess, ...]:
    processes = find(url)
    assert isinstance(processes, tuple), processes
    return processes


def test_the_listening_process_is_found_and_never_the_sidecar() -> None:
    """By its port, under each host name; neither this process nor its ancestors are taken for the engine."""
    with victim() as engine:
        for host in ("127.0.0.1", "localhost"):
            (process,) = found(f"http://{host}:{engine.port}")
            assert (process.pid, process.role) == (engine.pid, "api")
            assert "secret" not in process.name


def test_its_children_are_found_too() -> None:
    """What the listening process started belongs to the engine."""
    with victim(program=PARENT) as engine:
        processes = found(engine.url)
        assert len(processes) == 2 and processes[0].pid == engine.pid
        os.kill(processes[1].pid, signal.SIGKILL)


@pytest.mark.parametrize(
    ("names", "roles"),
    [
        ("vllm-rs,VLLM::EngineCor,VLLM::Worker", ["core", "worker", "api", "other"]),  # a Rust front end
        ("python3,VLLM::EngineCor", ["core", "api", "other"]),
        ("VLLM::ApiServer,VLLM::ApiServer,VLLM::EngineCor", ["core", "api", "api", "other"]),
        ("vllm-rs,VLLM::EngineCor/vllm-rs,VLLM::EngineCor", ["core", "api", "other"]),  # of two engines, one
        ("llama-server", ["api"]),  # nothing computes next to it
    ],
)
def test_a_front_end_is_found_with_the_cores_beside_it(names: str, roles: list[str]) -> None:
    """Whatever the name of what started both; and nothing of another engine below the same grandparent."""
    with victim(names, program=SIBLINGS) as launcher:
        tree = psutil.Process(launcher.pid).children(recursive=True)
        try:
            assert [process.role for process in found(launcher.url)] == roles
        finally:
            for process in tree:
                process.kill()


def test_the_process_behind_a_unix_socket_is_found(tmp_path: Path) -> None:
    """By the path that it bound; without a listener there is a reason that names it."""
    path = tmp_path / "engine.sock"
    with victim(command=(sys.executable, "-c", AT_A_PATH, str(path))) as engine:
        (process,) = found(f"unix:{path}")
        assert (process.pid, process.role) == (engine.pid, "api")
    gone = find(f"unix:{path}")
    assert isinstance(gone, Absent) and f"nothing listens on socket {path}" in gone.reason


def test_a_remote_engine_and_a_closed_port_have_reasons() -> None:
    """A remote engine has no processes here, and neither has a port without a listener."""
    remote = find("http://192.0.2.1:8000")
    assert isinstance(remote, Absent) and "not on this machine (192.0.2.1)" in remote.reason
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    closed = find(f"http://127.0.0.1:{port}")
    assert isinstance(closed, Absent) and f"nothing listens on port {port}" in closed.reason


def test_a_port_of_the_sidecar_is_no_engine() -> None:
    """The sidecar's own process is never examined."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        own = find(f"http://127.0.0.1:{listener.getsockname()[1]}")
    assert isinstance(own, Absent) and "is the sidecar" in own.reason


@pytest.mark.parametrize(("does", "states"), [("spin_here", "R"), ("sleep_here", "S")])
def test_a_look_distinguishes_running_from_sleeping(does: str, states: str, until: Callable[..., None]) -> None:
    """State, threads, CPU time and memory come from the kernel."""
    with victim(does) as engine:
        (process,) = found(engine.url)
        until(lambda: isinstance(seen := look(process), ProcessLook) and seen.state in states)
        seen = look(process)
        assert isinstance(seen, ProcessLook) and seen.threads >= 1 and seen.rss > 1 << 20 and seen.cpu >= 0
        assert seen.by_thread[0].tid == engine.pid and len(seen.by_thread) <= MAX_THREADS


def test_a_look_at_a_stopped_process_and_at_one_that_ended(until: Callable[..., None]) -> None:
    """T is reported as T, a process that ended as ended; a later process of its pid is not mistaken for it."""
    with victim() as engine:
        (process,) = found(engine.url)
        os.kill(engine.pid, signal.SIGSTOP)
        until(lambda: isinstance(seen := look(process), ProcessLook) and seen.state == "T")
        other = look(EngineProcess(process.pid, process.name, process.role, process.started + 1))
        assert other == Failed("it has ended; its pid belongs to another process now")
    assert look(process) == Failed("it has ended")


def test_without_capabilities_another_users_engine_is_known_by_its_name(
    powerless: list[str], stranger: dict[str, Any]
) -> None:
    """In a pod with a shared PID namespace, vLLM's processes are found by name; others give reason and remedy."""

    def asked(url: str) -> str:
        command = [*powerless, sys.executable, "-c", PROGRAM, url]
        return subprocess.run(command, capture_output=True, text=True, timeout=60, check=True, cwd=ROOT).stdout

    with victim(**stranger) as engine:
        assert "no permission to examine" in (said := asked(engine.url)) and "SYS_PTRACE" in said
    with victim(program=NAMED, **stranger) as engine:
        said = asked(engine.url)
        assert f"pid={engine.pid}, name='VLLM::EngineCor', role='core'" in said and "state='S'" in said


def test_names_are_made_safe() -> None:
    """A process chooses its name: unprintable characters are replaced."""
    assert printable("evil\x1b[31m") == "evil?[31m"
