"""What must be the same, direct and through a relay: all but our own headers and what RFC 9112 leaves to each hop."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field

from .raw_engine import RawEngine
from .wire import END, Address, Answer, Headers, Message, ask

HOP_BY_HOP = frozenset(
    [b"connection", b"keep-alive", b"te", b"transfer-encoding", b"upgrade"]
    + [b"proxy-" + name for name in (b"connection", b"authenticate", b"authorization")]
)
OURS = frozenset((b"x-request-id", b"endpoint-load-metrics"))
OUR_PREFIXES = (b"x-sidecar-", b"x-forwarded-")
# the relay may answer 100-continue itself, and its own length of a body follows from how it sends it
FREE_IN_REQUESTS = frozenset((b"host", b"expect"))
LENGTH = frozenset((b"content-length",))


@dataclass(frozen=True, slots=True)
class Sides:
    """One engine, its own address and that of a relay in front of it."""

    engine: RawEngine
    direct: Address
    relayed: Address

    async def compare(self, *pieces: bytes) -> Comparison:
        """Send one request both ways, and assert that engine and client see the same."""
        compared = await self.ask_both(*pieces)
        compared.assert_same_requests()
        compared.assert_same_answers()
        return compared

    async def ask_both(self, *pieces: bytes) -> Comparison:
        """Send one request both ways."""
        self.engine.take()
        direct = await ask(self.direct, *pieces, ends=END)
        asked_directly = self.engine.take()
        relayed = await ask(self.relayed, *pieces, ends=END)
        return Comparison(direct, relayed, asked_directly, self.engine.take())


StartSides = Callable[..., Awaitable[Sides]]  # the fixture `sides`


@dataclass(frozen=True, slots=True)
class Comparison:
    """What client and engine saw on either way."""

    direct: Answer
    relayed: Answer
    asked_directly: list[Message] = field(default_factory=list)
    asked_by_relay: list[Message] = field(default_factory=list)

    def assert_same_requests(self) -> None:
        """The engine saw the same requests."""
        assert len(self.asked_by_relay) == len(self.asked_directly)
        for direct, relayed in zip(self.asked_directly, self.asked_by_relay, strict=True):
            assert_same_request(direct, relayed)

    def assert_same_answers(self) -> None:
        """The client saw the same answer."""
        assert_same_answer(self.direct, self.relayed)


def assert_same_request(direct: Message, relayed: Message, *, free: frozenset[bytes] = frozenset()) -> None:
    """The engine cannot tell them apart; `free` names more headers that may differ."""
    free |= FREE_IN_REQUESTS | (LENGTH if direct.is_chunked or relayed.is_chunked else frozenset())
    assert (relayed.method, relayed.target) == (direct.method, direct.target)
    assert end_to_end(relayed, free) == end_to_end(direct, free)
    assert relayed.body == direct.body
    assert relayed.trailers == direct.trailers


def assert_same_answer(direct: Answer, relayed: Answer, *, free: frozenset[bytes] = frozenset()) -> None:
    """The client cannot tell them apart; `free` names more headers that may differ."""
    assert direct.is_in_sync and relayed.is_in_sync, relayed.rest[:200]
    assert [_status(m) for m in relayed.interim] == [_status(m) for m in direct.interim]
    assert [end_to_end(m) for m in relayed.interim] == [end_to_end(m) for m in direct.interim]
    if direct.final is None or relayed.final is None:
        assert relayed.final is direct.final
        return
    assert _status(relayed.final) == _status(direct.final)
    free |= LENGTH if _has_free_length(direct.final) else frozenset()
    assert end_to_end(relayed.final, free) == end_to_end(direct.final, free)
    assert relayed.final.is_whole == direct.final.is_whole
    assert relayed.final.body == direct.final.body
    assert relayed.final.trailers == direct.final.trailers


def end_to_end(message: Message, free: frozenset[bytes] = frozenset()) -> Headers:
    """The headers that must pass, in order, names and values as they were written."""
    named = {token.strip().lower() for token in message.value(b"connection").split(b",")}
    dropped = HOP_BY_HOP | OURS | free | (named - LENGTH)
    return tuple(
        (name, value)
        for name, value in message.headers
        if name.lower() not in dropped and not name.lower().startswith(OUR_PREFIXES)
    )


def _status(message: Message) -> tuple[int, bytes]:
    return message.status, b" ".join(message.start.split(b" ")[2:])


def _has_free_length(final: Message) -> bool:
    """Whether the engine gave its body no length, so that the relay may choose how to end it."""
    return bool(final.body) and (final.is_chunked or not final.all(b"content-length"))
