"""Finds the engine's processes on this machine, and reads their state from /proc.

- Everything here blocks, and reading /proc of a process in trouble can hang: call it on a thread that may be abandoned.
- The engine is the whole tree of its launcher: the front end that listens may be any child of it (vLLM's Rust front
  end, one of several API servers), next to the processes that compute.
- Command lines are never read, because they may contain a key.
- Without permission over a process the kernel still shows its state, CPU time and memory.
"""

from __future__ import annotations

import os
import re
import socket
import time
from collections.abc import Iterable
from contextlib import suppress
from itertools import islice
from pathlib import Path
from typing import Final

import psutil

from sidecar.labels import printable
from sidecar.readings import Absent, Failed
from sidecar.signals.listening_socket import host_and_port, listening_users, socket_path
from sidecar.signals.process_state import ROLES, EngineProcess, ProcessLook, ThreadState, classify_role
from sidecar.signals.stack_dump import PERMISSION_HINT

MAX_PROCESSES: Final = 32
MAX_THREADS: Final = 64  # per process
PROC: Final = Path("/proc")
ENDED: Final = "it has ended"
REPLACED: Final = "it has ended; its pid belongs to another process now"
SHARE_HINT: Final = "set shareProcessNamespace: true on the pod (sidecar manifests --stack-dumps on)"
_ENGINES: Final = re.compile(r"VLLM::|vllm|sglang|text-generation|llama-server", re.IGNORECASE)
# What starts engines and is none: it may have other children.
_STARTERS: Final = re.compile(
    r"(ba|da|z|k|fi)?sh|systemd|init|tini|dumb-init|docker-init|catatonit|supervisord|s6-.*|runsv|tmux.*|screen|sshd.*"
    r"|login|sudo|su|containerd-shim.*|conmon|make|timeout|nohup|kubelet"
)
_INNER: Final = ("core", "worker")
# Device files of GPUs and other accelerators.
DEVICES: Final = ("/dev/nvidia", "/dev/kfd", "/dev/dri/", "/dev/davinci", "/dev/habana", "/dev/neuron", "/dev/accel")
MAX_FILES: Final = 512  # of a process, that are looked through for a GPU
_TICKS_PER_S: Final = os.sysconf("SC_CLK_TCK")
_PAGE_BYTES: Final = os.sysconf("SC_PAGE_SIZE")


def find(engine: str) -> tuple[EngineProcess, ...] | Absent:
    """The processes behind this URL in the order of ROLES, or why none can be named."""
    host, port = host_and_port(engine)
    place = f"socket {path}" if (path := socket_path(engine)) else f"port {port}"
    if not _is_local(host):
        return Absent(f"the engine is not on this machine ({printable(host)}): its processes cannot be seen from here")
    listeners, is_open = find_listeners(engine)
    if not listeners and not is_open:
        return Absent(f"nothing listens on {place} here: the engine is gone, or it is forwarded")
    sidecar = psutil.Process()
    # An ancestor of the sidecar is not the engine: its tree contains the sidecar.
    own = {sidecar.pid, *(p.pid for p in sidecar.parents())}
    trees = _find_trees(listeners or _find_named(engine), own)
    if not trees and listeners:
        return Absent(f"the process on {place} is the sidecar, or one that started it: it is not examined")
    # With two engines of one user, a guess could blame the wrong one.
    if not trees or (len(trees) > 1 and not listeners):
        return Absent(_explain_hidden(place))
    found = (process for tree in trees for p in tree if (process := _identify(p, p.pid in listeners)))
    return tuple(sorted(found, key=lambda p: (ROLES.index(p.role), p.pid))[:MAX_PROCESSES])


def find_listeners(engine: str) -> tuple[set[int], bool]:
    """(pids that listen on the engine's port or path, as far as visible; whether anything listens there)."""
    path, (_, port) = socket_path(engine), host_and_port(engine)
    try:
        if path:  # accepted connections have it, too, and are of the same processes
            pids = {c.pid for c in psutil.net_connections("unix") if str(c.laddr) == path}
        else:
            pids = {
                c.pid
                for c in psutil.net_connections("tcp")
                if c.status == psutil.CONN_LISTEN and c.laddr[1:] == (port,)
            }
    except (psutil.Error, OSError):
        return set(), False
    return {pid for pid in pids if pid}, bool(pids)


def look(process: EngineProcess) -> ProcessLook | Failed:
    """The state of a process now. Never raises."""
    directory = PROC / str(process.pid)
    try:
        fields = _read_stat(directory / "stat")[1]
        if int(fields[19]) != process.started:
            return Failed(REPLACED)
        state, threads, rss = fields[0], int(fields[17]), int(fields[21]) * _PAGE_BYTES
        wchan, by_thread = _read_wchan(directory / "wchan"), tuple(_read_threads(directory))
        cpu, children, faults = _cpu_seconds(fields), _cpu_seconds(fields[2:]), int(fields[9])
        gpu = _holds_gpu(directory / "fd")
        return ProcessLook(time.monotonic(), state, wchan, threads, cpu, rss, by_thread, children, faults, gpu)
    except (FileNotFoundError, ProcessLookupError):
        return Failed(ENDED)
    except (OSError, ValueError, IndexError) as e:
        return Failed(f"it could not be examined ({type(e).__name__})")


def _is_local(host: str) -> bool:
    """Whether a host name or address belongs to this machine or pod."""
    try:
        addresses = {entry[4][0] for entry in socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)}
    except OSError:
        return False
    own = {entry.address.partition("%")[0] for entries in psutil.net_if_addrs().values() for entry in entries}
    return any(str(address).startswith(("127.", "::1", "0.0.0.0")) or address in own for address in addresses)


def _find_trees(pids: Iterable[int], own: set[int]) -> list[list[psutil.Process]]:
    """Each launcher of one of these processes with all its descendants; without those of `own`."""
    found: dict[int, list[psutil.Process]] = {}
    for pid in set(pids) - own:
        with suppress(psutil.Error, OSError):  # it has ended meanwhile
            root = _find_root(psutil.Process(pid), own)
            found.setdefault(root.pid, [root, *root.children(recursive=True)])
    return list(found.values())


def _find_root(process: psutil.Process, own: set[int]) -> psutil.Process:
    """The engine's launcher: the top parent with an engine's name (TGI's port belongs to a sibling of its shards).

    Where what listens has nothing that computes below it, its parent of any name that has: `python -m vllm` starts a
    front end and cores side by side. A parent that starts engines and is none is no launcher.
    """
    root = process
    for parent in process.parents():
        if parent.pid in own or parent.pid == 1:
            break
        name = parent.name()
        if _STARTERS.fullmatch(name):
            continue
        if _ENGINES.search(name) or (not _computes(root) and _computes(parent)):
            root = parent
    return root


def _computes(process: psutil.Process) -> bool:
    """Whether a core or a worker is among a process and its descendants."""
    with suppress(psutil.Error, OSError):
        tree = (process, *process.children(recursive=True))
        return any(classify_role(each.name(), listens=False) in _INNER for each in tree)
    return False


def _find_named(engine: str) -> list[int]:
    """Processes with an engine's name that belong to the listening user: both are public."""
    users = listening_users(engine)
    named = (p for p in psutil.process_iter(["name", "uids"]) if _ENGINES.search(p.info["name"] or ""))
    return [p.pid for p in named if p.info["uids"] and p.info["uids"].effective in users]


def _explain_hidden(place: str) -> str:
    """Why the listening process is not visible."""
    for directory in PROC.glob("[0-9]*"):
        try:
            next((directory / "fd").iterdir(), None)
        except PermissionError:
            return f"no permission to examine the process on {place}: {PERMISSION_HINT}"
        except OSError:
            continue
    return f"the process on {place} is in another PID namespace: {SHARE_HINT}"


def _identify(process: psutil.Process, listens: bool) -> EngineProcess | None:
    try:
        name = printable(process.name())
        started = int(_read_stat(PROC / str(process.pid) / "stat")[1][19])
        return EngineProcess(process.pid, name, classify_role(name, listens), started)
    except (psutil.Error, OSError, ValueError, IndexError):
        return None


def _read_stat(path: Path) -> tuple[str, list[str]]:
    """(name, fields after it: state, parent, ...) of a stat file. A name may contain spaces and brackets."""
    text = path.read_text("utf-8", "replace")
    return printable(text[text.index("(") + 1 : text.rindex(")")]), text[text.rindex(")") + 1 :].split()


def _cpu_seconds(fields: list[str]) -> float:
    return (int(fields[11]) + int(fields[12])) / _TICKS_PER_S


def _read_wchan(path: Path) -> str:
    """Where it sleeps in the kernel; "" if it runs or this is not permitted."""
    try:
        text = printable(path.read_text("utf-8", "replace"))
    except OSError:
        return ""
    return "" if text in ("0", "none") else text


def _read_threads(directory: Path) -> Iterable[ThreadState]:
    for path in sorted((directory / "task").iterdir(), key=lambda path: int(path.name))[:MAX_THREADS]:
        with suppress(OSError, ValueError, IndexError):
            name, fields = _read_stat(path / "stat")
            wchan, syscall = _read_wchan(path / "wchan"), _read_syscall(path / "syscall")
            file = _read_file(directory / "fd", syscall)
            yield ThreadState(int(path.name), name, fields[0], _cpu_seconds(fields), wchan, syscall, file)


def _read_syscall(path: Path) -> str:
    """The kernel's line: number and arguments of the call; "" while it runs, or where this is not permitted."""
    try:
        text = printable(path.read_text("ascii", "replace"))
    except OSError:
        return ""
    return "" if text == "running" else text


def _read_file(files: Path, syscall: str) -> str:
    """What the first argument of a system call stands for, if it is a file descriptor."""
    with suppress(OSError, ValueError, IndexError):
        number = int(syscall.split()[1], 16)
        if 0 <= number < 1 << 20:
            return printable(str((files / str(number)).readlink()))
    return ""


def _holds_gpu(files: Path) -> bool | None:
    """Whether a process has a GPU open; None where that cannot be read."""
    try:
        names = [path.name for path in islice(files.iterdir(), MAX_FILES)]
    except OSError:
        return None
    for name in names:
        with suppress(OSError):
            if str((files / name).readlink()).startswith(DEVICES):
                return True
    return None if len(names) == MAX_FILES else False
