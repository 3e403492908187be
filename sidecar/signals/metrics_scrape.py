"""Scrapes the engine's metrics page; for an engine without one, checks whether its API responds.

- One scrape at a time and at most one per period, independent of the number of readers. The body is bounded. Each one
  has a connection of its own: a kept one may belong to the one API process of several that hangs.
- A slow page is waited for. Whether the API is blocked is meanwhile asked by a second, cheap request.
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
from sidecar.signals.contact_pace import ContactPace
from sidecar.signals.http_body import BodyTooLong, read_body
from sidecar.signals.identify import MAX_PAGE_BYTES

PAGE_TIMEOUT_S: Final = 15.0
# For a page that waits for a batch, which may take so long on a CPU.
BATCH_TIMEOUT_S: Final = 60.0
# A page that is outstanding for longer than this is slow; an API that answers nothing for as long is blocked.
CONTACT_TIMEOUT_S: Final = 2.0
# An older page is no reading any more, and is not merged into the relay's page.
MAX_PAGE_AGE_S: Final = 10.0
# Where an ASGI application is mounted at /metrics, the page is at /metrics/ (vLLM 0.5).
MAX_REDIRECTS: Final = 2
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
    """Scrapes `url`, the metrics page, once per `period` seconds while `run` runs, less often as `pace` says.

    `parse(page)` returns the sample and raises ValueError on garbage. It is None for an engine kind without metrics:
    then any response from `url` will do, and the reading is `absent`. `contact` is the URL of the cheap request that
    any API process answers. `explain(error)` is the trouble of a connection. The engine is not scraped while
    `sleep_state()` is not "".
    """

    url: str
    parse: Callable[[bytes], EngineSample] | None
    absent: str = "this engine has no metrics page"
    contact: str = ""
    headers: Mapping[str, str] = field(default_factory=dict)
    period: float = 1.0
    timeout: float = PAGE_TIMEOUT_S
    contact_timeout: float = CONTACT_TIMEOUT_S
    max_bytes: int = MAX_PAGE_BYTES
    sleep_state: Callable[[], str] | None = None
    explain: Callable[[BaseException], str] = lambda _: ""
    pace: ContactPace = field(default_factory=ContactPace)
    clock: Callable[[], float] = time.monotonic

    def __post_init__(self) -> None:
        # Compression on loopback costs both sides more than it saves.
        self._headers = {"Accept": "text/plain;version=0.0.4", "Accept-Encoding": "identity", **self.headers}
        self._reading: Reading[EngineSample] = Absent("not read yet" if self.parse else self.absent)
        self._page: tuple[float, bytes] | None = None
        self._has_page = asyncio.Event()  # a good page was read
        self._asked_at: float | None = None  # since when a page has been awaited in vain
        self.unanswered = False  # the port accepts connections, and nothing at all answers on them
        self.trouble = ""  # why no connection can be made; see EngineAddress

    def read(self) -> Reading[EngineSample]:
        """The last reading, without waiting. Its `seconds` are those of the scrape and of parsing."""
        reading = self._reading
        if self.unanswered and self.parse is not None:
            return Failed("the engine accepts connections and answers nothing")
        if isinstance(reading, Value) and self.clock() - reading.at > MAX_PAGE_AGE_S:
            return Failed(f"the metrics page has not answered for {MAX_PAGE_AGE_S:g} s")
        return reading

    @property
    def is_late(self) -> bool:
        """Whether the page has been awaited for longer than it is worth."""
        return self._asked_at is not None and self.clock() - self._asked_at > MAX_PAGE_AGE_S

    def page(self) -> str | None:
        """The last good page as text; None if there is none or it is stale."""
        if self._page is None or self.clock() - self._page[0] > MAX_PAGE_AGE_S:
            return None
        return self._page[1].decode("utf-8", "replace")

    def last_page(self, max_bytes: int) -> tuple[float, str] | None:
        """(age in seconds, first `max_bytes` as text) of the last good page, however old."""
        if self._page is None:
            return None
        return self.clock() - self._page[0], self._page[1][:max_bytes].decode("utf-8", "replace")

    async def first_page(self) -> bytes:
        """The last good page, once there is one."""
        await self._has_page.wait()
        assert self._page is not None
        return self._page[1]

    async def run(self, session: aiohttp.ClientSession) -> None:
        """Poll until cancelled. `session` keeps no connection."""
        while True:
            started = self.clock()
            await self.poll(session)
            # A slow engine is not scraped back to back.
            await self.pace.rest(max(self.period / 2, started + self.period - self.clock()))

    async def poll(self, session: aiohttp.ClientSession) -> Reading[EngineSample]:
        """Scrape once; store and return the reading."""
        if self.sleep_state is not None and self.sleep_state():
            self.unanswered, self._asked_at = False, None
            self._store(Absent("the engine is asleep; a scrape would wake it"))
            return self._reading
        started = self.clock()
        self._asked_at = started if self._asked_at is None else self._asked_at
        watching = asyncio.create_task(self._watch_contact(session))
        try:
            page = await self._fetch(session)
            if self.parse is not None:
                sample = self.parse(page)
                now = self.clock()
                self._page = (now, page)  # after parsing: garbage would break the merged page
                self._store(Value(sample, at=now, seconds=now - started))
                self._has_page.set()
                if sample.running or sample.waiting:
                    self.pace.worked()
            self.unanswered, self._asked_at, self.trouble = False, None, ""
        except Exception as e:  # noqa: BLE001 - no page and no parser may end the control process
            self._fail(e)
        finally:
            watching.cancel()
            await asyncio.wait((watching,))
        return self._reading

    def _fail(self, error: Exception) -> None:
        if not isinstance(error, TimeoutError):  # else what the contact said last holds
            self.unanswered, self._asked_at = False, None
        trouble, before = self.explain(error), self.trouble
        self.trouble = trouble
        if self.parse is not None:
            self._store(Failed(trouble or self._explain(error)))
        elif trouble and trouble != before:
            _log.warning("%s", trouble)

    async def _watch_contact(self, session: aiohttp.ClientSession) -> None:
        """While the page is outstanding, find out whether anything at all answers."""
        while True:
            await asyncio.sleep(self.contact_timeout)
            self.unanswered = not await self._contact_responds(session)

    async def _contact_responds(self, session: aiohttp.ClientSession) -> bool:
        """Whether the contact responds; a refused connection is not a blocked API either."""
        try:
            async with self._get(session, self.contact or self.url, self.contact_timeout):
                return True
        except TimeoutError:
            return False
        except (aiohttp.ClientError, OSError) as e:
            return isinstance(e, aiohttp.ClientConnectorError)

    async def _fetch(self, session: aiohttp.ClientSession) -> bytes:
        async with self._get(session, self.url, self.timeout, max_redirects=MAX_REDIRECTS) as response:
            if response.status != 200:
                response.close()
                raise _BadStatus(response.status)
            return await read_body(response, self.max_bytes)

    def _get(
        self, session: aiohttp.ClientSession, url: str, seconds: float, *, max_redirects: int = 0
    ) -> AbstractAsyncContextManager[aiohttp.ClientResponse]:
        timeout, follow = aiohttp.ClientTimeout(total=seconds), max_redirects > 0
        return session.get(
            url, headers=self._headers, timeout=timeout, allow_redirects=follow, max_redirects=max_redirects
        )

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
