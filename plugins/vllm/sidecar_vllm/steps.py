"""The steps of vLLM's engine core in a small mapped file, for the sidecar: it sees a prefill move, and a core stand.

Rules: one write when a step begins, and one when no request is left; no call of the kernel, no lock, under a
microsecond. The file lies in memory (tmpfs), so that no disk can hold the core up. Its name has the folder that the
plug-in was loaded from, so that of two engines on a machine each sidecar reads its own. A version that is not known, or
anything that fails, leaves vLLM as it is.
"""

from __future__ import annotations

import contextlib
import functools
import mmap
import os
import struct
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from sidecar_vllm.locked_file import open_locked

# Versions whose scheduler is tested: tests/vllm/test_steps.py.
KNOWN_VERSIONS = tuple(f"0.{minor}." for minor in range(20, 34))
STEPS_PREFIX = "sidecar-steps-"
STEPS_FOLDER = "vllm-steps"  # of the state directory
SHM_FOLDER = Path("/dev/shm")
PLUGIN = Path(__file__).resolve().parents[1]  # the folder on PYTHONPATH
MAGIC = b"SCSTEPS1"
# magic, pid; then the count of steps, tokens in all, tokens of the last step, running, waiting, nanoseconds, and the
# count again: where both differ, the write was under way.
HEAD = struct.Struct("<8sQ")
BODY = struct.Struct("<QQQQQQQ")
FILE_BYTES = 4096
IN_MEMORY = ("tmpfs", "ramfs")


Write = Callable[[int, int, int], None]


def open_file(path: Path) -> tuple[Write, Callable[[], None]]:
    """Make a file for the steps of this process's core, which keeps it locked. Raises OSError.

    Returns what writes a step that begins (its tokens, running and waiting requests), and that none is left.
    """
    fd = open_locked(path)  # stays open: the lock is its
    os.posix_fallocate(fd, 0, FILE_BYTES)  # a full folder fails here, not with SIGBUS in a step
    memory = mmap.mmap(fd, FILE_BYTES)
    memory[: HEAD.size + BODY.size] = bytes(HEAD.size + BODY.size)
    HEAD.pack_into(memory, 0, MAGIC, os.getpid())
    pack, at, now = BODY.pack_into, HEAD.size, time.monotonic_ns  # names of this function are the quickest
    steps = total = 0
    rests = False  # and says so: an idle loop would say it again and again

    def begin(tokens: int, running: int, waiting: int) -> None:
        nonlocal steps, total, rests
        rests = False
        steps += 1
        total += tokens
        pack(memory, at, steps, total, tokens, running, waiting, now(), steps)

    def rest() -> None:
        nonlocal rests
        if not rests:
            pack(memory, at, steps, total, 0, 0, 0, now(), steps)
            rests = True

    return begin, rest


def install(say: Callable[[str], None], plugin: Path = PLUGIN) -> str:
    """Have the scheduler write its steps. Returns why it does not, or ""."""
    import vllm

    if not vllm.__version__.startswith(KNOWN_VERSIONS):
        return f"vLLM {vllm.__version__} is not known to this plug-in"
    from vllm.v1.core.sched.scheduler import Scheduler

    if not hasattr(Scheduler.schedule, "__wrapped__"):
        wrap(Scheduler, StepWriter(plugin, say, count, has_no_request))
    return ""


def count(scheduler: Any, output: Any) -> tuple[int, ...]:
    """The tokens of a step, and requests by vLLM's own count: they wait in several queues."""
    return output.total_num_scheduled_tokens, *scheduler.get_request_counts()


def has_no_request(scheduler: Any) -> bool:
    """Whether none runs and none waits."""
    return not scheduler.running and not any(scheduler.get_request_counts())


def wrap(scheduler: Any, writer: StepWriter) -> None:
    """Put the writer around the methods of vLLM's Scheduler with which a step begins and requests end."""
    schedule, update, finish = scheduler.schedule, scheduler.update_from_output, scheduler.finish_requests
    begin, rest = writer.begin, writer.rest

    @functools.wraps(schedule)
    def schedule_and_tell(self: Any, *args: Any, **kwargs: Any) -> Any:
        output = schedule(self, *args, **kwargs)
        begin(self, output)
        return output

    @functools.wraps(update)
    def update_and_tell(self: Any, *args: Any, **kwargs: Any) -> Any:
        outputs = update(self, *args, **kwargs)
        rest(self)
        return outputs

    @functools.wraps(finish)
    def finish_and_tell(self: Any, *args: Any, **kwargs: Any) -> Any:
        finished = finish(self, *args, **kwargs)
        rest(self)
        return finished

    scheduler.schedule = schedule_and_tell
    scheduler.update_from_output = update_and_tell
    scheduler.finish_requests = finish_and_tell


class StepWriter:
    """Writes the steps of a scheduler; after a failure, never again. The methods take what the hook is given.

    `count`: tokens, running and waiting requests of a step that begins; `rests`: whether no request is left. The file
    is made with the first step, in the process that steps.
    """

    def __init__(
        self,
        plugin: Path,
        say: Callable[[str], None],
        count: Callable[..., tuple[int, ...]],
        rests: Callable[..., bool],
    ) -> None:
        self._plugin = plugin
        self._say = say
        self._count = count
        self._rests = rests
        self._write: Write = self._open
        self._rest = nothing

    def begin(self, *hooked: Any) -> None:
        """A step was scheduled."""
        try:
            self._write(*self._count(*hooked))
        except Exception as e:  # noqa: BLE001 - a step must not fail for its report
            self._give_up(e)

    def rest(self, *hooked: Any) -> None:
        """A step or an abort ended: it may have left no request."""
        try:
            if self._rests(*hooked):
                self._rest()
        except Exception as e:  # noqa: BLE001 - as above
            self._give_up(e)

    def _give_up(self, e: Exception) -> None:
        if self._write is not nothing:
            self._say(f"the inference sidecar sees no steps of this engine: {e}")
        self._write = self._rest = nothing

    def _open(self, tokens: int, running: int, waiting: int) -> None:
        self._write, self._rest = open_file(choose_path(self._plugin))
        self._write(tokens, running, waiting)


def nothing(*_: int) -> None:
    """What is done where nothing can be written."""


def choose_path(plugin: Path) -> Path:
    """A file in the first folder in memory that can be written: the state directory's, or /dev/shm. Raises OSError."""
    place = plugin.stat()
    prefix = f"{STEPS_PREFIX}{place.st_dev:x}-{place.st_ino:x}-"
    for folder in (plugin.parent / STEPS_FOLDER, SHM_FOLDER):
        if os.access(folder, os.W_OK | os.X_OK) and is_in_memory(folder):
            remove_old(folder, prefix)
            return folder / f"{prefix}{os.getpid()}"
    raise FileNotFoundError(2, f"neither {plugin.parent / STEPS_FOLDER} nor {SHM_FOLDER} is memory that can be written")


def remove_old(folder: Path, prefix: str) -> None:
    """Remove what processes left that are no more."""
    for file in folder.glob(prefix + "*"):
        if not Path(f"/proc/{file.name.rpartition('-')[2]}").exists():
            with contextlib.suppress(OSError):
                file.unlink()


def is_in_memory(folder: Path) -> bool:
    """Whether a folder lies on tmpfs, by the mount that is nearest above it."""
    real, best = os.path.realpath(folder), ("", "")
    for line in Path("/proc/self/mounts").read_text().splitlines():
        _, place, kind, *_ = line.split(" ")
        if len(place) >= len(best[0]) and (real + "/").startswith(place.rstrip("/") + "/"):
            best = (place, kind)
    return best[1] in IN_MEMORY
