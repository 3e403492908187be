"""What takes time beside the ticks, as tasks: one of each name at a time, and none ends unseen.

Rules: an errand that breaks, or is cancelled by anybody but us, is told to whoever sent it, so that nobody waits for it for
ever; its error is logged once per place, as type, file and line, because a message could hold what a user sent.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Coroutine
from typing import Any, Final

from sidecar.errors import place_of

MAX_TASKS: Final = 50  # different errors that are logged

_log = logging.getLogger(__name__)

Broken = Callable[[str], None]  # takes what broke, as a code: "TypeError", "cancelled"


class BackgroundTasks:
    """The tasks of one process. `start` returns at once; `close` ends and awaits them."""

    def __init__(self) -> None:
        self._running: dict[str, asyncio.Task[None]] = {}
        self._logged: set[str] = set()
        self._closing = False

    def start(self, name: str, errand: Coroutine[Any, Any, None], broken: Broken | None = None) -> bool:
        """Start a task unless its like is still under way: a slow disk must not pile them up. Whether it was started.

        `broken` is called when it ends in any other way than by returning, or by `close`.
        """
        if self._closing or self.running(name):
            errand.close()
            return False
        task = asyncio.create_task(errand, name=name)
        task.add_done_callback(lambda ended: self._ended(name, ended, broken))
        self._running[name] = task
        return True

    def running(self, name: str) -> bool:
        """Whether one of that name is under way."""
        task = self._running.get(name)
        return task is not None and not task.done()

    async def close(self) -> None:
        """Cancel what is under way, and await it."""
        self._closing = True
        for task in self._running.values():
            task.cancel()
        await asyncio.gather(*self._running.values(), return_exceptions=True)

    def _ended(self, name: str, task: asyncio.Task[None], broken: Broken | None) -> None:
        if task.cancelled():
            if not self._closing:
                self._report(name, "cancelled", "nowhere", broken)
        elif (error := task.exception()) is not None:
            self._report(name, type(error).__name__, place_of(error), broken)

    def _report(self, name: str, what: str, place: str, broken: Broken | None) -> None:
        line = f"{name} broke unexpectedly: {what} at {place}"
        if line not in self._logged and len(self._logged) < MAX_TASKS:
            self._logged.add(line)
            _log.error("%s (logged once)", line)
        if broken is not None:
            broken(what)
