"""The wire between processes."""

from __future__ import annotations

import asyncio
import socket

import pytest

from sidecar import events
from sidecar.runtime import codec
from sidecar.runtime.channel import Channel

RECORDS = [
    events.Admitted("r1", 1.5, "acme", "m", "chat", True, events.RequestSize(10, 2, 3, 4, 1), 16, 0.25, None),
    events.Admitted(
        "r2",
        2.0,
        "acme",
        "m",
        "chat",
        False,
        events.RequestSize(1),
        None,
        0.1,
        events.Trace("a" * 32, "b" * 16, "", True),
    ),
    events.FirstToken("r1", 2.5),
    events.Delivered("r1", 3.0, 2, 80),
    events.Settled("r1", 4.0, "ok", 200, events.Usage(10, 3, 2), 3, 120, 2.5, 1.6, 0.0004),
    events.Settled("r2", 4.0, "lost", 0, None, 0, 0, None, None, 0.0, "relay_died"),
    events.ImagePrepared("r1", 2.0, "jpeg", "ok", 0.02, (("decode", 0.006), ("resize", 0.004)), 1000, 2000),
    events.EnginePauseChanged(1.0, "engine_paused", True),
    events.Directing(1.0, 3, "weight_update", False, True),
    events.UnreadRequest("r3", 1.0, True),
    events.UnreadRequest("r3", 2.0, False, 200),
    events.Heartbeat(1.0, 0.001, 3),
    events.MetricsPageRequested(1.0),
    events.MetricsPage(1.0, 'a{b="ü\n"} 1\n'),
    events.LoadReport("JSON {}", "TEXT a=1", "idle"),
    events.SettlementsAcked(30),
    events.RelayConnected(1.0, 0, 77, 2),
    events.LoadSubscribed(1.0, 78),
]


@pytest.mark.parametrize("record", RECORDS, ids=lambda r: type(r).__name__)
def test_every_record_survives_the_wire(record: events.Event | events.Command) -> None:
    """decode(encode(x)) == x for every kind of record, nested ones and None included, on one line."""
    line = codec.encode(record)
    assert line.count(b"\n") == 1
    assert codec.decode(line) == record


@pytest.mark.parametrize(
    "line",
    [b"", b"{}", b"[]", b'["No one",1]', b'["Pulse",1]', b"\xff", b'["Admitted",1,2]', b'["Heartbeat",' + b"[" * 9999],
)
def test_garbage_is_an_error_of_its_own(line: bytes) -> None:
    """Whatever is no record raises WireError and nothing else."""
    with pytest.raises(codec.WireError):
        codec.decode(line)


async def test_a_record_that_no_line_can_hold_costs_no_other() -> None:
    """Lone surrogates, which JSON text of a client may hold, drop their own record; the rest of the batch arrives."""
    left, right = socket.socketpair()
    got: list[object] = []
    closed = asyncio.Event()
    await Channel.open(right, got.append, closed.set)
    writer = await Channel.open(left, got.append, lambda: None)
    for record in (RECORDS[0], events.LoadReport("\ud800", "", "idle"), RECORDS[1]):
        writer.send(record)
    writer.close()
    await closed.wait()
    assert got == [RECORDS[0], RECORDS[1]]


async def test_channel_delivers_in_order_and_reports_the_end() -> None:
    """Records arrive whole and in order; garbage between them is dropped; the end is reported once."""
    left, right = socket.socketpair()
    got: list[object] = []
    closed = asyncio.Event()
    await Channel.open(right, got.append, closed.set)
    writer = await Channel.open(left, got.append, lambda: None)
    for record in RECORDS[:3]:
        writer.send(record)
    assert writer._transport is not None
    writer._transport.write(b"garbage\n")
    for record in RECORDS[3:]:
        writer.send(record)
    writer.close()
    await closed.wait()
    writer.send(RECORDS[0])  # which raises nothing although there is no reader
    assert got == RECORDS
