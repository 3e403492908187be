"""The render workers of a process: a queue in front of them, a deadline for each request, another for one that died.

Rules: the event loop only carries bytes. What waits is bounded. A worker that is late is killed and replaced: then a
template, or a text, costs more than any prompt should. A worker whose request was cancelled is killed too, as its
answer would be taken for the next one's.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import sys
from asyncio.subprocess import PIPE, Process
from dataclasses import asdict
from typing import Any, Final

from sidecar import errors
from sidecar.errors import Internal, NotRendered, PromptRejected, RenderBusy, StartError
from sidecar.render.protocol import LENGTHS, RenderCall, RenderSettings, frame
from sidecar.runtime.limited_log import LimitedLog

# A prompt of 100,000 tokens takes some 0.1 s.
DEADLINE_S: Final = 10.0
START_TIMEOUT_S: Final = 120.0
MAX_WAITING: Final = 256
# What the interpreter and the linker read. Other variables, which may hold secrets, are left out.
WORKER_VARIABLES: Final = (
    "PATH",
    "HOME",
    "TMPDIR",
    "TZ",
    "LANG",
    "LC_",
    "LD_",
    "PYTHON",
    "VIRTUAL_ENV",
    "MALLOC_",
    "GLIBC_",
)

_log = logging.getLogger(__name__)

ERRORS: Final = {error.code: error for error in (NotRendered, PromptRejected, Internal)}


class RenderWorkers:
    """`count` workers that render by `settings`. An async context manager; entering waits for the first of them."""

    def __init__(
        self,
        settings: RenderSettings,
        count: int,
        *,
        deadline: float = DEADLINE_S,
        max_waiting: int = MAX_WAITING,
    ) -> None:
        self.no_images = ""
        self._settings = settings
        self._count = count
        self._deadline = deadline
        self._max_waiting = max_waiting
        self._waiting = 0
        self._idle: asyncio.Queue[Process] = asyncio.Queue()
        self._processes: set[Process] = set()
        self._starting: set[asyncio.Task[None]] = set()
        self._limited_log = LimitedLog(_log)

    async def __aenter__(self) -> RenderWorkers:
        """Start the workers. Raises StartError where the model's files do not allow it."""
        try:
            self._idle.put_nowait(await self._start())
        except BaseException:
            await self.__aexit__()
            raise
        for _ in range(self._count - 1):
            self._replace()
        return self

    async def __aexit__(self, *_: object) -> None:
        for task in self._starting:
            task.cancel()
        await asyncio.gather(*self._starting, return_exceptions=True)
        for process in list(self._processes):
            await self._end(process)

    async def render(self, call: RenderCall, body: bytes) -> bytes:
        """The answer as JSON. Raises RenderBusy, or what the renderer raises."""
        if self._waiting >= self._max_waiting:
            raise RenderBusy("all render workers are busy; send the request again")
        self._waiting += 1
        try:
            async with asyncio.timeout(self._deadline):
                process = await self._idle.get()
        except TimeoutError:
            raise RenderBusy("no render worker became free in time; send the request again") from None
        finally:
            self._waiting -= 1
        try:
            async with asyncio.timeout(self._deadline):
                head, made = await _ask(process, asdict(call), body)
        except BaseException as e:
            await self._end(process)
            self._replace()
            if isinstance(e, TimeoutError):
                raise NotRendered(f"rendering took longer than {self._deadline:g} s") from None
            if isinstance(e, OSError | EOFError | ValueError):
                self._limited_log.error("died", "a render worker died; it is replaced")
                raise NotRendered("the render worker died of this request") from None
            raise
        self._idle.put_nowait(process)
        if head["status"] == 200:
            return made
        raise ERRORS.get(head["code"], errors.Internal)(made.decode())

    def _replace(self) -> None:
        task = asyncio.create_task(self._restart())
        self._starting.add(task)
        task.add_done_callback(self._starting.discard)

    async def _restart(self) -> None:
        while True:
            try:
                self._idle.put_nowait(await self._start())
                return
            except StartError as e:
                self._limited_log.error("start", "a render worker does not start: %s", e)
                await asyncio.sleep(5.0)

    async def _start(self) -> Process:
        """A worker that has loaded the model's files. Raises StartError."""
        command = (sys.executable, "-m", "sidecar.render.worker", str(os.getpid()))
        environ = {name: value for name, value in os.environ.items() if name.startswith(WORKER_VARIABLES)}
        process = await asyncio.create_subprocess_exec(*command, stdin=PIPE, stdout=PIPE, env=environ)
        self._processes.add(process)
        try:
            async with asyncio.timeout(START_TIMEOUT_S):
                head, _ = await _ask(process, {"settings": asdict(self._settings)}, b"")
        except (OSError, EOFError, TimeoutError, ValueError):
            await self._end(process)
            raise StartError("a render worker ended while it was starting; see the log lines above") from None
        except asyncio.CancelledError:
            await self._end(process)
            raise
        if "error" in head:
            await self._end(process)
            raise StartError(head["error"])
        self.no_images = head["no_images"]
        return process

    async def _end(self, process: Process) -> None:
        """End a worker at once."""
        self._processes.discard(process)
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        await process.wait()


async def _ask(process: Process, head: dict[str, Any], body: bytes) -> tuple[dict[str, Any], bytes]:
    """A worker's answer to a frame. Raises OSError, EOFError or ValueError if it dies."""
    assert process.stdin is not None and process.stdout is not None
    process.stdin.writelines(frame(head, body))
    await process.stdin.drain()
    lengths = await process.stdout.readexactly(LENGTHS.size)
    head_size, body_size = LENGTHS.unpack(lengths)
    text = await process.stdout.readexactly(head_size)
    return json.loads(text), await process.stdout.readexactly(body_size)
