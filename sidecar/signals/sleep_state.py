"""Whether the engine reports that it sleeps or is paused.

- It is polled at most once per `period`, less often as `pace` says. A path that the engine does not have is not
  requested again.
- `denied` are the reasons whose own sign was answered with no.
- Without a response for SLEEP_STATE_STALE_S the state is unknown, and unknown is not asleep.
- `poll` never raises.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Final

import aiohttp

from sidecar.engines.engine_type import KindSign
from sidecar.signals.contact_pace import ContactPace
from sidecar.signals.http_body import read_body

SLEEP_POLL_INTERVAL_S: Final = 2.0
SLEEP_POLL_TIMEOUT_S: Final = 2.0
SLEEP_STATE_STALE_S: Final = 10.0
# llama.cpp's /props contains a chat template.
MAX_SLEEP_ANSWER_BYTES: Final = 1 << 20
MISSING_STATUSES: Final = (401, 403, 404, 405, 501)


@dataclass(eq=False, slots=True)
class SleepSignal:
    """Polls the `signs` of the engine at base URL `engine`."""

    session: aiohttp.ClientSession
    engine: str
    signs: tuple[KindSign, ...]
    headers: Mapping[str, str]
    period: float = SLEEP_POLL_INTERVAL_S
    pace: ContactPace = field(default_factory=ContactPace)
    clock: Callable[[], float] = time.monotonic
    denied: dict[str, float] = field(default_factory=dict, init=False)  # reason code -> when its sign was asked last
    _state: str = field(default="", init=False)
    _at: float = field(default=0.0, init=False)

    def read(self) -> str:
        """The reason code of the sleep or pause; "" if the engine is awake, has no such sign, or no longer responds."""
        return self._state if self.clock() - self._at <= SLEEP_STATE_STALE_S else ""

    async def run(self) -> None:
        """Poll until cancelled, or until no sign is left."""
        while self.signs:
            await self.poll()
            await self.pace.rest(self.period)

    async def poll(self) -> str:
        """Poll each sign once."""
        for sign in self.signs:
            asleep = await self._request(sign)
            if asleep is None:
                return self.read()
            if asleep:
                self._state, self._at = sign.means, self.clock()
                return self._state
        self._state = ""
        return ""

    async def _request(self, sign: KindSign) -> bool | None:
        """Whether one sign is set; None without a usable response."""
        began, timeout = self.clock(), aiohttp.ClientTimeout(total=SLEEP_POLL_TIMEOUT_S)
        try:
            async with self.session.get(self.engine + sign.path, headers=self.headers, timeout=timeout) as response:
                if response.status in MISSING_STATUSES:
                    self.signs = tuple(other for other in self.signs if other != sign)
                    return False
                if response.status != 200:
                    return None
                state = json.loads(await read_body(response, MAX_SLEEP_ANSWER_BYTES))
        except (aiohttp.ClientError, OSError, ValueError, RecursionError):
            return None
        answer = state.get(sign.key) if isinstance(state, dict) else None
        if answer is False:
            self.denied[sign.means] = began
        return answer is True
