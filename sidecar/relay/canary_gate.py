"""Calls that stop the engine's work wait for the canary that is with it.

SGLang ends its process if its memory is released while a request runs, and a canary is one. Control sends none while
such a call is announced, and says when the last one is over.
"""

from __future__ import annotations

import asyncio
from contextlib import suppress
from typing import Final

from sidecar.events import CanariesOver

# A healthy engine has answered its canary by then; a hung one must not delay the call longer.
CANARY_WAIT_S: Final = 3.0


class CanaryGate:
    """The announced calls of one relay process, by id."""

    def __init__(self) -> None:
        self._waiting: dict[int, asyncio.Future[None]] = {}

    async def wait(self, call: int) -> None:
        """Wait until no canary is with the engine, for CANARY_WAIT_S at most. The call is announced already."""
        over = self._waiting[call] = asyncio.get_running_loop().create_future()
        try:
            with suppress(TimeoutError):
                await asyncio.wait_for(over, CANARY_WAIT_S)
        finally:
            del self._waiting[call]

    def on_command(self, command: CanariesOver) -> None:
        """No canary is with the engine, and none will be while these calls are."""
        for call in command.calls:
            if (over := self._waiting.get(call)) is not None and not over.done():
                over.set_result(None)
