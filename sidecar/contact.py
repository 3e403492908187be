"""Our own contact with the engine: which kind it is, its metrics, its canary.

The kind is found once, when the engine first answers; until then there is nothing to read and nothing to send. What the
engine refuses to say leaves it `openai`, the kind of which nothing is assumed.
"""

from __future__ import annotations

import asyncio
import logging
from functools import partial

import aiohttp

from sidecar.engine import kinds, sample
from sidecar.engine.kinds import KINDS, EngineKind
from sidecar.facts import Absent, EngineSample, Reading
from sidecar.settings import Settings
from sidecar.signals.canary import CanarySignal
from sidecar.signals.scrape import ScrapeSignal

MEETING = ("/v1/models", "/metrics")
MAX_PAGE = 16 << 20
RETRY = 1.0  # seconds between attempts to meet the engine
ATTEMPTS = 3  # answers that say nothing, before the kind is `openai`

_log = logging.getLogger(__name__)


class Contact:
    """One engine. `canary` is None until its kind is known."""

    def __init__(self, session: aiohttp.ClientSession, chosen: Settings) -> None:
        self._session = session
        self._settings = chosen
        self._headers = {"authorization": f"Bearer {chosen.engine_key}"} if chosen.engine_key else {}
        self._scrape: ScrapeSignal | None = None
        self.kind: EngineKind | None = None if chosen.engine_kind == "auto" else KINDS[chosen.engine_kind]
        self.canary: CanarySignal | None = None

    @property
    def kind_name(self) -> str:
        """The engine's kind; "auto" until it is known."""
        return self.kind.name if self.kind else "auto"

    def read(self) -> Reading[EngineSample]:
        """The last reading of the engine's metrics."""
        return self._scrape.read() if self._scrape else Absent("the engine has not answered yet")

    @property
    def unanswered(self) -> bool:
        """Whether the engine takes connections and answers nothing on them: its API's loop is blocked, or all of it hangs."""
        return self._scrape is not None and self._scrape.unanswered

    def page(self) -> str | None:
        """The engine's own metrics page, if a fresh one was read."""
        return self._scrape.page() if self._scrape else None

    def last_page(self, most: int) -> tuple[float, str] | None:
        """(age in seconds, first `most` bytes) of the last metrics page of the engine, however old."""
        return self._scrape.last_page(most) if self._scrape else None

    def engine_restarted(self) -> None:
        """The engine is another process now, which may serve another model."""
        if self.canary is not None:
            self.canary.forget_model()

    async def run(self, opened: asyncio.Event) -> None:
        """Wait until the engine's port is open, meet it, then scrape it until cancelled."""
        if not opened.is_set():
            _log.info("engine %s: not there yet; trying again every second", self._settings.engine)
        await opened.wait()
        if self.kind is None:
            self.kind = KINDS[await self._recognise()]
            _log.info("engine %s: recognised as %s", self._settings.engine, self.kind.name)
        make = partial(kinds.canary, self.kind)
        self.canary = CanarySignal(
            self._session, self._settings.engine, make, self._headers, self._settings.canary_model
        )
        url = self._settings.engine + self.kind.metrics_path if self.kind.series else ""
        self._scrape = ScrapeSignal(url, partial(_parse, self.kind), headers=self._headers)
        await self._scrape.run()

    async def _recognise(self) -> str:
        """Ask until it says what it is; an engine that answers and says nothing is taken for `openai`."""
        silent = 0
        while True:
            pages = {path: body for path in MEETING if (body := await self._get(path)) is not None}
            name = kinds.recognise(pages)
            silent += "/v1/models" in pages
            if name != "openai" or silent >= ATTEMPTS:
                return name
            await asyncio.sleep(RETRY)

    async def _get(self, path: str) -> bytes | None:
        timeout = aiohttp.ClientTimeout(total=5)
        try:
            async with self._session.get(
                self._settings.engine + path, headers=self._headers, timeout=timeout
            ) as answer:
                return await answer.content.read(MAX_PAGE) if answer.status == 200 else None
        except (aiohttp.ClientError, OSError, TimeoutError):
            return None


def _parse(kind: EngineKind, page: bytes, at: float) -> EngineSample:
    return sample.parse(page, kind)
