"""Identifies the process that listens on the engine's port by the inodes of its sockets, which are unique to it.

- Containers of a pod share their network but not their processes: the engine's process id is hidden, its sockets are
  not. An engine on another machine has no sockets here, so nothing is known of it.
- A Unix socket is known by the path that the engine bound it to: under another path here nothing is known of it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Final
from urllib.parse import urlsplit

_LISTEN: Final = "0A"  # a state in /proc/net/tcp
_ACCEPTS: Final = 0x10000  # a flag in /proc/net/unix
UNIX_SCHEME: Final = "unix:"


def socket_path(url: str) -> str:
    """The path of an engine's Unix socket; "" for one that is reached over the network."""
    return url.removeprefix(UNIX_SCHEME) if url.startswith(UNIX_SCHEME) else ""


def host_and_port(url: str) -> tuple[str, int]:
    """The address behind a base URL; this machine and 0 for a Unix socket."""
    if socket_path(url):
        return "localhost", 0
    parts = urlsplit(url)
    return parts.hostname or "127.0.0.1", parts.port or (443 if parts.scheme == "https" else 80)


def listening_inodes(engine: str) -> tuple[int, ...]:
    """Inodes of the sockets that listen on the engine's local port or path, sorted; empty if unknown."""
    if path := socket_path(engine):
        return tuple(sorted(_unix_inodes(path)))
    host, port = host_and_port(engine)
    if host not in ("127.0.0.1", "localhost", "::1"):
        return ()
    return tuple(sorted({int(row[9]) for row in listening_rows(port)}))


def listening_users(engine: str) -> set[int]:
    """The users whose processes listen there."""
    if path := socket_path(engine):
        try:
            return {Path(path).stat().st_uid}
        except OSError:
            return set()
    return {int(row[7]) for row in listening_rows(host_and_port(engine)[1])}


def _unix_inodes(path: str) -> set[int]:
    """Of /proc/net/unix: `Num RefCount Protocol Flags Type St Inode Path`."""
    rows = (line.split(maxsplit=7) for line in _read("/proc/net/unix").splitlines()[1:])
    return {int(row[6]) for row in rows if len(row) > 7 and row[7] == path and int(row[3], 16) & _ACCEPTS}


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
