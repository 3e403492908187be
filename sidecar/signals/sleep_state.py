"""Whether the engine says that it rests on purpose: asleep, or paused.

Rules: asked gently, never more than once in `period`; a path that the engine does not have is not asked again; what is not
answered is unknown after a while, and unknown is not rest. No error leaves `poll`.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Callable, Mapping
from typing import Final

import aiohttp

from sidecar.engines.engine_type import KindSign
from sidecar.signals.http_body import whole

SLEEP_POLL_INTERVAL_S: Final = 2.0
SLEEP_POLL_TIMEOUT_S: Final = 2.0
SLEEP_STATE_STALE_S: Final = (
    10.0  # seconds without an answer, after which a rest that was read is not believed any more
)
MAX_SLEEP_ANSWER_BYTES: Final = 1 << 20  # llama.cpp's /props holds a chat template
MISSING: Final = (401, 403, 404, 405, 501)


class SleepSignal:
    """Reads `signs` of the engine at base URL `engine`."""

    def __init__(
        self,
        session: aiohttp.ClientSession,
        engine: str,
        signs: tuple[KindSign, ...],
        headers: Mapping[str, str],
        *,
        period: float = SLEEP_POLL_INTERVAL_S,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._session = session
        self._engine = engine
        self._signs = signs
        self._headers = headers
        self._period = period
        self._clock = clock
        self._state, self._at = "", 0.0

    def read(self) -> str:
        """The reason code of the rest, or "" where the engine is awake, does not say, or no longer answers."""
        return self._state if self._clock() - self._at <= SLEEP_STATE_STALE_S else ""

    async def run(self) -> None:
        """Poll until cancelled, or until the engine has none of the signs."""
        while self._signs:
            await self.poll()
            await asyncio.sleep(self._period)

    async def poll(self) -> str:
        """Ask once."""
        for sign in self._signs:
            resting = await self._ask(sign)
            if resting is None:
                return self.read()
            if resting:
                self._state, self._at = sign.means, self._clock()
                return self._state
        self._state = ""
        return ""

    async def _ask(self, sign: KindSign) -> bool | None:
        """What one sign says; None where it was not answered."""
        timeout = aiohttp.ClientTimeout(total=SLEEP_POLL_TIMEOUT_S)
        try:
            async with self._session.get(self._engine + sign.path, headers=self._headers, timeout=timeout) as response:
                if response.status in MISSING:
                    self._signs = tuple(one for one in self._signs if one != sign)
                    return False
                if response.status != 200:
                    return None
                said = json.loads(await whole(response, MAX_SLEEP_ANSWER_BYTES))
        except (aiohttp.ClientError, OSError, ValueError, RecursionError):
            return None
        return isinstance(said, dict) and said.get(sign.key) is True
