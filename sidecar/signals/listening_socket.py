"""Identifies the process that listens on the engine's port by the inodes of its sockets, which are unique to it.

Containers of a pod share their network but not their processes: the engine's process id is hidden, its sockets are not.
An engine on another machine has no sockets here, so nothing is known of it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Final
from urllib.parse import urlsplit

# A state in /proc/net/tcp.
_LISTEN: Final = "0A"
_TABLES: Final = ("/proc/net/tcp", "/proc/net/tcp6")
_BOOT_ID_FILE: Final = Path("/proc/sys/kernel/random/boot_id")


def listening_inodes(engine: str) -> tuple[int, ...]:
    """Inodes of the sockets that listen on the engine's local port, sorted; empty if unknown."""
    url = urlsplit(engine)
    if url.hostname not in ("127.0.0.1", "localhost", "::1"):
        return ()
    port = url.port or (443 if url.scheme == "https" else 80)
    return tuple(sorted({inode for table in _TABLES for inode in _parse(_read(Path(table)), port)}))


def read_boot_id() -> str:
    """The kernel's id of this boot; empty if unknown."""
    return _read(_BOOT_ID_FILE).strip()


def _parse(table: str, port: int) -> list[int]:
    """Rows are `sl local_address rem_address st ... inode`; addresses are hexadecimal with their port after a colon."""
    rows = (line.split() for line in table.splitlines()[1:])
    return [
        int(row[9]) for row in rows if len(row) > 9 and row[3] == _LISTEN and int(row[1].rpartition(":")[2], 16) == port
    ]


def _read(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""
