"""`sidecar doctor` reports in advance whether a hang will have stacks, and how to get them."""

from __future__ import annotations

import asyncio

from sidecar.readings import Failed
from sidecar.settings import Settings
from sidecar.signals import stack_dump
from sidecar.signals.process_state import EngineProcess
from sidecar.tools.doctor import stacks as doctor

from .victims import victim

CORE = EngineProcess(1, "VLLM::EngineCore", "core", 0)
API = EngineProcess(2, "vllm", "api", 0)


async def test_dumps_that_work_are_ok(py_spy: str) -> None:
    """A real dump of the real process, thrown away."""
    with victim() as engine:
        found = await asyncio.to_thread(doctor.check, Settings(engine=engine.url))
    assert found.level == "ok" and "1 of 1 processes" in found.what


def test_a_refusal_names_the_capability() -> None:
    """Seen and not readable is a warning with its remedy; one process that can be read is enough for ok."""
    refused = doctor.judge_dumps((CORE, API), {1: Failed(stack_dump.REFUSED), 2: Failed(stack_dump.FOREIGN)})
    assert refused.level == "warn" and "SYS_PTRACE" in refused.remedy and "no permission" in refused.what
    assert doctor.judge_dumps((CORE, API), {1: "Thread 1", 2: Failed(stack_dump.FOREIGN)}).level == "ok"
    assert doctor.judge_dumps((API,), {2: Failed(stack_dump.FOREIGN)}).level == "absent"


async def test_no_engine_and_a_remote_one_have_none() -> None:
    """Neither is a fault: the verdict needs no stacks."""
    for url, words in (("", "no engine"), ("http://192.0.2.1:8000", "not on this machine")):
        found = await asyncio.to_thread(doctor.check, Settings(engine=url))
        assert found.level == "absent" and words in found.what
