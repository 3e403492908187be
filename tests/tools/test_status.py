"""`sidecar status` and `sidecar top` against a real admin port, and what they make of any status."""

from __future__ import annotations

import asyncio
import fcntl
import json
import os
import pty
import re
import select
import signal
import struct
import subprocess
import sys
import termios
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web

from sidecar import __main__
from sidecar.events import State
from sidecar.readings import Absent
from sidecar.report import status_json
from sidecar.snapshot import Percentiles, PodNames, RecentLatencies, TenantUse
from sidecar.tools import status, terminal, top
from sidecar.tools.top import Update, bars, frame

from ..report.conftest import moment, verdict
from ..waiting import PATIENCE

SIDECAR = str(Path(sys.executable).parent / "sidecar")


def shown(state: State = "progressing", *, ready: bool = True, **changed: Any) -> dict[str, Any]:
    """A status as the admin port renders it."""
    snapshot = replace(
        moment(60.0),
        verdict=verdict(state, "no_progress", f"{state} because of the script", -132.0),
        place=PodNames("llm-0", "serving", "node-7"),
        models=("qwen", "lora-a"),
        engine_version="0.32.0",
        probes=(("live", ready), ("ready", ready), ("startup", True)),
        latencies=RecentLatencies(Percentiles(0.21, 0.8, 40), Percentiles(0.021, 0.03, 38)),
    )
    return status_json.render(replace(snapshot, **changed))


class Port:
    """An HTTP server on its own port, in a thread, that answers /status with `answer` (a body and a status)."""

    def __init__(self) -> None:
        self.answer: tuple[str, int] = json.dumps(shown()), 200
        self.asked = 0
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever)
        self._thread.start()
        self._runner = self._call(self._start())
        self.admin = f"127.0.0.1:{self._runner.addresses[0][1]}"

    def close(self) -> None:
        self._call(self._runner.cleanup())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def _call(self, work: Any) -> Any:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(PATIENCE)

    async def _start(self) -> web.AppRunner:
        async def answer(_: web.Request) -> web.Response:
            self.asked += 1
            return web.Response(text=self.answer[0], status=self.answer[1])

        app = web.Application()
        app.router.add_get("/status", answer)
        runner = web.AppRunner(app, access_log=None)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        return runner


@pytest.fixture
def port() -> Iterator[Port]:
    running = Port()
    try:
        yield running
    finally:
        running.close()


# --- status ---


@pytest.mark.parametrize(
    ("state", "ready", "code", "words"),
    [
        ("progressing", True, 0, "● progressing for 3 min 12 s: 7 requests (2 waiting), 500 tok/s"),
        ("idle", True, 0, "○ idle"),
        ("suspect", False, 1, "▲ suspect for 3 min 12 s: not ready, suspect because of the script"),
        ("stalled", False, 1, "■ stalled for 3 min 12 s: not ready, stalled because of the script"),
        ("starting", False, 1, "◔ starting"),
        ("exempt", False, 1, "◇ exempt"),
        ("unknown", True, 3, "? unknown for 3 min 12 s: not judged, unknown because of the script"),
    ],
)
def test_a_status_is_one_line_and_an_exit_code(
    state: State, ready: bool, code: int, words: str, port: Port, capsys: pytest.CaptureFixture[str]
) -> None:
    """0 ready, 1 not, 3 not known; the line says what, since when and where, without colours in a pipe."""
    port.answer = json.dumps(shown(state, ready=ready)), 200
    assert __main__.run(["status", "--admin", port.admin]) == code
    out = capsys.readouterr().out
    assert out.startswith(words) and out.count("\n") == 1 and "\x1b" not in out
    assert out.endswith("; vllm 0.32.0, qwen and 1 more on serving/llm-0 (node-7)\n")


def test_a_drain_and_an_escalation_are_said(port: Port, capsys: pytest.CaptureFixture[str]) -> None:
    """Not ready because it drains, and that a person has to act."""
    port.answer = json.dumps(shown("idle", ready=False, draining=True, handover="useless_restarts")), 200
    assert __main__.run(["status", "--admin", port.admin]) == 1
    out = capsys.readouterr().out
    assert "not ready, draining, 7 requests" in out and "an operator must act: useless_restarts" in out


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        (("no page", 404), "the sidecar's --admin address, not the relay's"),
        (('{"status": "ok"}', 200), "not as a sidecar does"),
        (("[1, 2", 200), "not as a sidecar does"),
    ],
)
def test_another_server_is_not_taken_for_a_sidecar(
    answer: tuple[str, int], words: str, port: Port, capsys: pytest.CaptureFixture[str]
) -> None:
    """Whatever answers there, the exit code is 3, and the line says what to do."""
    port.answer = answer
    assert __main__.run(["status", "--admin", port.admin]) == 3
    out = capsys.readouterr().out
    assert words in out and out.count("\n") == 1


def test_json_is_what_the_port_says(port: Port, capsys: pytest.CaptureFixture[str]) -> None:
    """--json prints all of /status."""
    assert __main__.run(["status", "--json", "--admin", port.admin]) == 0
    assert json.loads(capsys.readouterr().out) == json.loads(json.dumps(shown()))


def test_the_address_is_that_of_the_sidecars_settings(
    port: Port, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Inside a pod the variables of `sidecar run` are enough, and its other settings are no error."""
    monkeypatch.setenv("SIDECAR_ADMIN", port.admin)
    monkeypatch.setenv("SIDECAR_ENGINE", "http://127.0.0.1:8000")
    assert __main__.run(["status"]) == 0


def test_texts_from_outside_cannot_command_the_terminal() -> None:
    """Names of tenants and models, and details with errors of engines, are shown without control characters."""
    evil = "\x1b]0;owned\x07\x1b[2J\r\nname"
    tenants = (TenantUse(evil, 1, 1.0, 1.0, 1, 1, ()),)
    snapshot = shown("stalled", ready=False, tenants=tenants, models=(evil,), gpus=Absent(evil), handover=evil)
    snapshot["detail"] = evil
    lines = [status.line(snapshot, colours=False), *frame([Update(1.0, snapshot)], width=500, colours=False)]
    assert [line for line in lines if not line.isprintable()] == []
    assert sum("owned" in line for line in lines) >= 5


def test_spans_and_amounts_are_short() -> None:
    """Three digits and a unit, at the borders too."""
    spans = {0.0: "0 ms", 0.21: "210 ms", 1: "1 s", 4.23: "4.2 s", 59.6: "1 min", 192: "3 min 12 s", 7500: "2 h 5 min"}
    assert {seconds: terminal.span(seconds) for seconds in spans} == spans
    assert terminal.span(86_400 * 3 + 4 * 3600 + 59) == "3 d 4 h"
    amounts = {
        0: "0",
        4.2: "4.2",
        87: "87",
        820.4: "820",
        12_345: "12.3k",
        4_100_000: "4.1M",
        41e6: "41M",
        0.083: "0.08",
    }
    assert {value: terminal.amount(value) for value in amounts} == amounts


@pytest.mark.parametrize(
    ("env", "expected"),
    [({"TERM": "xterm"}, True), ({"TERM": "dumb"}, False), ({"TERM": "xterm", "NO_COLOR": "1"}, False)],
)
def test_colours_are_for_terminals(env: dict[str, str], expected: bool) -> None:
    """Neither a dumb terminal nor NO_COLOR gets colours; a real pseudo-terminal does, a pipe never."""
    code = "import sys; from sidecar.tools.terminal import has_colours; sys.exit(has_colours(sys.stdout))"
    clean = {name: value for name, value in os.environ.items() if name not in ("TERM", "NO_COLOR")} | env
    main, side = pty.openpty()
    try:
        assert subprocess.run([sys.executable, "-c", code], stdout=side, env=clean, check=False).returncode == expected
        piped = subprocess.run([sys.executable, "-c", code], capture_output=True, env=clean, check=False)
        assert piped.returncode == 0
    finally:
        os.close(main), os.close(side)


# --- top ---


def test_without_a_terminal_top_prints_once(port: Port, capsys: pytest.CaptureFixture[str]) -> None:
    """In a pipe: one update as text, no command for a terminal; --count asks for more."""
    assert __main__.run(["top", "--admin", port.admin]) == 0
    out = capsys.readouterr().out
    assert port.asked == 1 and "\x1b" not in out
    for words in ("progressing for 3 min 12 s  live passes", "7 in flight, 2 waiting", "210 ms, p95 800 ms", "acme"):
        assert words in out
    assert __main__.run(["top", "--admin", port.admin, "--json", "--count", "2", "--interval", "0.2"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [json.loads(line)["state"] for line in lines] == ["progressing"] * 2


def test_a_reader_that_has_enough_ends_it(port: Port) -> None:
    """`sidecar top --count 1000 | head -1` ends without a traceback."""
    command = f"{SIDECAR} top --count 1000 --interval 0.2 --admin {port.admin} | head -1"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=PATIENCE, check=True)
    assert done.stderr == "" and "progressing" in done.stdout


@pytest.mark.parametrize("width", [1, 20, 80, 200])
def test_no_line_is_wider_than_the_terminal(width: int) -> None:
    """Also with long texts, and after an answer that did not come."""
    long = shown("stalled", ready=False, handover="x" * 300)
    long["detail"] = "because of this and that " * 30
    past = deque([Update(1.0, long), Update(2.0, None, "no answer " * 30)], maxlen=top.HISTORY)
    lines = frame(past, width=width, colours=False)
    assert max(map(len, lines)) <= width


def test_what_was_known_stays_when_the_sidecar_is_away() -> None:
    """The last state is shown as old, below why there is no newer one; without any, only why."""
    lines = frame([Update(1.0, shown()), Update(9.0, None, "no answer")], width=80, colours=False)
    assert lines[:2] == ["no answer", "below is what it said 8 s ago"] and "progressing" in lines[2]
    assert frame([Update(9.0, None, "no answer")], width=80, colours=False) == ["no answer"]


def test_bars_show_heights_and_gaps() -> None:
    """The largest is the highest; nothing is a gap and no zero."""
    assert bars([0.0, None, 4.0, 8.0]) == "▁ ▅█"
    assert bars([0.0, 0.0]) == "▁▁" and bars([]) == "" and bars([None]) == " "


class Terminal:
    """A command in a pseudo-terminal of 24 lines."""

    def __init__(self, *command: str) -> None:
        self._main, side = pty.openpty()
        fcntl.ioctl(side, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
        self.before = termios.tcgetattr(side)
        self._side = side
        env = os.environ | {"TERM": "xterm"}
        self.process = subprocess.Popen(command, stdin=side, stdout=side, stderr=side, env=env, start_new_session=True)
        self.seen = b""

    def until(self, is_there: Callable[[bytes], object]) -> None:
        """Read what the command draws until it is there."""
        ends = time.monotonic() + PATIENCE
        while not is_there(self.seen):
            assert time.monotonic() < ends, self.seen
            if select.select([self._main], [], [], 0.1)[0]:
                self.seen += os.read(self._main, 65_536)

    def type(self, keys: bytes) -> None:
        os.write(self._main, keys)

    def end(self) -> int:
        """The exit code; what it wrote last is read."""
        code = self.process.wait(PATIENCE)
        while select.select([self._main], [], [], 0)[0]:
            self.seen += os.read(self._main, 65_536)
        return code

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self._main), os.close(self._side)

    @property
    def is_restored(self) -> bool:
        """Whether cursor, screen and keys are as before."""
        return self.seen.endswith(top.LEAVE.encode()) and termios.tcgetattr(self._side) == self.before


@pytest.mark.parametrize("end", ["q", "interrupt", "terminate", "count"])
def test_top_on_a_terminal_leaves_it_as_it_was(end: str, port: Port) -> None:
    """Whatever ends it: the screen, the cursor and the keys come back, and the exit code is 0."""
    count = ["--count", "3"] if end == "count" else []
    screen = Terminal(SIDECAR, "top", "--admin", port.admin, "--interval", "0.2", *count)
    try:
        screen.until(lambda seen: seen.count(top.HOME.encode()) >= 2)
        assert screen.seen.startswith(top.ENTER.encode()) and b"\x1b[1;32m" in screen.seen
        if end == "q":
            screen.type(b"q")
        elif end != "count":
            screen.process.send_signal(signal.SIGINT if end == "interrupt" else signal.SIGTERM)
        assert screen.end() == 0
        assert screen.is_restored and b"Traceback" not in screen.seen
        drawn = screen.seen.split(top.HOME.encode())[1]
        assert len(re.findall(rb"\r\n", drawn)) < 24, "no frame is longer than the terminal"
    finally:
        screen.close()
