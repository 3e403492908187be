"""The connection to the client: bodies read within bounds, answers written, and whose connection broke.

Rules: a client that is gone raises ClientGone, one that does not read ClientStalled, an engine that broke EngineBroke.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterable
from http import HTTPStatus
from typing import Any, Final

from sidecar.errors import BodiesFull, BodyTooLarge, RequestError
from sidecar.images.protocol import Data
from sidecar.relay import headers
from sidecar.relay.http.client import Request
from sidecar.relay.http.engine import Answer, EngineError
from sidecar.relay.http.head import Field
from sidecar.relay.outcomes import ClientGone, ClientStalled, EngineBroke

# Longer than people and batch jobs pause. A connection that is not read keeps a slot of the engine's batch.
CLIENT_STALL_S: Final = 600.0
MAX_PIECE_BYTES: Final = 1 << 20  # a client must read this much within its timeout when an answer is long
JSON_TYPE: Final = (b"content-type", b"application/json; charset=utf-8")


class BodyBudget:
    """The bytes of request bodies that one process may hold at once."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.held = 0

    def take(self, size: int) -> None:
        """Hold `size` more bytes. Raises BodiesFull."""
        if self.held and self.held + size > self.limit:
            raise BodiesFull("the request bodies under way fill the sidecar's memory; send the request again")
        self.held += size

    def reading(self) -> HeldBytes:
        """The bytes of one request, for a block at most."""
        return HeldBytes(self)


class HeldBytes:
    """What one request holds of a budget."""

    __slots__ = ("_budget", "size")

    def __init__(self, budget: BodyBudget) -> None:
        self._budget = budget
        self.size = 0

    def __enter__(self) -> HeldBytes:
        return self

    def __exit__(self, *_: object) -> None:
        self.release()

    def grow(self, size: int) -> None:
        """Hold at least `size` bytes in all. Raises BodiesFull."""
        if size > self.size:
            self._budget.take(size - self.size)
            self.size = size

    def release(self) -> None:
        """The bytes are needed no more."""
        self._budget.held -= self.size
        self.size = 0


async def read(request: Request, limit: int, held: HeldBytes | None = None, flag: str = "--max-body-bytes") -> bytes:
    """The whole body. Raises BodyTooLarge above `limit` bytes, which `flag` sets, and BodiesFull."""
    announced = request.fields.length() or 0
    check_size(announced, limit, flag)
    if held is not None:
        held.grow(announced)
    request.want_body()
    body, pieces, size = request.body, [], 0
    while piece := await body.next():
        size += len(piece)
        check_size(size, limit, flag)
        if held is not None:
            held.grow(size)
        pieces.append(piece)
    return pieces[0] if len(pieces) == 1 else b"".join(pieces)


def check_size(size: int, limit: int, flag: str = "--max-body-bytes") -> None:
    """Raises BodyTooLarge for more than `limit` bytes, which `flag` sets."""
    if size > limit:
        raise BodyTooLarge(f"the request body is larger than {limit} bytes ({flag})")


async def read_answer(answer: Answer) -> bytes:
    """The whole body of an answer. Raises EngineBroke if it ends early."""
    try:
        return await answer.body.read()
    except EngineError:
        raise EngineBroke("the engine's answer ended early") from None


async def drain(request: Request) -> None:
    """Wait until the client has read enough. Raises ClientGone."""
    try:
        await request.reply.drain()
    except ConnectionError:
        raise ClientGone from None


async def send_long(request: Request, groups: Iterable[list[Data]], within: float) -> None:
    """Send a body held in memory. Raises ClientStalled if the client reads nothing for `within` seconds."""
    try:
        for group in groups:
            data = memoryview(group[0] if len(group) == 1 else b"".join(group))
            for at in range(0, len(data), MAX_PIECE_BYTES):
                request.reply.write(data[at : at + MAX_PIECE_BYTES])
                async with asyncio.timeout(within):
                    await drain(request)
        request.reply.end()
    except TimeoutError:
        raise ClientStalled from None


def send_json(request: Request, value: Any, *, status: int = 200, fields: Iterable[Field] = ()) -> None:
    """Answer with JSON."""
    body = json.dumps(value).encode()
    request.reply.begin(status, HTTPStatus(status).phrase.encode(), [JSON_TYPE, *fields], body=body)


def refuse(request: Request, error: RequestError, id: str) -> None:
    """Answer with an error; where it is too late for that, hang up."""
    if request.reply.begun:
        hang_up(request)
        return
    if isinstance(error, BodyTooLarge):
        request.keep_alive = False  # the rest of the body is not worth reading
    extra = [] if error.retry_after is None else headers.retry_after(error.retry_after)
    send_json(request, error.body(), status=error.status, fields=[(b"x-request-id", id.encode()), *extra])


def hang_up(request: Request, *, at_once: bool = False) -> None:
    """Close the client's connection; `at_once`: also discard what it has not read."""
    request.connection.close(at_once=at_once)
