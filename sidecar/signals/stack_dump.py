"""Stack dumps of Python processes, by py-spy.

Rules: py-spy reads the memory of a running process (`--nonblocking`) and never stops it: a verdict that is wrong must not cost
a healthy engine its pauses, a process that is stopped already cannot be attached to, and a dump that dies half-way leaves
nothing held. The price: no native frames, and now and then a dump that must be tried again. Never `--locals`: values of
variables are prompts. Bounded in time and bytes; whatever hangs is killed.
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
MAX_DUMP_BYTES: Final = 48 * 1024  # of one dump; 100 threads of 10 frames are 40 KB
MAX_LINE: Final = 300
DUMP_TIMEOUT_S: Final = 3.0  # a dump takes 0.05 s, and a second where the machine is starved
KILLED: Final = 1.0  # seconds to wait for one that was killed
INSTALL: Final = "py-spy is not installed: pip install 'inference-sidecar[diagnose]'"
PERMIT: Final = (
    "run the sidecar as the engine's user and with the capability SYS_PTRACE (sidecar manifests --stack-dumps on)"
)
REFUSED: Final = f"no permission to read its memory: {PERMIT}"
FOREIGN: Final = "no Python in it that py-spy knows"
ENDED: Final = "it ended meanwhile"
FINAL: Final = (REFUSED, FOREIGN, ENDED)  # reasons that a second attempt would find again

# What py-spy prints (0.4), in lower case, and what it means.
_MEANINGS: Final = (
    ("permission denied", REFUSED),
    ("operation not permitted", REFUSED),
    ("failed to find python version", FOREIGN),
    ("unsupported version of python", FOREIGN),
    ("no such file or directory", ENDED),
    ("no such process", ENDED),
)


def locate() -> str | None:
    """py-spy's place: beside our interpreter, or on PATH."""
    beside = Path(sys.executable).parent / PY_SPY
    return str(beside) if os.access(beside, os.X_OK) else shutil.which(PY_SPY)


async def dump(pid: int, py_spy: str, seconds: float = DUMP_TIMEOUT_S) -> str | Failed:
    """The stacks of all Python threads of a process, as text; why there are none. Never raises."""

    async def attempt() -> str | Failed:
        return await _attempt([py_spy, "dump", "--nonblocking", "--pid", str(pid)])

    try:
        async with asyncio.timeout(seconds):
            first = await attempt()
            # It reads while the process runs: what changed under its eyes is read again.
            return await attempt() if isinstance(first, Failed) and first.error not in FINAL else first
    except TimeoutError:
        return Failed(f"py-spy had no dump in {seconds:.0f} s, and was killed")
    except OSError as e:
        return Failed(f"py-spy cannot be started ({e.strerror})")


async def _attempt(command: list[str]) -> str | Failed:
    env = {"PATH": os.environ.get("PATH", ""), "RUST_BACKTRACE": "0"}
    child = await asyncio.create_subprocess_exec(
        *command, stdin=asyncio.subprocess.DEVNULL, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE, env=env
    )  # fmt: skip
    try:
        assert child.stdout is not None and child.stderr is not None
        out, err = await asyncio.gather(_some(child.stdout, MAX_DUMP_BYTES), _some(child.stderr, 4096))
        code = await child.wait()
    finally:
        await _end(child)
    return text_of(out) if code == 0 else Failed(reason(err.decode("utf-8", "replace")))


async def _some(stream: asyncio.StreamReader, most: int) -> bytes:
    """All of a stream is read, so that its writer does not hang; the first `most` bytes are kept."""
    kept = bytearray()
    while chunk := await stream.read(65536):
        kept += chunk[: most - len(kept)]
    return bytes(kept)


async def _end(child: asyncio.subprocess.Process) -> None:
    if child.returncode is None:
        with suppress(ProcessLookupError):
            child.kill()
        # One that the kernel holds does not end even so; it is not waited for, and reaped whenever it does.
        with suppress(TimeoutError):
            async with asyncio.timeout(KILLED):
                await child.wait()


def text_of(out: bytes) -> str:
    """py-spy's text without its heading, which holds the command line, and so perhaps a key; nothing unprintable."""
    lines = out.decode("utf-8", "replace").splitlines()
    start = next((i for i, line in enumerate(lines) if line.startswith("Thread ")), len(lines))
    kept = ["".join(c if c.isprintable() else "?" for c in line[:MAX_LINE]) for line in lines[start:]]
    return "\n".join(kept + (["(cut)"] if len(out) >= MAX_DUMP_BYTES else []))


def reason(message: str) -> str:
    """Why py-spy failed, in plain words, from what it printed."""
    low = message.lower()
    known = next((words for sign, words in _MEANINGS if sign in low), None)
    return known or "py-spy: " + printable(message.strip().partition("\n")[0], 200)
