"""Show the live state of the engine in a terminal: verdict, requests, tokens, latencies, GPUs, tenants.

    sidecar top                          q ends it
    sidecar top --count 1 | tee now.txt  without a terminal: text without colours, once unless --count says more

It asks the sidecar's admin port once an --interval and sends nothing else. What it keeps is bounded: HISTORY updates.
"""

from __future__ import annotations

import json
import os
import select
import shutil
import signal
import sys
import termios
import textwrap
import time
import tty
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Final, NoReturn

from sidecar.flags import address, flag, integer, number
from sidecar.settings import Settings
from sidecar.tools import terminal
from sidecar.tools.admin_port import NoAnswer, fetch_status
from sidecar.tools.status import NOT_KNOWN, headline, origin
from sidecar.tools.terminal import amount, paint, safe, span

HISTORY: Final = 240
BARS: Final = "▁▂▃▄▅▆▇█"
MAX_BARS: Final = 60
FILE_CHARS: Final = 2000  # width of what is no terminal: no line is cut
LABEL_CHARS, VALUE_CHARS = 13, 30
# Alternate screen, hidden cursor; and back.
ENTER, LEAVE = "\x1b[?1049h\x1b[?25l", "\x1b[?25h\x1b[?1049l"
HOME, CLEAR_LINE, CLEAR_BELOW = "\x1b[H", "\x1b[K", "\x1b[J"
LIMITS: Final = {"stock": "MU in flight", "flow": "MU per minute", "kv": "KV cache", "ttft": "first token"}
QUIT: Final = (b"q", b"Q", b"\x1b", b"\x03", b"\x04")


@dataclass(frozen=True, slots=True)
class TopSettings:
    """Settings of `sidecar top`."""

    admin: tuple[str, int] = flag(Settings().admin, address, "Admin address of the sidecar")
    interval: float = flag(1.0, number(0.2, 3600, "seconds"), "Time between two updates")
    count: int = flag(0, integer(0, 1_000_000), "Updates to show; 0: until q on a terminal, elsewhere one")


@dataclass(frozen=True, slots=True)
class Update:
    """One answer of the sidecar, or why there is none; `at` is on the monotonic clock."""

    at: float
    status: Mapping[str, Any] | None
    trouble: str = ""


def main(settings: TopSettings, as_json: bool = False) -> int:
    """Show updates until the user, --count or the reader ends it. Returns 0, or 3 where the last had no answer."""
    on_screen = terminal.is_terminal(sys.stdout) and not as_json
    terminal.replace_unknown(sys.stdout)
    count = settings.count or (0 if on_screen else 1)
    try:
        if on_screen:
            with _screen() as keys:
                return _watch(settings, count, keys)
        return _print(settings, count, as_json)
    except KeyboardInterrupt:
        return 0
    except BrokenPipeError:  # the reader has seen enough: `sidecar top --count 100 | head -1`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


def ask(settings: TopSettings) -> Update:
    """The present."""
    try:
        return Update(time.monotonic(), fetch_status(settings.admin))
    except NoAnswer as e:
        return Update(time.monotonic(), None, str(e))


def _print(settings: TopSettings, count: int, as_json: bool) -> int:
    """Text or lines of JSON, one after the other."""
    past: deque[Update] = deque(maxlen=HISTORY)
    for turn in range(count):
        if turn:
            time.sleep(settings.interval)
        past.append(ask(settings))
        if as_json:
            print(json.dumps(past[-1].status or {"state": None, "error": past[-1].trouble}), flush=True)
        else:
            print("\n".join(frame(past, width=FILE_CHARS, colours=False)), flush=True)
    return 0 if past[-1].status else NOT_KNOWN


def _watch(settings: TopSettings, count: int, keys: int | None) -> int:
    """The screen, redrawn with each update."""
    past: deque[Update] = deque(maxlen=HISTORY)
    shown, colours = 0, terminal.has_colours(sys.stdout)
    while True:
        past.append(ask(settings))
        shown += 1
        size = shutil.get_terminal_size()
        lines = frame(past, width=size.columns, colours=colours)[: max(1, size.lines - 1)]
        hint = paint("q quits", "dim", on=colours)
        text = "".join(f"{line}{CLEAR_LINE}\r\n" for line in lines) + hint + CLEAR_BELOW
        sys.stdout.write(HOME + text)
        sys.stdout.flush()
        if shown == count or _is_quit_within(settings.interval, keys):
            return 0 if past[-1].status else NOT_KNOWN


def _is_quit_within(seconds: float, keys: int | None) -> bool:
    """Wait; whether a key ended it. A terminal that is gone ends it, too."""
    ends = time.monotonic() + seconds
    while (left := ends - time.monotonic()) > 0:
        if keys is None:
            time.sleep(left)
        elif select.select([keys], [], [], left)[0]:
            typed = os.read(keys, 64)
            if not typed or typed in QUIT:
                return True
    return False


@contextmanager
def _screen() -> Iterator[int | None]:
    """The terminal's other screen, with keys at once; whatever ends this restores the terminal.

    Yields where keys are read, or None if standard input is no terminal.
    """
    keys = sys.stdin.fileno() if sys.stdin.isatty() else None
    before = termios.tcgetattr(keys) if keys is not None else None
    signals = {number: signal.signal(number, _end) for number in (signal.SIGTERM, signal.SIGHUP)}
    signals[signal.SIGTSTP] = signal.signal(signal.SIGTSTP, signal.SIG_IGN)  # it would leave this screen to the shell
    try:
        if keys is not None:
            tty.setcbreak(keys)
        sys.stdout.write(ENTER)
        yield keys
    finally:
        sys.stdout.write(LEAVE)
        sys.stdout.flush()
        if keys is not None and before is not None:
            termios.tcsetattr(keys, termios.TCSADRAIN, before)
        for number, handler in signals.items():
            signal.signal(number, handler)


def _end(*_: object) -> NoReturn:
    raise KeyboardInterrupt


# --- what is shown: pure ---


def frame(past: Sequence[Update], *, width: int, colours: bool) -> list[str]:
    """The lines of one update, each at most `width` characters; the newest update is the last of `past`."""
    now = past[-1]
    known = next((update for update in reversed(past) if update.status), None)
    lines: list[tuple[str, tuple[str, ...]]] = []
    if now.trouble:
        lines += [(text, ("bold", "red")) for text in textwrap.wrap(now.trouble, width)]
    if known is None or known.status is None:
        return [_fit(text, width, styles, colours) for text, styles in lines]
    status = known.status
    if now.trouble:
        lines.append((f"below is what it said {span(now.at - known.at)} ago", ("bold",)))
    state_colour = terminal.STATES.get(str(status.get("state")), terminal.STATES["unknown"])[1]
    lines += [
        (f"{headline(status, colours=False)}  {_probes_text(status)}", ("bold", state_colour)),
        (origin(status), ()),
        *((text, ()) for text in textwrap.wrap(safe(status.get("detail") or status.get("reason")), width)),
    ]
    if act := status.get("operator_must_act"):
        lines += [(text, ("bold", "red")) for text in textwrap.wrap(f"an operator must act: {safe(act)}", width)]
    lines.append(("", ()))
    room = max(0, min(MAX_BARS, width - LABEL_CHARS - VALUE_CHARS - 2))
    for label, text, values in _rows(status, past):
        chart = bars(values[-room:]) if room else ""
        lines.append((f"{label:<{LABEL_CHARS}}{text:<{VALUE_CHARS}}  {chart}".rstrip(), ()))
    lines += _table("GPU", _gpus(status))
    lines += _table("tenant", _tenants(status))
    lines += _table("since", _changes(status))
    return [_fit(text, width, styles, colours) for text, styles in lines]


def bars(values: Sequence[float | None]) -> str:
    """Values as bars of eight heights, the largest the highest; a gap for None."""
    most = max((value for value in values if value is not None), default=0.0)
    step = most / (len(BARS) - 1) or 1.0
    return "".join(" " if value is None else BARS[round(max(0.0, value) / step)] for value in values)


def _rows(status: Mapping[str, Any], past: Sequence[Update]) -> Iterator[tuple[str, str, list[float | None]]]:
    """Label, present value and history of each number."""
    found = status.get("requests") or {}
    requests = f"{amount(found.get('in_flight', 0))} in flight, {amount(found.get('waiting', 0))} waiting"
    yield "requests", requests, _history(past, "requests", "in_flight")
    ends = f"{amount(found.get('per_second', 0))}/s ended, {amount(found.get('errors_per_second', 0))}/s failed"
    yield "", ends, _history(past, "requests", "per_second")
    tokens = f"{amount(status.get('tokens_per_second') or 0)} per second"
    yield "tokens", tokens, _history(past, "tokens_per_second")
    for label, key in (("first token", "first_token"), ("per token", "output_token")):
        times = status.get(key)
        text = f"{span(times['p50'])}, p95 {span(times['p95'])}" if times else "none in the last minute"
        yield label, text, _history(past, key, "p95")
    part = str(status.get("limited_by"))
    load = f"{status.get('utilization') or 0:.0%}, limited by {LIMITS.get(part, safe(part))}"
    yield "load", load, _history(past, "utilization")
    age, allowed = status.get("silence"), status.get("silence_allowed") or 0
    silence = "nothing outstanding" if age is None else f"{span(age)} of {span(allowed)} allowed"
    yield "silence", silence, _history(past, "silence")


def _history(past: Sequence[Update], *keys: str) -> list[float | None]:
    """One number of each update; None where there is none."""
    found: list[float | None] = []
    for update in past:
        value: Any = update.status
        for key in keys:
            value = value.get(key) if isinstance(value, Mapping) else None
        found.append(float(value) if isinstance(value, int | float) else None)
    return found


def _probes_text(status: Mapping[str, Any]) -> str:
    probes = status.get("probes") or {}
    words = [f"{name} {'passes' if passes else 'FAILS'}" for name, passes in probes.items()]
    return "  ".join([*words, *(["draining"] if status.get("draining") else [])])


def _gpus(status: Mapping[str, Any]) -> list[tuple[str, ...]]:
    gpus = status.get("gpus")
    if not gpus:
        return [(safe(status.get("gpus_absent") or "the driver lists none"),)]

    def memory(gpu: Mapping[str, Any]) -> str:
        used, total = (read(gpu, f"memory_{what}_bytes", "{:.0f}", 2**30) for what in ("used", "total"))
        return f"{used} of {total} GiB"

    def read(gpu: Mapping[str, Any], key: str, form: str, scale: float = 1.0) -> str:
        value = gpu.get(key)
        return "-" if value is None else form.format(value / scale)

    return [
        (
            safe(f"{gpu.get('index')} {gpu.get('name')}"),
            read(gpu, "utilization", "{:.0%} busy"),
            memory(gpu),
            read(gpu, "power_watts", "{:.0f} W"),
            read(gpu, "temperature_celsius", "{:.0f} °C"),
        )
        for gpu in gpus
    ]


def _tenants(status: Mapping[str, Any]) -> list[tuple[str, ...]]:
    return [
        (
            safe(use.get("tenant", "")),
            f"{amount(use.get('in_flight', 0))} in flight",
            f"{amount(use.get('mu_in_flight', 0))} MU",
            f"{amount(use.get('requests_total', 0))} requests, {amount(use.get('mu_total', 0))} MU in all",
        )
        for use in status.get("tenants") or []
    ]


def _changes(status: Mapping[str, Any]) -> list[tuple[str, ...]]:
    return [
        (
            time.strftime("%H:%M:%S", time.localtime(change.get("since", 0))),
            safe(change.get("state", "")),
            safe(change.get("reason", "")),
        )
        for change in status.get("changes") or []
    ]


def _table(title: str, rows: Sequence[tuple[str, ...]]) -> list[tuple[str, tuple[str, ...]]]:
    """A heading and aligned rows; nothing without rows."""
    if not rows:
        return []
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    return [("", ()), (title, ("dim",)), *((line, ()) for line in lines)]


def _fit(text: str, width: int, styles: tuple[str, ...], colours: bool) -> str:
    """A line that does not wrap."""
    cut = text if len(text) <= width else text[: max(0, width - 1)] + "…"
    return paint(cut, *styles, on=colours and bool(cut))
