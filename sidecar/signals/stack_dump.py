"""Stack dumps of Python processes, by py-spy.

- py-spy reads the memory of the running process (`--nonblocking`) and never stops it. So a wrong verdict does not pause
  a healthy engine, a process that is already stopped can be dumped, and a dump that dies half-way leaves nothing
  attached. The price: no native frames, and an occasional retry.
- Never `--locals`: values of variables are prompts.
"""

from __future__ import annotations

import asyncio
import os
import shutil
import sys
from contextlib import suppress
from pathlib import Path
from typing import Final

from sidecar.labels import printable
from sidecar.readings import Failed

PY_SPY: Final = "py-spy"
# 100 threads of 10 frames are 40 KB.
MAX_DUMP_BYTES: Final = 48 * 1024
MAX_STDERR_BYTES: Final = 4096
MAX_LINE_CHARS: Final = 300
# A dump takes 0.05 s, and a second on a starved machine.
DUMP_TIMEOUT_S: Final = 3.0
KILL_TIMEOUT_S: Final = 1.0
INSTALL: Final = "py-spy is not installed: pip install 'inference-sidecar[diagnose]'"
PERMISSION_HINT: Final = (
    "run the sidecar as the engine's user and with the capability SYS_PTRACE (sidecar manifests --stack-dumps on)"
)
REFUSED: Final = f"no permission to read its memory: {PERMISSION_HINT}"
FOREIGN: Final = "no Python in it that py-spy knows"
ENDED: Final = "it has ended"
# A second attempt would fail for the same reason.
FINAL: Final = (REFUSED, FOREIGN, ENDED)

# Messages of py-spy 0.4 in lower case, and their meanings.
_MEANINGS: Final = (
    ("permission denied", REFUSED),
    ("operation not permitted", REFUSED),
    ("failed to find python version", FOREIGN),
    ("unsupported version of python", FOREIGN),
    ("no such file or directory", ENDED),
    ("no such process", ENDED),
)


def locate() -> str | None:
    """Path of py-spy: next to the interpreter, or on PATH."""
    path = Path(sys.executable).parent / PY_SPY
    return str(path) if os.access(path, os.X_OK) else shutil.which(PY_SPY)


async def dump(pid: int, py_spy: str, timeout_s: float = DUMP_TIMEOUT_S) -> str | Failed:
    """The stacks of all Python threads of a process as text, or why there are none. Never raises."""
    command = [py_spy, "dump", "--nonblocking", "--pid", str(pid)]
    try:
        async with asyncio.timeout(timeout_s):
            first = await _attempt(command)
            # The process runs while it is read, which can spoil the first attempt.
            return await _attempt(command) if isinstance(first, Failed) and first.error not in FINAL else first
    except TimeoutError:
        return Failed(f"py-spy made no dump in {timeout_s:.0f} s and was killed")
    except OSError as e:
        return Failed(f"py-spy cannot be started ({e.strerror})")


async def _attempt(command: list[str]) -> str | Failed:
    code, out, err = await run(command)
    return clean_dump(out) if code == 0 else Failed(explain_failure(err.decode("utf-8", "replace")))


async def run(command: list[str]) -> tuple[int | None, bytes, bytes]:
    """The exit code and the beginnings of what a command printed. It is killed where this is cancelled."""
    env = {"PATH": os.environ.get("PATH", ""), "RUST_BACKTRACE": "0"}
    pipe, null = asyncio.subprocess.PIPE, asyncio.subprocess.DEVNULL
    child = await asyncio.create_subprocess_exec(*command, stdin=null, stdout=pipe, stderr=pipe, env=env)
    try:
        assert child.stdout is not None and child.stderr is not None
        reads = _read_start(child.stdout, MAX_DUMP_BYTES), _read_start(child.stderr, MAX_STDERR_BYTES)
        out, err = await asyncio.gather(*reads)
        code = await child.wait()
    finally:
        await _kill(child)
    return code, out, err


async def _read_start(stream: asyncio.StreamReader, max_bytes: int) -> bytes:
    """The first `max_bytes` of a stream; the rest is read and dropped, so that the writer does not hang."""
    kept = bytearray()
    while chunk := await stream.read(65536):
        kept += chunk[: max_bytes - len(kept)]
    return bytes(kept)


async def _kill(child: asyncio.subprocess.Process) -> None:
    if child.returncode is None:
        # A process blocked in the kernel does not end even when killed; it is reaped whenever it does.
        with suppress(ProcessLookupError, TimeoutError):
            child.kill()
            await asyncio.wait_for(child.wait(), KILL_TIMEOUT_S)


def clean_dump(out: bytes) -> str:
    """py-spy's text as printable characters, without its heading: the command line in it may contain a key."""
    lines = out.decode("utf-8", "replace").splitlines()
    start = next((i for i, line in enumerate(lines) if line.startswith("Thread ")), len(lines))
    kept = ["".join(c if c.isprintable() else "?" for c in line[:MAX_LINE_CHARS]) for line in lines[start:]]
    return "\n".join(kept + (["(cut)"] if len(out) >= MAX_DUMP_BYTES else []))


def explain_failure(message: str) -> str:
    """Why py-spy failed, from what it printed."""
    lowered = message.lower()
    known = next((meaning for sign, meaning in _MEANINGS if sign in lowered), None)
    return known or "py-spy: " + printable(message.strip().partition("\n")[0], 200)
