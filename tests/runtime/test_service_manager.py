"""Messages to systemd: what is sent to a real socket, by whom, and that nothing depends on it."""

from __future__ import annotations

import asyncio
import re
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from sidecar.control import process as control_process
from sidecar.launch import engine_runner
from sidecar.launch.process_tree import STOP_MARGIN_S
from sidecar.runtime.service_manager import MAX_STATUS_CHARS, ServiceManager
from sidecar.runtime.supervisor import END_TIMEOUT_S
from sidecar.settings import Settings

from ..waiting import PATIENCE

UNITS = Path(__file__).resolve().parents[2] / "deploy" / "systemd"


@pytest.fixture
def manager(tmp_path: Path) -> Iterator[socket.socket]:
    """The socket of a service manager."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        sock.bind(str(tmp_path / "notify"))
        sock.settimeout(PATIENCE)
        yield sock


def test_messages_are_datagrams_of_one_line_each(manager: socket.socket) -> None:
    """READY, STOPPING, WATCHDOG; a status is one line, and bounded."""
    sender = ServiceManager({"NOTIFY_SOCKET": manager.getsockname()})
    sender.ready("a\nMAINPID=1")
    assert manager.recv(9999) == b"READY=1\nSTATUS=a MAINPID=1"
    sender.alive("x" * 9999)
    assert manager.recv(9999) == b"WATCHDOG=1\nSTATUS=" + b"x" * MAX_STATUS_CHARS
    sender.stopping()
    assert manager.recv(9999) == b"STOPPING=1\nSTATUS=draining"


def test_an_abstract_socket_is_named_by_an_at_sign() -> None:
    """@name is the zero byte and a name."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        sock.bind("\0sidecar-test-notify")
        sock.settimeout(PATIENCE)
        ServiceManager({"NOTIFY_SOCKET": "@sidecar-test-notify"}).ready("")
        assert sock.recv(999).startswith(b"READY=1")


@pytest.mark.parametrize("address", ["", "/nowhere/notify", "vsock:2:1234"])
def test_without_a_manager_nothing_happens(address: str) -> None:
    """No address, a dead one, one of a kind that is not spoken."""
    ServiceManager({"NOTIFY_SOCKET": address}).alive("x")


async def test_a_sidecar_reports_its_life(manager: socket.socket, tmp_path: Path) -> None:
    """Ready once it serves, alive with the verdict as status, stopping on SIGTERM."""
    command = [sys.executable, "-m", "sidecar", "run", "--engine", "http://127.0.0.1:9", "--images", "off"]
    ports = ["--listen", "127.0.0.1:0", "--admin", "127.0.0.1:0", "--state-dir", str(tmp_path / "state")]
    environ = {"NOTIFY_SOCKET": manager.getsockname(), "PATH": "/usr/bin:/bin", "PYTHONPATH": ":".join(sys.path)}
    process = await asyncio.create_subprocess_exec(*command, *ports, env=environ, stderr=asyncio.subprocess.DEVNULL)
    try:
        assert (await asyncio.to_thread(manager.recv, 9999)).startswith(b"READY=1\nSTATUS=starting (")
        assert (await asyncio.to_thread(manager.recv, 9999)).startswith(b"WATCHDOG=1\nSTATUS=starting (")
        process.terminate()
        while (got := await asyncio.to_thread(manager.recv, 9999)) != b"STOPPING=1\nSTATUS=draining":
            assert got.startswith(b"WATCHDOG=1")
        async with asyncio.timeout(PATIENCE):
            assert await process.wait() == 0
    finally:
        if process.returncode is None:
            process.kill()


HANGING = """
import asyncio, time
from sidecar.control import process
from sidecar.runtime.service_manager import ServiceManager

class Loop:
    ticked_at = time.monotonic()
    status = "progressing"

async def main():
    process.HANG_ALARM_S = 1
    beating = asyncio.create_task(process.beat(Loop(), ServiceManager({})))
    await asyncio.sleep(0)
    while HANGS: time.sleep(1)
    beating.cancel()
    await asyncio.wait([beating])
    time.sleep(2)

asyncio.run(main())
"""


@pytest.mark.parametrize(("hangs", "code"), [(True, -signal.SIGALRM), (False, 0)])
def test_a_control_process_that_hangs_is_ended_by_the_kernel(hangs: bool, code: int) -> None:
    """A blocked event loop ends by SIGALRM; one that ended its beat in order lives on."""
    program = HANGING.replace("HANGS", str(hangs))
    done = subprocess.run([sys.executable, "-c", program], timeout=PATIENCE, capture_output=True, check=False)
    assert done.returncode == code, done.stderr


# --- deploy/systemd ---


def seconds(unit: str, key: str) -> float:
    (value,) = re.findall(rf"^{key}=(\d+)$", (UNITS / unit).read_text(), re.M)
    return float(value)


def test_systemd_takes_the_units(requires: Callable[[str], Path], tmp_path: Path) -> None:
    """`systemd-analyze verify` finds nothing; programs that are not installed here are replaced."""
    analyze = requires("systemd-analyze")
    for unit in UNITS.iterdir():
        text = re.sub(r"/opt/\w+/bin/(sidecar|vllm)", str(shutil.which("true")), unit.read_text())
        (tmp_path / unit.name).write_text(text)
    (tmp_path / "vllm.service").write_text("[Service]\nExecStart=/bin/true\n")
    files = sorted(map(str, tmp_path.iterdir()))
    done = subprocess.run([analyze, "verify", "--man=no", *files], capture_output=True, text=True, timeout=60)
    ours = [line for line in (done.stdout + done.stderr).splitlines() if str(tmp_path) in line or "sidecar" in line]
    assert done.returncode == 0 and ours == [], done.stderr


@pytest.mark.parametrize("unit", ["llm.service", "sidecar.service"])
def test_a_unit_gives_the_sidecar_its_time(unit: str) -> None:
    """It is not killed before it has drained, nor before a control process that hangs has been replaced."""
    text = (UNITS / unit).read_text()
    stop = Settings().drain_seconds + STOP_MARGIN_S + END_TIMEOUT_S
    if " -- " in text:
        stop += engine_runner.STOP_GRACE_S
    assert seconds(unit, "TimeoutStopSec") > stop
    assert seconds(unit, "WatchdogSec") > 2 * control_process.HANG_ALARM_S
    assert "KillMode=mixed" in text and "NotifyAccess=all" in text and "Type=notify" in text


@pytest.mark.parametrize("unit", sorted(p.name for p in UNITS.glob("*.service")))
def test_a_unit_starts_commands_that_exist(unit: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Every flag of the sidecar in a unit is one of that command's."""
    from sidecar import __main__

    for command, given in re.findall(r"/bin/sidecar ([a-z]+)([^\n]*?)(?: -- | &&|$)", (UNITS / unit).read_text(), re.M):
        known: Any = __main__.cli.get_command(None, command)  # type: ignore[arg-type]
        options = {option for parameter in known.params for option in parameter.opts}
        assert set(re.findall(r"--[a-z-]+", given)) <= options
