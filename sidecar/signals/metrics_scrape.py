"""The engine's own metrics page, read over HTTP; or where it has none, whether its API answers at all.

Rules: one scrape at a time and at most one per period, whoever reads us and however often; the body is bounded; no error
ever leaves `poll`, it becomes a reading that failed. An old page is not shown as a fresh one: gauges of a frozen engine
are a lie that a router would believe.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Mapping
from typing import Final

import aiohttp

from sidecar.readings import Absent, EngineSample, Failed, Reading, Value
from sidecar.signals.http_body import TooLong, whole

Parse = Callable[[bytes, float], EngineSample]

MAX_PAGE_BYTES: Final = 16 * 1024 * 1024  # a large vLLM page is 1-2 MiB
PAGE_PERIODS: Final = 5  # a page older than this many periods is no longer merged into ours

_REMEDIES: Final = {
    401: "; give the engine's key with --engine-key",
    403: "; give the engine's key with --engine-key",
    404: "; start the engine with its metrics on (SGLang: --enable-metrics, llama.cpp: --metrics)",
    501: "; start the engine with its metrics on (SGLang: --enable-metrics, llama.cpp: --metrics)",
}

_log = logging.getLogger(__name__)


class _Status(Exception):
    """The engine answered, but not with its page."""

    def __init__(self, status: int) -> None:
        super().__init__(status)
        self.status = status


class ScrapeSignal:
    """Reads `url` (the whole URL of the metrics page) once per `period` seconds while `run` runs.

    `parse(page, at)` makes the sample and raises ValueError on garbage. It is None for an engine kind without metrics: `url` is
    then only asked whether it is answered, with whatever status. Where a page can hang with the engine itself, `contact` is another
    URL of which that is asked: the API is blocked only where that is not answered either. `headers` go with each scrape, for engines that ask for a key.
    While `rests()` is not "", the engine is left alone.
    """

    def __init__(
        self,
        url: str,
        parse: Parse | None,
        *,
        contact: str = "",
        headers: Mapping[str, str] | None = None,
        period: float = 1.0,
        timeout: float = 2.0,
        max_bytes: int = MAX_PAGE_BYTES,
        rests: Callable[[], str] | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._url = url
        self._parse = parse
        self._contact = contact
        # identity: compression on loopback costs both sides more than it saves.
        self._headers = {"Accept": "text/plain;version=0.0.4", "Accept-Encoding": "identity", **(headers or {})}
        self._period = period
        self._timeout = aiohttp.ClientTimeout(total=timeout)
        self._max_bytes = max_bytes
        self._rests = rests
        self._clock = clock
        self._reading: Reading[EngineSample] = Absent("not read yet" if parse else "this engine has no metrics page")
        self._page: tuple[float, bytes] | None = None
        self.unanswered = False  # the last scrape had no answer in time, though the port took its connection

    def read(self) -> Reading[EngineSample]:
        """The last reading, at once. `seconds` of a value is what its scrape took, parsing included."""
        return self._reading

    def page(self) -> str | None:
        """The text of the last page that could be read; None when there is none or it is too old to be true."""
        if self._page is None or self._clock() - self._page[0] > PAGE_PERIODS * self._period:
            return None
        return self._page[1].decode("utf-8", "replace")

    def last_page(self, most: int) -> tuple[float, str] | None:
        """(its age in seconds, its first `most` bytes as text) of the last page that could be read, however old."""
        if self._page is None:
            return None
        return self._clock() - self._page[0], self._page[1][:most].decode("utf-8", "replace")

    async def run(self) -> None:
        """Poll until cancelled."""
        async with aiohttp.ClientSession(timeout=self._timeout, connector=aiohttp.TCPConnector(limit=1)) as session:
            while True:
                started = self._clock()
                await self.poll(session)
                # A slow engine is not scraped back to back: it rests for at least half a period.
                await asyncio.sleep(max(self._period / 2, started + self._period - self._clock()))

    async def poll(self, session: aiohttp.ClientSession) -> Reading[EngineSample]:
        """One scrape. The reading is kept, and returned."""
        if self._rests is not None and self._rests():
            self.unanswered = False
            self._keep(Absent("the engine sleeps, and is not woken to be read"))
            return self._reading
        started = self._clock()
        try:
            page = await self._fetch(session)
            if self._parse is not None:
                read = self._parse(page, started)
                self._page = (self._clock(), page)  # only once it parsed: garbage would break the merged page as well
                self._keep(Value(read, at=started, seconds=self._clock() - started))
            self.unanswered = False
        except Exception as e:  # noqa: BLE001 - whatever a page or its parser does, the control process lives on
            self.unanswered = isinstance(e, TimeoutError) and not await self._answers(session)
            if self._parse is not None:
                self._keep(Failed(self._reason(e)))
        return self._reading

    async def _answers(self, session: aiohttp.ClientSession) -> bool:
        """Whether the API answers elsewhere."""
        if not self._contact:
            return False
        try:
            async with session.get(self._contact, headers=self._headers, timeout=self._timeout, allow_redirects=False):
                return True
        except (aiohttp.ClientError, OSError):
            return False

    async def _fetch(self, session: aiohttp.ClientSession) -> bytes:
        async with session.get(
            self._url, headers=self._headers, timeout=self._timeout, allow_redirects=False
        ) as response:
            if response.status != 200:
                response.close()
                raise _Status(response.status)
            return await whole(response, self._max_bytes)

    def _keep(self, reading: Reading[EngineSample]) -> None:
        if isinstance(reading, Failed) and reading != self._reading:
            _log.warning("engine metrics: %s", reading.error)
        self._reading = reading

    def _reason(self, error: Exception) -> str:
        match error:
            case _Status(status=status):
                return f"the metrics page answered {status}" + _REMEDIES.get(status, "")
            case TooLong():
                return f"the metrics page is over {self._max_bytes} bytes"
            case TimeoutError():
                return f"the metrics page did not answer in {self._timeout.total:g} s"
            case aiohttp.ClientConnectorError():
                return "the engine refuses connections"
            case aiohttp.ClientError() | OSError():
                return f"the metrics page broke off ({type(error).__name__})"
            case ValueError():
                return "the metrics page is not Prometheus text"
            case _:
                _log.error("engine metrics: unexpected error", exc_info=error)
                return f"the metrics page could not be read ({type(error).__name__})"
