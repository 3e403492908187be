"""Whether the engine accepts connections, on one address, several, or a Unix socket."""

from __future__ import annotations

import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sidecar.runtime.open_files import EXHAUSTED_TEXT
from sidecar.signals.port import PortSignal

from ..few_files import no_files_left

NAME = "engine.example"


@pytest.fixture
def resolve(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """A function: the addresses that NAME has from now on."""
    real = socket.getaddrinfo

    def set_addresses(*addresses: str) -> None:
        def found(host: str, port: int, *args: Any, **options: Any) -> Any:
            if host != NAME:
                return real(host, port, *args, **options)
            if not addresses:
                raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")
            return [entry for address in addresses for entry in real(address, port, *args, **options)]

        monkeypatch.setattr(socket, "getaddrinfo", found)

    return set_addresses


async def test_one_listener_of_several_addresses_is_enough(resolve: Callable[..., None]) -> None:
    """An engine that accepts on one address of its name is open; only when all refuse it is closed."""
    resolve("127.0.0.1", "127.0.0.2")
    with socket.create_server(("127.0.0.2", 0)) as listener:
        port = PortSignal(f"http://{NAME}:{listener.getsockname()[1]}")
        await port.poll()
        assert port.opened.is_set() and port.refused_since is None
    await port.poll()
    assert port.refused_since is not None and port.trouble == ""


async def test_without_a_file_for_a_connection_nothing_is_known() -> None:
    """The sidecar's own limit is its trouble, no refusal of the engine."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = PortSignal(f"http://127.0.0.1:{listener.getsockname()[1]}")
        with no_files_left():
            await port.poll()
        assert (port.refused_since, port.trouble) == (None, EXHAUSTED_TEXT)


async def test_an_address_of_a_kind_that_this_machine_lacks_is_left_out(resolve: Callable[..., None]) -> None:
    """An IPv6 address without a route, or one that refuses as well, does not hide that the other one refuses."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        number = listener.getsockname()[1]
    resolve("127.0.0.1", "::1")
    port = PortSignal(f"http://{NAME}:{number}")
    await port.poll()
    assert port.refused_since is not None


async def test_addresses_that_this_machine_cannot_reach_refuse_nothing(resolve: Callable[..., None]) -> None:
    """A node that lost its route, or has no port left, says nothing of the engine."""
    resolve("2001:db8::1")
    port = PortSignal(f"http://{NAME}:80")
    await port.poll()
    assert port.refused_since is None and not port.opened.is_set()


async def test_a_name_without_an_address_is_no_refusal(
    resolve: Callable[..., None], caplog: pytest.LogCaptureFixture
) -> None:
    """It is said once, and nothing is known of the engine."""
    resolve()
    port = PortSignal(f"http://{NAME}:1")
    for _ in range(2):
        await port.poll()
    assert port.refused_since is None and not port.opened.is_set()
    assert f"host {NAME} cannot be resolved" in port.trouble and caplog.text.count(NAME) == 1


async def test_a_unix_socket_is_open_or_refuses(tmp_path: Path) -> None:
    """Before its engine made the socket, and after it died, connections are refused; in between they are accepted."""
    path = tmp_path / "engine.sock"
    port = PortSignal(f"unix:{path}")
    await port.poll()
    assert port.refused_since is not None and not port.opened.is_set()
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen()
        await port.poll()
        assert port.refused_since is None and port.opened.is_set()
    await port.poll()
    assert path.exists() and port.refused_since is not None


async def test_a_file_that_is_no_socket_says_so(tmp_path: Path) -> None:
    """A folder or a file in the place of the socket is neither open nor refusing: no engine will make one there."""
    path = tmp_path / "engine.sock"
    path.touch()
    for wrong in (path, tmp_path):
        port = PortSignal(f"unix:{wrong}")
        await port.poll()
        assert port.refused_since is None and f"{wrong} is no socket" in port.trouble


POLLED = """
import asyncio, sys
from sidecar.signals.port import PortSignal
port = PortSignal("unix:" + sys.argv[1])
asyncio.run(port.poll())
print(port.refused_since is None, port.trouble)
"""


def test_a_socket_without_permission_says_so(tmp_path: Path, powerless: list[str]) -> None:
    """It is neither open nor refusing, and the remedy is named. Without its capabilities root is a user like others."""
    path = tmp_path / "engine.sock"
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen()
        path.chmod(0)
        command = [*powerless, sys.executable, "-c", POLLED, str(path)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.startswith("True") and "may not write" in done.stdout
