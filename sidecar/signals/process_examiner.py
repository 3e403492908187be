"""Examines a stalled engine before it is killed: two rounds, 5 s apart, of a look and a stack dump of each process.

- One examination at a time, within 10 s. The evidence is stored after each round, because the kill may come in between.
- /proc is read on a thread that is abandoned when it hangs: a process blocked in the kernel can block even `ps`.
- Nothing waits without a timeout. Nothing stops the engine's processes but a dump of a native one, which is stalled.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import threading
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from typing import Any, Final, TypeVar

from sidecar.readings import Absent, Failed
from sidecar.signals import engine_processes, native_stacks, stack_dump
from sidecar.signals.process_state import EngineProcess, ProcessEvidence, ProcessLook, find_symptom, summarize

ROUND_INTERVAL_S: Final = 5.0
DUMPS_TIMEOUT_S: Final = 4.0  # for all dumps of a round together
PROC_TIMEOUT_S: Final = 2.0
MAX_DUMPED_PROCESSES: Final = 12  # the core, eight workers, an API, and some more
# The sidecar has few cores, and must not take those of the engine.
MAX_CONCURRENT_DUMPS: Final = 2

T = TypeVar("T")
Store = Callable[[dict[str, Any]], Awaitable[None]]


class HangProofThread:
    """Runs calls that may hang on a thread that is then abandoned. While one hangs, no other starts."""

    def __init__(self, timeout_s: float = PROC_TIMEOUT_S) -> None:
        self._timeout_s = timeout_s
        self._busy = False

    async def run(self, call: Callable[[], T]) -> T | Failed:
        """The result of `call`, or why there is none in time."""
        if self._busy:
            return Failed("/proc still hangs since an earlier look: a process of the engine is blocked in the kernel")
        done = concurrent.futures.Future[T | Failed]()

        def work() -> None:
            try:
                result: T | Failed = call()
            except Exception as e:  # noqa: BLE001 - any error becomes part of the evidence
                result = Failed(f"the engine's processes could not be examined ({type(e).__name__})")
            self._busy = False
            with suppress(concurrent.futures.InvalidStateError):  # no caller is waiting any more
                done.set_result(result)

        self._busy = True
        threading.Thread(target=work, name="engine-processes", daemon=True).start()
        try:
            return await asyncio.wait_for(asyncio.wrap_future(done), self._timeout_s)
        except TimeoutError:
            return Failed(f"/proc hangs for {self._timeout_s:.0f} s: a process of the engine is blocked in the kernel")


@dataclass(eq=False, slots=True)
class ProcessExaminer:
    """Examines the processes behind an engine's URL. `locate_py_spy` returns its path or None."""

    engine: str
    interval_s: float = ROUND_INTERVAL_S
    locate_py_spy: Callable[[], str | None] = stack_dump.locate
    locate_native: Callable[[], list[str] | None] = native_stacks.locate
    _thread: HangProofThread = field(default_factory=HangProofThread, init=False)

    async def examine(self, store: Store) -> None:
        """Do both rounds and store the evidence after each. Raises only what `store` raises."""
        loop = asyncio.get_running_loop()
        began = loop.time()
        found = await self._thread.run(lambda: engine_processes.find(self.engine))
        if not isinstance(found, tuple):
            reason = found.reason if isinstance(found, Absent) else found.error
            await store({"summary": reason, "processes": _format_missing(found), "complete": True})
            return
        evidence = await self._round(tuple(ProcessEvidence(process) for process in found))
        await store(_format_bundle(evidence, complete=False))
        await asyncio.sleep(max(0.0, began + self.interval_s - loop.time()))
        await store(_format_bundle(await self._round(evidence), complete=True))

    async def _round(self, evidence: tuple[ProcessEvidence, ...]) -> tuple[ProcessEvidence, ...]:
        """Add a look and a dump of each process."""
        processes = tuple(item.process for item in evidence)
        looks = await self._thread.run(lambda: tuple(engine_processes.look(process) for process in processes))
        native = self.locate_native()
        dumps = await dump_all(processes[:MAX_DUMPED_PROCESSES], self.locate_py_spy(), native=native)
        if native is None:
            foreign, install = Failed(stack_dump.FOREIGN), Failed(native_stacks.INSTALL)
            dumps = {pid: install if text == foreign else text for pid, text in dumps.items()}
        each = [looks] * len(processes) if isinstance(looks, Failed) else looks
        return tuple(
            item.with_round(look, dumps.get(item.process.pid)) for item, look in zip(evidence, each, strict=True)
        )


async def dump_all(
    processes: tuple[EngineProcess, ...],
    py_spy: str | None,
    timeout_s: float = DUMPS_TIMEOUT_S,
    *,
    native: list[str] | None = None,
) -> dict[int, str | Failed]:
    """pid -> its stacks, or why there are none; all within `timeout_s`.

    `native`: the command that dumps a process without Python, and stops it for that; None: none is dumped.
    """
    turns, loop = asyncio.Semaphore(MAX_CONCURRENT_DUMPS), asyncio.get_running_loop()
    until = loop.time() + timeout_s

    async def dump(process: EngineProcess) -> str | Failed:
        async with turns:
            late = Failed(f"the dumps before it took {timeout_s:.0f} s")
            if (left := until - loop.time()) <= 0:
                return late
            if py_spy is None:
                return Failed(stack_dump.INSTALL)
            text = await stack_dump.dump(process.pid, py_spy, min(stack_dump.DUMP_TIMEOUT_S, left))
            if native is None or text != Failed(stack_dump.FOREIGN):
                return text
            if (left := until - loop.time()) <= 0:
                return late
            return await native_stacks.dump(process.pid, native, min(native_stacks.TIMEOUT_S, left))

    texts = await asyncio.gather(*(dump(process) for process in processes))
    return {process.pid: text for process, text in zip(processes, texts, strict=True)}


def _format_bundle(evidence: tuple[ProcessEvidence, ...], *, complete: bool) -> dict[str, Any]:
    """The part of a diagnosis bundle about the processes."""
    return {"summary": summarize(evidence), "processes": list(map(_format_evidence, evidence)), "complete": complete}


def _format_evidence(evidence: ProcessEvidence) -> dict[str, Any]:
    return {
        "pid": evidence.process.pid,
        "name": evidence.process.name,
        "role": evidence.process.role,
        "symptom": find_symptom(evidence)[1],
        "looks": [asdict(look) if isinstance(look, ProcessLook) else _format_missing(look) for look in evidence.looks],
        "stacks": [{"text": text} if isinstance(text, str) else _format_missing(text) for text in evidence.stacks],
    }


def _format_missing(reading: Absent | Failed) -> dict[str, str]:
    return {"absent": reading.reason} if isinstance(reading, Absent) else {"failed": reading.error}
