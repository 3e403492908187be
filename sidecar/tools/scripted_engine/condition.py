"""Wait for a condition over shared state on one event loop: every change notifies, waiters check again."""

from __future__ import annotations

import asyncio
from collections.abc import Callable


class EngineCondition:
    """A condition variable. No change is missed: there is no await between the check and the wait."""

    def __init__(self) -> None:
        self._changed_event = asyncio.Event()

    def notify(self) -> None:
        """Wake all waiters: the state has changed."""
        self._changed_event.set()
        self._changed_event = asyncio.Event()

    async def next(self) -> None:
        """Wait for the next change."""
        await self._changed_event.wait()

    async def until(self, ready: Callable[[], bool]) -> None:
        """Wait until `ready()` is true; return at once if it already is."""
        while not ready():
            await self._changed_event.wait()
