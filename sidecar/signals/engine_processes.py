"""The engine's processes on this machine, and what the kernel says of them.

Rules: everything here blocks, and a process in trouble can make a read of /proc hang: call it on a thread that may be left
behind. A command line is never read, because it may hold a key. Bounded in processes and threads. Without permission over a
process the kernel still tells its state, CPU time and memory.
"""

from __future__ import annotations

import os
import re
import socket
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path
from typing import Final
from urllib.parse import urlsplit

import psutil

from sidecar.labels import printable
from sidecar.readings import Absent, Failed
from sidecar.signals.process_state import ROLES, EngineProcess, ProcessLook, ThreadState, role_of
from sidecar.signals.stack_dump import PERMIT

MAX_PROCESSES: Final = 32
MAX_THREADS: Final = 64  # told apart per process
PROC: Final = Path("/proc")
SHARE: Final = "set shareProcessNamespace: true on the pod (sidecar manifests --stack-dumps on)"
_ENGINES: Final = re.compile(r"VLLM::|vllm|sglang|text-generation|llama-server", re.IGNORECASE)
_LISTEN: Final = "0A"  # a state of /proc/net/tcp
_TICKS: Final = os.sysconf("SC_CLK_TCK")
_PAGE: Final = os.sysconf("SC_PAGE_SIZE")


def find(engine: str) -> tuple[EngineProcess, ...] | Absent:
    """The processes behind this URL, the most telling first; why none can be named."""
    parts = urlsplit(engine)
    host, port = parts.hostname or "127.0.0.1", parts.port or (443 if parts.scheme == "https" else 80)
    if not _here(host):
        return Absent(f"the engine is not on this machine ({printable(host)}): its processes cannot be seen from here")
    listeners, someone = listening(port)
    if not listeners and not someone:
        return Absent(
            f"nothing listens on port {port} here: the engine is gone, or its port is forwarded from elsewhere"
        )
    me = psutil.Process()
    ours = {
        me.pid,
        *(p.pid for p in me.parents()),
    }  # what we descend from is not the engine, or we would examine ourselves
    families = _families(listeners or _by_name(port), ours)
    if not families and listeners:
        return Absent(f"the process on port {port} is our own, or one that started us: it is not examined")
    if not families or (
        len(families) > 1 and not listeners
    ):  # two engines of one user: a guess would blame the wrong one
        return Absent(_hidden(port))
    made = (process for family in families for p in family if (process := _process(p, p.pid in listeners)) is not None)
    return tuple(sorted(made, key=lambda p: (ROLES.index(p.role), p.pid))[:MAX_PROCESSES])


def listening(port: int) -> tuple[set[int], bool]:
    """(pids that listen on a TCP port, as far as they may be known; whether anything listens there at all)."""
    try:
        pids = {
            c.pid for c in psutil.net_connections("tcp") if c.status == psutil.CONN_LISTEN and c.laddr[1:] == (port,)
        }
    except (psutil.Error, OSError):
        return set(), False
    return {pid for pid in pids if pid}, bool(pids)


def look(process: EngineProcess, clock: Callable[[], float] = time.monotonic) -> ProcessLook | Failed:
    """What the kernel says of a process now. Never raises."""
    folder = PROC / str(process.pid)
    try:
        fields = _stat(folder / "stat")[1]
        if int(fields[19]) != process.started:
            return Failed("it ended; its pid belongs to another process now")
        return ProcessLook(
            at=clock(), state=fields[0], wchan=_wchan(folder / "wchan"), threads=int(fields[17]), cpu=_cpu(fields),
            rss=int(fields[21]) * _PAGE, by_thread=tuple(_threads(folder / "task")),
        )  # fmt: skip
    except FileNotFoundError:
        return Failed("it has ended")
    except (OSError, ValueError, IndexError) as e:
        return Failed(f"it could not be looked at ({type(e).__name__})")


def _here(host: str) -> bool:
    """Whether a host's name or address is of this machine, or this pod."""
    try:
        wanted = {entry[4][0] for entry in socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)}
    except OSError:
        return False
    own = {address.address.partition("%")[0] for addresses in psutil.net_if_addrs().values() for address in addresses}
    return any(str(address).startswith(("127.", "::1", "0.0.0.0")) or address in own for address in wanted)


def _families(pids: Iterable[int], ours: set[int]) -> list[list[psutil.Process]]:
    """Each launcher of one of these processes with all its descendants; none of `ours`."""
    found: dict[int, list[psutil.Process]] = {}
    for pid in set(pids) - ours:
        with suppress(psutil.Error, OSError):  # it ended meanwhile
            root = _root(psutil.Process(pid), ours)
            found.setdefault(root.pid, [root, *root.children(recursive=True)])
    return list(found.values())


def _root(process: psutil.Process, ours: set[int]) -> psutil.Process:
    """The engine's launcher: up as long as a parent calls itself an engine (TGI's port belongs to a sibling of its shards)."""
    while (parent := process.parent()) is not None and parent.pid not in ours and _ENGINES.search(parent.name()):
        process = parent
    return process


def _by_name(port: int) -> list[int]:
    """Processes that call themselves an engine and belong to the user who listens: both are for everybody to read."""
    users = _users(port)
    named = (p for p in psutil.process_iter(["name", "uids"]) if _ENGINES.search(p.info["name"] or ""))
    return [p.pid for p in named if p.info["uids"] and p.info["uids"].effective in users]


def _users(port: int) -> set[int]:
    """Ids of the users who listen on a TCP port."""
    lines = [line.split() for name in ("tcp", "tcp6") for line in _table(PROC / "net" / name)]
    return {int(line[7]) for line in lines if line[3] == _LISTEN and int(line[1].rpartition(":")[2], 16) == port}


def _table(path: Path) -> list[str]:
    try:
        return path.read_text().splitlines()[1:]
    except OSError:
        return []


def _hidden(port: int) -> str:
    """Why nobody can be named who listens."""
    for folder in PROC.glob("[0-9]*"):
        try:
            next((folder / "fd").iterdir(), None)
        except PermissionError:
            return f"the process on port {port} may not be looked at: {PERMIT}"
        except OSError:
            continue
    return f"the process on port {port} is in another PID namespace: {SHARE}"


def _process(p: psutil.Process, listens: bool) -> EngineProcess | None:
    try:
        name = printable(p.name())
        started = int(_stat(PROC / str(p.pid) / "stat")[1][19])
        return EngineProcess(p.pid, name, role_of(name, listens), started)
    except (psutil.Error, OSError, ValueError, IndexError):
        return None


def _stat(path: Path) -> tuple[str, list[str]]:
    """(name, what follows it: state, parent, ...) of a stat file; a name may hold blanks and brackets."""
    text = path.read_text("utf-8", "replace")
    return printable(text[text.index("(") + 1 : text.rindex(")")]), text[text.rindex(")") + 1 :].split()


def _cpu(fields: list[str]) -> float:
    return (int(fields[11]) + int(fields[12])) / _TICKS


def _wchan(path: Path) -> str:
    """Where it sleeps in the kernel; "" where it runs, or where we may not know."""
    try:
        text = printable(path.read_text("utf-8", "replace"))
    except OSError:
        return ""
    return "" if text in ("0", "none") else text


def _threads(folder: Path) -> Iterable[ThreadState]:
    for path in sorted(folder.iterdir(), key=lambda path: int(path.name))[:MAX_THREADS]:
        with suppress(OSError, ValueError, IndexError):
            name, fields = _stat(path / "stat")
            yield ThreadState(int(path.name), name, fields[0], _cpu(fields))
