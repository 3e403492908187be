"""Scrapes the engine's metrics page; for an engine without one, checks whether its API responds.

- One scrape at a time and at most one per period, independent of the number of readers. The body is bounded.
- `poll` never raises: an error becomes a failed reading.
- A stale page is never passed on: a router would believe the gauges of a frozen engine.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, field
from typing import Final

import aiohttp

from sidecar.readings import Absent, EngineSample, Failed, Reading, Value
from sidecar.signals.http_body import BodyTooLong, read_body
from sidecar.signals.identify import MAX_PAGE_BYTES

# A page older than this many periods is no longer merged into the relay's page.
MAX_PAGE_AGE_PERIODS: Final = 5
_REMEDIES: Final = (
    ((400,), "; in llama.cpp's router mode each model has its own, which is not read"),
    ((401, 403), "; set --engine-key"),
    ((404, 501), "; start the engine with its metrics on (SGLang: --enable-metrics, llama.cpp: --metrics)"),
)

_log = logging.getLogger(__name__)


class _BadStatus(Exception):
    """The engine responded with this status instead of 200."""


@dataclass(eq=False)
class ScrapeSignal:
    """Scrapes `url`, the metrics page, once per `period` seconds while `run` runs.

    `parse(page)` returns the sample and raises ValueError on garbage. It is None for an engine kind without metrics:
    then any response from `url` will do, and the reading is `absent`. If the page can hang together with the engine,
    `contact` is a second URL: the API counts as blocked only if that does not respond either. The engine is not scraped
    while `sleep_state()` is not "".
    """

    url: str
    parse: Callable[[bytes], EngineSample] | None
    absent: str = "this engine has no metrics page"
    contact: str = ""
    headers: Mapping[str, str] = field(default_factory=dict)
    period: float = 1.0
    timeout: float = 2.0
    max_bytes: int = MAX_PAGE_BYTES
    sleep_state: Callable[[], str] | None = None
    clock: Callable[[], float] = time.monotonic

    def __post_init__(self) -> None:
        # Compression on loopback costs both sides more than it saves.
        self._headers = {"Accept": "text/plain;version=0.0.4", "Accept-Encoding": "identity", **self.headers}
        self._timeout = aiohttp.ClientTimeout(total=self.timeout)
        self._reading: Reading[EngineSample] = Absent("not read yet" if self.parse else self.absent)
        self._page: tuple[float, bytes] | None = None
        self.unanswered = False  # the last scrape timed out although the port accepted its connection

    def read(self) -> Reading[EngineSample]:
        """The last reading, without waiting. Its `seconds` are those of the scrape and of parsing."""
        return self._reading

    def page(self) -> str | None:
        """The last good page as text; None if there is none or it is stale."""
        if self._page is None or self.clock() - self._page[0] > MAX_PAGE_AGE_PERIODS * self.period:
            return None
        return self._page[1].decode("utf-8", "replace")

    def last_page(self, max_bytes: int) -> tuple[float, str] | None:
        """(age in seconds, first `max_bytes` as text) of the last good page, however old."""
        if self._page is None:
            return None
        return self.clock() - self._page[0], self._page[1][:max_bytes].decode("utf-8", "replace")

    async def run(self) -> None:
        """Poll until cancelled."""
        async with aiohttp.ClientSession(timeout=self._timeout, connector=aiohttp.TCPConnector(limit=1)) as session:
            while True:
                started = self.clock()
                await self.poll(session)
                # A slow engine is not scraped back to back.
                await asyncio.sleep(max(self.period / 2, started + self.period - self.clock()))

    async def poll(self, session: aiohttp.ClientSession) -> Reading[EngineSample]:
        """Scrape once; store and return the reading."""
        if self.sleep_state is not None and self.sleep_state():
            self.unanswered = False
            self._store(Absent("the engine is asleep; a scrape would wake it"))
            return self._reading
        started = self.clock()
        try:
            page = await self._fetch(session)
            if self.parse is not None:
                sample = self.parse(page)
                self._page = (self.clock(), page)  # after parsing: garbage would break the merged page
                self._store(Value(sample, at=started, seconds=self.clock() - started))
            self.unanswered = False
        except Exception as e:  # noqa: BLE001 - no page and no parser may end the control process
            self.unanswered = isinstance(e, TimeoutError) and not await self._contact_responds(session)
            if self.parse is not None:
                self._store(Failed(self._explain(e)))
        return self._reading

    async def _contact_responds(self, session: aiohttp.ClientSession) -> bool:
        if not self.contact:
            return False
        try:
            async with self._get(session, self.contact):
                return True
        except (aiohttp.ClientError, OSError):
            return False

    async def _fetch(self, session: aiohttp.ClientSession) -> bytes:
        async with self._get(session, self.url) as response:
            if response.status != 200:
                response.close()
                raise _BadStatus(response.status)
            return await read_body(response, self.max_bytes)

    def _get(self, session: aiohttp.ClientSession, url: str) -> AbstractAsyncContextManager[aiohttp.ClientResponse]:
        return session.get(url, headers=self._headers, timeout=self._timeout, allow_redirects=False)

    def _store(self, reading: Reading[EngineSample]) -> None:
        if isinstance(reading, Failed) and reading != self._reading:
            _log.warning("engine metrics: %s", reading.error)
        self._reading = reading

    def _explain(self, error: Exception) -> str:
        match error:
            case _BadStatus(args=[status]):
                remedy = next((remedy for statuses, remedy in _REMEDIES if status in statuses), "")
                return f"the metrics page answered {status}{remedy}"
            case BodyTooLong():
                return f"the metrics page is over {self.max_bytes} bytes"
            case TimeoutError():
                return f"the metrics page did not answer in {self.timeout:g} s"
            case aiohttp.ClientConnectorError():
                return "the engine refuses connections"
            case aiohttp.ClientError() | OSError():
                return f"the metrics page broke off ({type(error).__name__})"
            case ValueError():
                return "the metrics page is not Prometheus text"
            case _:
                _log.error("engine metrics: unexpected error", exc_info=error)
                return f"the metrics page could not be read ({type(error).__name__})"
