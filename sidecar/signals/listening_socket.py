"""Which process it is that listens on the engine's port: the inodes of its listening sockets, which no two processes share.

Containers of a pod share their network and not their processes, so the engine's process id cannot be had; its sockets can be seen by
everybody, and every engine has one. An engine on another machine has none here: then nothing is known.
"""

from __future__ import annotations

from pathlib import Path
from typing import Final
from urllib.parse import urlsplit

_LISTEN: Final = "0A"
_TABLES: Final = ("/proc/net/tcp", "/proc/net/tcp6")
_BOOT: Final = Path("/proc/sys/kernel/random/boot_id")


def listeners(engine: str) -> tuple[int, ...]:
    """Inodes of the sockets that listen on the engine's port of this machine, in order; empty where that is not known."""
    url = urlsplit(engine)
    if url.hostname not in ("127.0.0.1", "localhost", "::1"):
        return ()
    port = url.port or (443 if url.scheme == "https" else 80)
    return tuple(sorted({inode for table in _TABLES for inode in _parse(_read(Path(table)), port)}))


def boot() -> str:
    """This boot of this machine; empty where the kernel does not say."""
    return _read(_BOOT).strip()


def _parse(table: str, port: int) -> list[int]:
    """Rows are `sl local_address rem_address st ... inode`; addresses are hexadecimal with their port after a colon."""
    rows = (line.split() for line in table.splitlines()[1:])
    return [int(r[9]) for r in rows if len(r) > 9 and r[3] == _LISTEN and int(r[1].rpartition(":")[2], 16) == port]


def _read(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""
