"""The live page: one HTML document, and its feed of server-sent events.

- A snapshot is rendered once for all readers, and only if there are readers.
- A slow reader skips snapshots. One that reads nothing for `write_timeout_s` is disconnected.
- Numbers are finite JSON; a value that could not be read comes with its reason.
"""

from __future__ import annotations

import asyncio
import json
import math
import re
from collections import deque
from functools import cache
from importlib.resources import files
from typing import Any, Final

import msgspec
from aiohttp import web

from sidecar.readings import Absent, Failed, Value
from sidecar.report.diagnosis_page import page_headers, source_hash
from sidecar.snapshot import Percentiles, Snapshot

MAX_READERS: Final = 32
MAX_QUEUED_EVENTS: Final = 3  # per reader
MAX_TENANTS: Final = 50  # rows of the table; the largest users come first
HISTORY_S: Final = 600
MIN_POINT_INTERVAL_S: Final = 0.5  # so that the history covers its window, however often snapshots are published
# Before that: a point each OLD_INTERVAL_S and at each change of the verdict.
OLD_S: Final = 6 * 3600
OLD_INTERVAL_S: Final = 15
MAX_OLD_POINTS: Final = 2000

# The columns of the history. A value of None is drawn as a gap.
POINT_COLUMNS: Final = (
    *("t", "state", "reason", "progress_age", "allowed", "mu_in_flight", "mu_per_minute", "utilization"),
    *("tokens_per_second", "in_flight", "waiting", "gpu"),
    *("first_token_p50", "first_token_p95", "output_token_p50", "output_token_p95"),
)
VERDICT_COLUMNS: Final = slice(1, 3)


@cache
def html() -> bytes:
    """The whole page: page.html with its style and scripts inserted at the `<!-- put NAME -->` marks."""
    folder = files("sidecar.report")
    return re.sub(
        r"<!-- put (page\.css|charts\.js|sections\.js|page\.js) -->",
        lambda mark: folder.joinpath(mark[1]).read_text("utf-8"),
        folder.joinpath("page.html").read_text("utf-8"),
    ).encode()


@cache
def headers() -> dict[str, str]:
    """Response headers of the page. Only its own scripts and style may run, by their hashes."""
    return page_headers(
        f"script-src {_hashes('script')}; style-src {_hashes('style')}; connect-src 'self'; img-src data:"
    ) | {"Cache-Control": "no-cache"}


def _hashes(tag: str) -> str:
    return " ".join(map(source_hash, re.findall(rf"<{tag}>(.*?)</{tag}>".encode(), html(), re.DOTALL)))


async def index(_request: web.Request) -> web.Response:
    return web.Response(body=html(), content_type="text/html", charset="utf-8", headers=headers())


def render(snapshot: Snapshot) -> dict[str, Any]:
    """The snapshot as plain JSON, under its field names, with readings as {"value"}, {"absent"} or {"failed"}.

    `point` is the row of the history (POINT_COLUMNS); `tenants` holds the MAX_TENANTS largest of `tenants_known`,
    which used `mu_total` MU in all.
    """
    largest = sorted(snapshot.tenants, key=lambda use: (use.mu_in_flight, use.mu_total), reverse=True)
    data: dict[str, Any] = _plain(snapshot)
    return data | {
        "point": point(snapshot),
        "tenants": _plain(largest[:MAX_TENANTS]),
        "tenants_known": len(largest),
        "mu_total": _plain(sum(use.mu_total for use in largest)),
    }


def point(snapshot: Snapshot) -> list[Any]:
    """One row of the history, in the order of POINT_COLUMNS: times in seconds, MU, MU/min, shares of 1, tokens/s."""
    load = snapshot.load
    row = (
        *(snapshot.at_wall, snapshot.verdict.state, snapshot.verdict.reason),
        *(snapshot.progress_age, snapshot.silence_allowed),
        *(load.mu_in_flight, load.mu_per_minute, load.utilization, load.tokens_per_second),
        *(load.requests_in_flight, load.requests_waiting, _gpu_utilization(snapshot)),
        *(getattr(found, name, None) for found in _latencies(snapshot) for name in ("p50", "p95")),
    )
    return [_plain(item) for item in row]


def _latencies(snapshot: Snapshot) -> tuple[Percentiles | None, Percentiles | None]:
    return snapshot.latencies.first_token, snapshot.latencies.output_token


def _gpu_utilization(snapshot: Snapshot) -> float | None:
    """Mean utilization of the GPUs that could be read, 0..1."""
    if not isinstance(snapshot.gpus, Value):
        return None
    read = [gpu.utilization.value for gpu in snapshot.gpus.value if isinstance(gpu.utilization, Value)]
    return sum(read) / len(read) if read else None


def _plain(value: Any) -> Any:
    match value:
        case None | str() | int():
            return value
        case float():
            return round(value, 6) if math.isfinite(value) else None
        case tuple() | list():
            return [_plain(item) for item in value]
        case dict():
            return {str(key): _plain(item) for key, item in value.items()}
        case Absent(reason):
            return {"absent": reason}
        case Failed(error):
            return {"failed": error}
    return {name: _plain(getattr(value, name)) for name in value.__dataclass_fields__}


def _event(name: str, data: bytes) -> bytes:
    return b"event: %b\ndata: %b\n\n" % (name.encode(), data)


def _snapshot_event(snapshot: Snapshot) -> bytes:
    # json escapes any text from outside, also a lone surrogate, at which msgspec raises
    return _event("snapshot", json.dumps(render(snapshot), separators=(",", ":"), allow_nan=False).encode())


class PageFeed:
    """Server-sent events: first `history` ({"columns", "points", "older"}), then one `snapshot` for each `publish`."""

    def __init__(self, write_timeout_s: float = 20.0) -> None:
        self._write_timeout_s = write_timeout_s
        self._readers: set[asyncio.Queue[bytes | None]] = set()
        self._points: deque[tuple[float, list[Any]]] = deque(maxlen=round(HISTORY_S / MIN_POINT_INTERVAL_S))
        self._older: deque[tuple[float, list[Any]]] = deque(maxlen=MAX_OLD_POINTS)
        self._last: Snapshot | None = None
        self._closed = False

    @property
    def readers(self) -> int:
        return len(self._readers)

    def publish(self, snapshot: Snapshot) -> None:
        """Add the snapshot to the history, and send it to all readers. Never waits."""
        self._last, points = snapshot, self._points
        if not points or snapshot.at - points[-1][0] >= MIN_POINT_INTERVAL_S:
            points.append((snapshot.at, point(snapshot)))
            while points[0][0] < snapshot.at - HISTORY_S:
                self._keep(*points.popleft())
            while self._older and self._older[0][0] < snapshot.at - OLD_S:
                self._older.popleft()
        if self._readers:
            event = _snapshot_event(snapshot)
            for reader in self._readers:
                _offer(reader, event)

    def _keep(self, at: float, row: list[Any]) -> None:
        """Keep a point that has left the history, unless it says nothing that the last one kept did not."""
        last = self._older[-1] if self._older else None
        if last is None or at - last[0] >= OLD_INTERVAL_S or last[1][VERDICT_COLUMNS] != row[VERDICT_COLUMNS]:
            self._older.append((at, row))

    def close(self) -> None:
        """End all streams, and accept no more. Call it before the server waits for its handlers."""
        self._closed = True
        for reader in self._readers:
            _offer(reader, None)

    async def events(self, request: web.Request) -> web.StreamResponse:
        """`GET /events`. 503 if there are MAX_READERS readers already, or after `close`."""
        if self._closed or self.readers >= MAX_READERS:
            text = "stopping\n" if self._closed else f"{MAX_READERS} pages are open already; close one\n"
            return web.Response(status=503, headers={"Retry-After": "5"}, text=text)
        response = web.StreamResponse(headers={"Cache-Control": "no-store", "X-Accel-Buffering": "no"})
        response.content_type = "text/event-stream"
        reader: asyncio.Queue[bytes | None] = asyncio.Queue(MAX_QUEUED_EVENTS)
        self._readers.add(reader)
        try:
            event: bytes | None = self._opening()
            await response.prepare(request)
            while event is not None:
                async with asyncio.timeout(self._write_timeout_s):
                    await response.write(event)
                event = await reader.get()
        except TimeoutError:
            if request.transport is not None:
                request.transport.abort()  # else its buffer is kept until TCP gives up
        except ConnectionError:
            pass  # the page was closed
        finally:
            self._readers.discard(reader)
        return response

    def _opening(self) -> bytes:
        points, older = ([row for _, row in kept] for kept in (self._points, self._older))
        # thousands of rows of numbers and our own codes: 2 ms of the event loop instead of 13 with json
        rows = {"columns": POINT_COLUMNS, "points": points, "older": older}
        history = _event("history", msgspec.json.encode(rows))
        return history + (_snapshot_event(self._last) if self._last else b"")


def _offer(reader: asyncio.Queue[bytes | None], event: bytes | None) -> None:
    """Queue an event; if the queue is full the oldest one is dropped, so that a slow page shows the present."""
    if reader.full():
        reader.get_nowait()
    reader.put_nowait(event)
