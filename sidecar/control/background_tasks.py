"""Background tasks of the control loop: at most one per name; every failure is reported.

A failure is reported to the task's starter, so that nothing waits for it forever, and logged once per place, as type,
file and line, because a message could hold what a user sent.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import logging
import threading
from collections.abc import Callable, Coroutine
from contextlib import suppress
from typing import Any, Final, TypeVar

from sidecar.errors import place_of

MAX_LOGGED_ERRORS: Final = 50  # different errors that are logged

_log = logging.getLogger(__name__)

T = TypeVar("T")
OnFailure = Callable[[str], None]  # called with a code: "TypeError", "cancelled"


async def run_abandonable(call: Callable[[], T]) -> T:
    """The result of a blocking call on a thread of its own, which nothing waits for once its caller is cancelled.

    For calls to servers, which may hang: the end of a process waits for the threads of asyncio.to_thread.
    """
    done = concurrent.futures.Future[T]()

    def work() -> None:
        try:
            result = call()
        except BaseException as e:  # noqa: BLE001  raised where it is awaited
            with suppress(concurrent.futures.InvalidStateError):
                done.set_exception(e)
        else:
            with suppress(concurrent.futures.InvalidStateError):  # no caller is waiting any more
                done.set_result(result)

    threading.Thread(target=work, name="abandonable", daemon=True).start()
    return await asyncio.wrap_future(done)


class BackgroundTasks:
    """The tasks of one process. `start` returns at once; `close` ends and awaits them."""

    def __init__(self) -> None:
        self._running: dict[str, asyncio.Task[None]] = {}
        self._logged: set[str] = set()
        self._closing = False

    def start(self, name: str, work: Coroutine[Any, Any, None], on_failure: OnFailure | None = None) -> bool:
        """Start a task unless one of that name still runs: a slow disk must not pile them up. Returns True if started.

        `on_failure` is called if it ends in any other way than by returning, or by `close`.
        """
        before = self._running.get(name)
        if self._closing or (before is not None and not before.done()):
            work.close()
            return False
        task = asyncio.create_task(work, name=name)
        task.add_done_callback(lambda ended: self._on_end(name, ended, on_failure))
        self._running[name] = task
        return True

    async def close(self) -> None:
        """Cancel what is under way, and await it."""
        self._closing = True
        for task in self._running.values():
            task.cancel()
        await asyncio.gather(*self._running.values(), return_exceptions=True)

    def _on_end(self, name: str, task: asyncio.Task[None], on_failure: OnFailure | None) -> None:
        raised = None if task.cancelled() else task.exception()
        if raised is None and (self._closing or not task.cancelled()):
            return
        error, place = (type(raised).__name__, place_of(raised)) if raised else ("cancelled", "nowhere")
        line = f"background task {name} failed: {error} at {place}"
        if line not in self._logged and len(self._logged) < MAX_LOGGED_ERRORS:
            self._logged.add(line)
            _log.error("%s (logged once)", line)
        if on_failure is not None:
            on_failure(error)
