"""An engine of exact bytes."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress

from .wire import END_ANSWER, MAX_HEAD_BYTES, Address, Message, read_request

Talk = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]
# the answer to a request, or a function of the request; in pieces if it is written in several steps
Script = bytes | tuple[bytes, ...] | Callable[[Message], bytes | tuple[bytes, ...]]
StartRaw = Callable[[Talk], Awaitable[tuple[Address, Address]]]  # the fixture `raw`


class RawEngine:
    """Reads whole requests, notes them in `requests`, and writes its script; `closes` the connection after each."""

    def __init__(self, script: Script, *, closes: bool = False) -> None:
        self._script = script
        self._closes = closes
        self.requests: list[Message] = []

    def take(self) -> list[Message]:
        """The requests since the last call."""
        taken, self.requests = self.requests, []
        return taken

    async def __call__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while (message := await read_request(reader)) is not None:
            if message.target == b"/end":
                writer.write(END_ANSWER)
                break
            self.requests.append(message)
            for piece in self._pieces(message):
                writer.write(piece)
                await writer.drain()
                await asyncio.sleep(0)  # other tasks read it
            if self._closes or message.is_last:
                break

    def _pieces(self, message: Message) -> tuple[bytes, ...]:
        answer = self._script(message) if callable(self._script) else self._script
        return (answer,) if isinstance(answer, bytes) else answer


@asynccontextmanager
async def listening(talk: Talk) -> AsyncIterator[Address]:
    """The address of a server that runs `talk` for each connection; what is still open is cut at the end."""
    open_tasks: dict[asyncio.Task[None], asyncio.StreamWriter] = {}

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        open_tasks[task] = writer
        try:
            with suppress(ConnectionError, asyncio.CancelledError):
                await talk(reader, writer)
        finally:
            writer.close()
            del open_tasks[task]

    server = await asyncio.start_server(serve, "127.0.0.1", 0, limit=MAX_HEAD_BYTES)
    try:
        yield server.sockets[0].getsockname()
    finally:
        server.close()
        tasks = list(open_tasks)
        for task, writer in list(open_tasks.items()):
            writer.transport.abort()
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await asyncio.sleep(0)  # the transports close their sockets
