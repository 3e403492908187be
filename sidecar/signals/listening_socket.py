"""Identifies the process that listens on the engine's port by the inodes of its sockets, which are unique to it.

Containers of a pod share their network but not their processes: the engine's process id is hidden, its sockets are not.
An engine on another machine has no sockets here, so nothing is known of it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Final
from urllib.parse import urlsplit

_LISTEN: Final = "0A"  # a state in /proc/net/tcp


def host_and_port(url: str) -> tuple[str, int]:
    """The address behind a base URL."""
    parts = urlsplit(url)
    return parts.hostname or "127.0.0.1", parts.port or (443 if parts.scheme == "https" else 80)


def listening_inodes(engine: str) -> tuple[int, ...]:
    """Inodes of the sockets that listen on the engine's local port, sorted; empty if unknown."""
    host, port = host_and_port(engine)
    if host not in ("127.0.0.1", "localhost", "::1"):
        return ()
    return tuple(sorted({int(row[9]) for row in listening_rows(port)}))


def listening_rows(port: int) -> list[list[str]]:
    """Rows of /proc/net/tcp that listen on a port: `sl local_address rem_address st ... uid timeout inode`."""
    # Addresses are hexadecimal, with their port after a colon.
    rows = (line.split() for table in ("tcp", "tcp6") for line in _read(f"/proc/net/{table}").splitlines()[1:])
    return [row for row in rows if len(row) > 9 and row[3] == _LISTEN and int(row[1].rpartition(":")[2], 16) == port]


def read_boot_id() -> str:
    """The kernel's id of this boot; empty if unknown."""
    return _read("/proc/sys/kernel/random/boot_id").strip()


def _read(path: str) -> str:
    try:
        return Path(path).read_text()
    except OSError:
        return ""
