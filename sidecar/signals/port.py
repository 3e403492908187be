"""Whether the engine's port, or its Unix socket, accepts connections.

- Only a refusal counts against the engine. A connection that is slow to open means a busy machine, and an engine with a
  full backlog is alive.
- A name may have several addresses. The engine is open if one of them accepts, and refuses if none does.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
import socket
import stat
import time
from pathlib import Path
from typing import Final

from sidecar.signals.engine_address import EngineAddress
from sidecar.signals.listening_socket import host_and_port, socket_path

CONNECT_TIMEOUT_S: Final = 5.0
# This machine cannot reach an address of such a kind (IPv6 without a route): it is none of the engine's.
_FOREIGN_ERRORS: Final = (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT, errno.ENETUNREACH)

_log = logging.getLogger(__name__)


class PortSignal:
    """Connects once per `period` and disconnects. `refused_since` is None while connections are accepted."""

    def __init__(self, engine: str) -> None:
        self._address = EngineAddress(engine)
        self._path, (self._host, self._port) = socket_path(engine), host_and_port(engine)
        self.period = 1.0  # seconds; the caller may change it
        self.refused_since: float | None = None
        self.opened = asyncio.Event()  # set by the first accepted connection
        self.trouble = ""  # why no connection can be made; see EngineAddress

    async def run(self) -> None:
        """Probe until cancelled."""
        while True:
            await self.poll()
            await asyncio.sleep(self.period)

    async def poll(self) -> None:
        """Connect once."""
        if self._path and _is_other_file(self._path):
            self._report(f"{self._path} is no socket: name the one that the engine listens on in --engine")
            return
        try:
            async with asyncio.timeout(CONNECT_TIMEOUT_S):
                is_open = await self._connect()
        except OSError as e:  # TimeoutError included
            self._report(self._explain(e))
            return  # unknown: neither open nor refused
        self._report("")
        if is_open:
            self.refused_since = None
            self.opened.set()
        else:
            self.refused_since = self.refused_since or time.monotonic()

    async def _connect(self) -> bool:
        """Whether an address accepts a connection. Raises OSError if none does and not all of them refuse."""
        if self._path:
            return await self._try()
        found = await asyncio.get_running_loop().getaddrinfo(self._host, self._port, type=socket.SOCK_STREAM)
        refused, foreign, unknown = False, OSError("no address"), None
        for address in dict.fromkeys(str(entry[4][0]) for entry in found):
            try:
                if await self._try(address):
                    return True
                refused = True
            except OSError as e:
                if e.errno in _FOREIGN_ERRORS:
                    foreign = e
                else:
                    unknown = e
        if unknown is not None or not refused:  # this machine's own trouble refuses nothing
            raise unknown or foreign
        return False

    async def _try(self, address: str = "") -> bool:
        """Whether one address accepts a connection, or refuses it."""
        try:
            if self._path:
                _, writer = await asyncio.open_unix_connection(self._path)
            else:
                _, writer = await asyncio.open_connection(address, self._port)
        except (ConnectionRefusedError, FileNotFoundError):  # no file: its engine has not made the socket yet
            return False
        writer.close()
        with contextlib.suppress(OSError):
            await writer.wait_closed()
        return True

    def _explain(self, error: OSError) -> str:
        if isinstance(error, socket.gaierror):
            return f"the engine's host {self._host} cannot be resolved: correct --engine, or wait for its DNS record"
        return self._address.explain(error)

    def _report(self, trouble: str) -> None:
        if trouble and trouble != self.trouble:
            _log.warning("%s", trouble)
        self.trouble = trouble


def _is_other_file(path: str) -> bool:
    """Whether there is something at a path, and it is no socket."""
    try:
        return not stat.S_ISSOCK(Path(path).stat().st_mode)
    except OSError:
        return False
