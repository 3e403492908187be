"""Messages to systemd, or what else set NOTIFY_SOCKET: ready, stopping, alive, a line of status (sd_notify).

One datagram each; none waits, and none that fails matters. Without NOTIFY_SOCKET nothing is sent. The sender is the
control process, which is not the unit's main process: the unit needs NotifyAccess=all.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Mapping
from contextlib import suppress
from typing import Final

# Variables of the service manager, which are for the sidecar and not for a program that it starts.
VARIABLES: Final = ("NOTIFY_SOCKET", "WATCHDOG_USEC", "WATCHDOG_PID")
MAX_STATUS_CHARS: Final = 300


class ServiceManager:
    """Sends messages to the address in NOTIFY_SOCKET."""

    def __init__(self, environ: Mapping[str, str] = os.environ) -> None:
        address = environ.get("NOTIFY_SOCKET", "")
        # "@" stands for the zero byte of an abstract socket. Other kinds (vsock:) are for virtual machines.
        self._address = f"\0{address[1:]}" if address.startswith("@") else address if address.startswith("/") else ""

    def ready(self, status: str) -> None:
        self._send("READY=1", _status(status))

    def stopping(self) -> None:
        self._send("STOPPING=1", _status("draining"))

    def alive(self, status: str) -> None:
        """Push the watchdog's deadline further away."""
        self._send("WATCHDOG=1", _status(status))

    def _send(self, *lines: str) -> None:
        if not self._address:
            return
        with suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK) as sock:
            sock.sendto("\n".join(lines).encode(), self._address)


def _status(text: str) -> str:
    return "STATUS=" + " ".join(text.split())[:MAX_STATUS_CHARS]
