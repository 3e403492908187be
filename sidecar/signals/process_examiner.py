"""An engine that was found stalled, examined before anybody kills it: two looks and two stack dumps of its processes, 5 s apart.

Rules: at most one at a time, all of it within 10 s, and what is known after each step is handed over at once, because the kill
may come in between. /proc is read on a thread that is left behind when it hangs (a process that the kernel holds can block even
`ps`); nothing here waits without a bound, and nothing touches the engine's processes.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import asdict
from typing import Any, Final, TypeVar

from sidecar.readings import Absent, Failed
from sidecar.signals import engine_processes, stack_dump
from sidecar.signals.process_state import EngineProcess, ProcessEvidence, ProcessLook, summary, symptom

GAP: Final = 5.0  # seconds between the two rounds
ROUND: Final = 4.0  # most seconds that the dumps of a round may take together
LOOKING: Final = 2.0  # most seconds that /proc may take to answer
MAX_DUMPED: Final = 12  # processes: the core and eight workers, an API, and some
AT_ONCE: Final = 2  # dumps at once: the sidecar has few cores, and the engine's must not be taken from it


T = TypeVar("T")
Keep = Callable[[dict[str, Any]], Awaitable[None]]  # takes what is known so far


class HangProofThread:
    """Asks the machine what may never be answered, on a thread that is then left behind; while one is held, no other starts."""

    def __init__(self, seconds: float = LOOKING) -> None:
        self._seconds = seconds
        self._held = False

    async def ask(self, call: Callable[[], T]) -> T | Failed:
        """What `call` returns, within `seconds`; why there is no answer."""
        if self._held:
            return Failed(
                "/proc has not answered since an earlier look: the kernel holds one of the engine's processes"
            )
        loop = asyncio.get_running_loop()
        answer: asyncio.Future[T | Failed] = loop.create_future()

        def tell(result: T | Failed) -> None:
            self._held = False
            if not answer.done():
                answer.set_result(result)

        def work() -> None:
            try:
                result: T | Failed = call()
            except Exception as e:  # noqa: BLE001 - whatever the machine does, the bundle says it and goes on
                result = Failed(f"the engine's processes could not be looked at ({type(e).__name__})")
            with suppress(RuntimeError):  # the loop is closed: nobody waits any more
                loop.call_soon_threadsafe(tell, result)

        self._held = True
        threading.Thread(target=work, name="engine-processes", daemon=True).start()
        try:
            async with asyncio.timeout(self._seconds):
                return await answer
        except TimeoutError:
            return Failed(
                f"/proc did not answer in {self._seconds:.0f} s: the kernel holds one of the engine's processes"
            )


class ProcessExaminer:
    """Examines the processes behind one engine's URL. `py_spy` finds the tool, or None."""

    def __init__(self, engine: str, gap: float = GAP, py_spy: Callable[[], str | None] = stack_dump.locate) -> None:
        self._engine = engine
        self._gap = gap
        self._py_spy = py_spy
        self._aside = HangProofThread()

    async def examine(self, keep: Keep) -> None:
        """Both rounds; `keep` gets what is known after each. Raises nothing of its own, only what `keep` raises."""
        loop = asyncio.get_running_loop()
        began = loop.time()
        found = await self._aside.ask(lambda: engine_processes.find(self._engine))
        if not isinstance(found, tuple):
            why = found.reason if isinstance(found, Absent) else found.error
            await keep({"summary": why, "processes": _reading(found), "complete": True})
            return
        seen = await self._round(tuple(ProcessEvidence(process) for process in found))
        await keep(_known(seen, complete=False))
        await asyncio.sleep(max(0.0, began + self._gap - loop.time()))
        await keep(_known(await self._round(seen), complete=True))

    async def _round(self, seen: tuple[ProcessEvidence, ...]) -> tuple[ProcessEvidence, ...]:
        """One look and one dump more of each process."""
        processes = tuple(one.process for one in seen)
        looks = await self._aside.ask(lambda: tuple(engine_processes.look(process) for process in processes))
        dumped = await dumps(processes[:MAX_DUMPED], self._py_spy())
        return tuple(
            one.more(looks if isinstance(looks, Failed) else looks[i], dumped.get(one.process.pid))
            for i, one in enumerate(seen)
        )


async def dumps(
    processes: tuple[EngineProcess, ...], py_spy: str | None, seconds: float = ROUND
) -> dict[int, str | Failed]:
    """pid -> its stacks, or why there are none; all of them within `seconds`."""
    if py_spy is None:
        return {process.pid: Failed(stack_dump.INSTALL) for process in processes}
    turns, loop = asyncio.Semaphore(AT_ONCE), asyncio.get_running_loop()
    until = loop.time() + seconds

    async def one(process: EngineProcess) -> str | Failed:
        async with turns:
            left = min(stack_dump.DUMP_TIMEOUT_S, until - loop.time())
            if left <= 0:
                return Failed(f"the dumps before it took {seconds:.0f} s already")
            return await stack_dump.dump(process.pid, py_spy, left)

    texts = await asyncio.gather(*(one(process) for process in processes))
    return {process.pid: text for process, text in zip(processes, texts, strict=True)}


def _known(seen: tuple[ProcessEvidence, ...], *, complete: bool) -> dict[str, Any]:
    """What a bundle holds of the processes."""
    return {"summary": summary(seen), "processes": [_shown(one) for one in seen], "complete": complete}


def _shown(seen: ProcessEvidence) -> dict[str, Any]:
    return {
        "pid": seen.process.pid,
        "name": seen.process.name,
        "role": seen.process.role,
        "symptom": symptom(seen)[1],
        "looks": [asdict(look) if isinstance(look, ProcessLook) else _reading(look) for look in seen.looks],
        "stacks": [{"text": text} if isinstance(text, str) else _reading(text) for text in seen.stacks],
    }


def _reading(nothing: Absent | Failed) -> dict[str, str]:
    return {"absent": nothing.reason} if isinstance(nothing, Absent) else {"failed": nothing.error}
