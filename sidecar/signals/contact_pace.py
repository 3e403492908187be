"""How often the engine is asked: less often once it has been idle for a while, and as usual at once when work comes.

Canaries keep their own times: it is they that find the hang of an idle engine.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Final

IDLE_AFTER_S: Final = 60.0
# Also the time in which work is noticed that did not come through the relay.
IDLE_INTERVAL_S: Final = 5.0


@dataclass(eq=False, slots=True)
class ContactPace:
    """The pace of one engine. `busy` is set while work or a doubt is known, and cleared when there is none."""

    busy: asyncio.Event = field(default_factory=asyncio.Event)
    clock: Callable[[], float] = time.monotonic
    idle_interval: float = IDLE_INTERVAL_S
    _worked_at: float = field(init=False)

    def __post_init__(self) -> None:
        self._worked_at = self.clock()

    @property
    def is_idle(self) -> bool:
        """Whether there has been no work for IDLE_AFTER_S."""
        return not self.busy.is_set() and self.clock() - self._worked_at >= IDLE_AFTER_S

    def worked(self) -> None:
        """The engine was seen at work."""
        self._worked_at = self.clock()

    async def rest(self, seconds: float) -> None:
        """Wait `seconds`; of an idle engine up to `idle_interval`, or until work comes."""
        await asyncio.sleep(seconds)
        if self.busy.is_set():
            self.worked()
        if not self.is_idle:
            return
        try:
            async with asyncio.timeout(max(0.0, self.idle_interval - seconds)):
                await self.busy.wait()
        except TimeoutError:
            pass
