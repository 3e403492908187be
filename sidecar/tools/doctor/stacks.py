"""Check whether stack dumps of a hung engine will work, by taking them now, which pauses nothing."""

from __future__ import annotations

import asyncio

from sidecar.readings import Absent, Failed
from sidecar.settings import Settings
from sidecar.signals import engine_processes, stack_dump
from sidecar.signals.process_examiner import MAX_DUMPED_PROCESSES, HangProofThread, dump_all
from sidecar.signals.process_state import EngineProcess
from sidecar.tools.doctor.finding import DoctorFinding


def check(chosen: Settings) -> DoctorFinding:
    """Dump each of the engine's processes once and discard the result."""
    return asyncio.run(_check(chosen.engine))


async def _check(engine: str) -> DoctorFinding:
    if not engine:
        return DoctorFinding("absent", "no engine to examine")
    found = await HangProofThread().run(lambda: engine_processes.find(engine))
    if not isinstance(found, tuple):
        return DoctorFinding("absent", found.reason if isinstance(found, Absent) else found.error)
    py_spy = stack_dump.locate()
    if py_spy is None:
        what, _, remedy = stack_dump.INSTALL.partition(": ")
        return DoctorFinding("absent", what, remedy)
    processes = found[:MAX_DUMPED_PROCESSES]
    return judge_dumps(processes, await dump_all(processes, py_spy))


def judge_dumps(processes: tuple[EngineProcess, ...], dumped: dict[int, str | Failed]) -> DoctorFinding:
    """The finding from one dump per process."""
    names = [p.name for p in processes if isinstance(dumped[p.pid], str)]
    if names:
        return DoctorFinding("ok", f"{len(names)} of {len(processes)} processes: {', '.join(names[:4])}")
    reasons = sorted({text.error for text in dumped.values() if isinstance(text, Failed)})
    if stack_dump.REFUSED in reasons:
        what, _, remedy = stack_dump.REFUSED.partition(": ")
        return DoctorFinding("warn", f"the engine's processes are seen, but there is {what}", remedy)
    return DoctorFinding("absent", "; ".join(reasons[:2]))
