"""What a process had gathered when it was killed is read by the other side: each record once, none cut in half."""

from __future__ import annotations

import asyncio
import os
import socket
import sys
from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st

from sidecar.control.relay_pool import RelayPool
from sidecar.events import Event, Heartbeat
from sidecar.runtime import unsent_records
from sidecar.runtime.unsent_records import MAX_BYTES, UnsentRecords


@given(
    st.lists(st.tuples(st.binary(min_size=1, max_size=40), st.booleans()), max_size=30),
    st.integers(0, 100),
)
def test_what_was_received_and_the_rest_are_the_stream(lines: list[tuple[bytes, bool]], in_flight: int) -> None:
    """After any lines, of which some were sent and the last bytes of those may not have been read."""
    path = f"/tmp/unsent-{os.getpid()}"
    written = UnsentRecords(path)
    written.begin()
    stream, sent = b"", 0
    kept_since = 0
    for line, sends in lines:
        assert written.keep(line)
        stream += line
        if sends:
            kept_since, sent = sent, len(stream)
            if in_flight % 2:  # the process may be killed between sending and forgetting
                written.forget(sent)
                kept_since = sent
    received = max(kept_since, sent - in_flight)
    assert stream[:received] + unsent_records.rest(path, received) == stream
    assert not Path(path).exists()


def test_a_line_without_room_is_refused_and_the_others_stay(tmp_path: Path) -> None:
    """The file is bounded."""
    path = str(tmp_path / "unsent")
    written = UnsentRecords(path)
    written.begin()
    assert written.keep(b"first\n")
    assert not written.keep(b"x" * MAX_BYTES)
    assert written.keep(b"second\n")
    assert unsent_records.rest(path, 0) == b"first\nsecond\n"


def test_no_file_no_rest(tmp_path: Path) -> None:
    """A process that could make none, or a link in its place."""
    assert unsent_records.rest(str(tmp_path / "absent"), 0) == b""
    (tmp_path / "link").symlink_to("/etc/passwd")
    assert unsent_records.rest(str(tmp_path / "link"), 0) == b""


RELAY = """
import asyncio, os, signal, sys
from sidecar.events import Heartbeat, RelayConnected
from sidecar.relay.control_link import ControlLink

async def relay():
    link = ControlLink(sys.argv[1], lambda at: RelayConnected(at, 0, os.getpid(), 0))
    running = asyncio.ensure_future(link.run())
    order = asyncio.ensure_future(asyncio.get_running_loop().run_in_executor(None, sys.stdin.readline))
    while not order.done():
        link.send(Heartbeat(-1.0, 0.0, 0))
        await asyncio.wait((order,), timeout=0.02)
    for at in range(100):
        link.send(Heartbeat(float(at), 0.0, 0))
    os.kill(os.getpid(), signal.SIGKILL)

asyncio.run(relay())
"""


async def test_a_relay_killed_before_it_sent_anything_loses_nothing(tmp_path: Path) -> None:
    """A real process: it connects, is known, queues events and is killed in the same moment."""
    joining = socket.socket(socket.AF_UNIX)
    joining.bind(str(tmp_path / "control"))
    joining.listen()
    got: list[float] = []
    known, lost = asyncio.Event(), asyncio.Event()

    def take(_: int, event: Event) -> None:
        assert isinstance(event, Heartbeat)
        got.append(event.at)
        known.set()

    pool = RelayPool(1, take, lambda _: lost.set())
    serving = asyncio.ensure_future(pool.run(joining))
    relay = await asyncio.create_subprocess_exec(
        sys.executable, "-c", RELAY, str(tmp_path / "control"), stdin=asyncio.subprocess.PIPE
    )
    await known.wait()
    await relay.communicate(b"go\n")
    await lost.wait()
    serving.cancel()
    await asyncio.wait((serving,))
    assert [at for at in got if at >= 0.0] == [float(at) for at in range(100)]
    assert not os.access(unsent_records.path(str(tmp_path / "control"), relay.pid), os.F_OK)
