"""Stack dumps of processes without Python (llama.cpp, vLLM's Rust front end), by eu-stack or gdb where there is one.

- Both stop the process for as long as they read it, so they are used on an engine that is stalled, never on a doubt.
  One that is killed half-way leaves the process running.
- Names of functions only: no values of arguments. Nothing is loaded from the engine's files or the network.
"""

from __future__ import annotations

import asyncio
import re
import shutil
from pathlib import Path
from typing import Final

from sidecar.labels import printable
from sidecar.readings import Failed
from sidecar.signals import stack_dump

EU_STACK: Final = "eu-stack"
GDB: Final = "gdb"
TIMEOUT_S: Final = 30.0  # at most; the round that it is part of has less
MAX_FRAMES: Final = 32  # of a thread
MAX_LINES: Final = 800
INSTALL: Final = "no Python in it; install gdb or elfutils (eu-stack) with the sidecar to get its stacks"
STOPPED: Final = "it is stopped, and a native dump could resume it"

_KEPT: Final = re.compile(r"(TID \d+:|Thread \d+ |#\d+ )")
_VALUES: Final = re.compile(r" \(.*=.*\)")


def locate() -> list[str] | None:
    """The command that dumps a process, without its pid."""
    if path := shutil.which(EU_STACK):
        return [path, "-n", str(MAX_FRAMES), "-p"]
    if path := shutil.which(GDB):
        safe = ["-iex", "set auto-load off", "-iex", "set debuginfod enabled off"]
        quiet = ["-ex", "set print frame-arguments none", "-ex", "set print entry-values no"]
        return [path, "-nx", "--batch", *safe, *quiet, "-ex", f"thread apply all backtrace {MAX_FRAMES}", "-p"]
    return None


async def dump(pid: int, command: list[str], timeout_s: float = TIMEOUT_S) -> str | Failed:
    """The stacks of all threads of a process as text, or why there are none. Never raises."""
    name = Path(command[0]).name
    if is_stopped(pid):
        return Failed(STOPPED)
    try:
        async with asyncio.timeout(timeout_s):
            code, out, err = await stack_dump.run([*command, str(pid)])
    except TimeoutError:
        return Failed(f"{name} made no dump in {timeout_s:.0f} s and was killed")
    except OSError as e:
        return Failed(f"{name} cannot be started ({e.strerror})")
    text = clean(out)
    if text:
        return text
    said = err.decode("utf-8", "replace").strip().partition("\n")[0]
    if "not permitted" in err.decode("utf-8", "replace").lower():
        return Failed(stack_dump.REFUSED)
    return Failed(f"{name} ended with {code}: {printable(said, 200)}")


def is_stopped(pid: int) -> bool:
    """Whether a signal or a tracer has stopped it."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text("utf-8", "replace")
    except OSError:
        return False
    return text[text.rindex(")") + 2 :][:1] in ("T", "t")


def clean(out: bytes) -> str:
    """The lines of threads and frames as printable characters, without values."""
    lines = [line for line in out.decode("utf-8", "replace").splitlines() if _KEPT.match(line)][:MAX_LINES]
    kept = (_VALUES.sub(" (...)", line)[: stack_dump.MAX_LINE_CHARS] for line in lines)
    return "\n".join("".join(c if c.isprintable() else "?" for c in line) for line in kept)
