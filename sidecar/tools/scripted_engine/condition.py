"""Waiting for a condition over shared state on one event loop: whoever changes the state rings, waiters look again."""

from __future__ import annotations

import asyncio
from collections.abc import Callable


class EngineCondition:
    """A bell. No change between a look and the wait can be missed: both happen without an await between them."""

    def __init__(self) -> None:
        self._changed_event = asyncio.Event()

    def notify(self) -> None:
        """The state has changed."""
        self._changed_event.set()
        self._changed_event = asyncio.Event()

    async def next(self) -> None:
        """Wait for the next change."""
        await self._changed_event.wait()

    async def until(self, ready: Callable[[], bool]) -> None:
        """Wait until `ready()` holds; at once where it already does."""
        while not ready():
            await self._changed_event.wait()
