"""`sidecar doctor` says which proofs of a hang can be had here, and what to do for a better one."""

from __future__ import annotations

import asyncio
from pathlib import Path

from sidecar.readings import Absent, CoreSteps, Value
from sidecar.settings import Settings
from sidecar.signals.process_state import EngineProcess
from sidecar.tools.doctor import proofs
from sidecar.tools.doctor.finding import DoctorFinding

from .victims import victim

SEEN = (EngineProcess(1, "VLLM::EngineCore", "core", 0),)
HIDDEN = Absent("not on this machine")
DUMPED = DoctorFinding("ok", "1 of 1 processes")
REFUSED = DoctorFinding("warn", "no permission", "grant SYS_PTRACE")
STEPS = Value((CoreSteps(1, 9, 9, 1, 1, 0, 95.0),), 100.0)
NONE = Absent("no plug-in")


def judged(
    processes: tuple[EngineProcess, ...] | Absent, dumps: DoctorFinding, *, steps: bool, kind: str = "vllm"
) -> DoctorFinding:
    settings = Settings(engine="http://engine", engine_kind=kind, state_dir="/run/state")
    return proofs.judge(settings, processes, dumps, "gdb", STEPS if steps else NONE, 100.0)


def test_all_of_them_need_nothing() -> None:
    """Processes, stacks and steps: what is proved, when a kill comes, how fresh the steps are."""
    found = judged(SEEN, DUMPED, steps=True)
    assert (found.level, found.remedy) == ("ok", "")
    for words in ("a lock, a stopped or a lost process", "30 s, else at 75 s", "gdb", "last 5 s ago"):
        assert words in found.what


def test_each_that_is_missing_has_its_remedy() -> None:
    """No permission: no lock. No plug-in: the variable. No processes in sight: what shares them."""
    refused = judged(SEEN, REFUSED, steps=True)
    assert "but no lock" in refused.what and refused.remedy == "grant SYS_PTRACE"
    no_steps = judged(SEEN, DUMPED, steps=False)
    assert no_steps.level == "ok" and "PYTHONPATH=/run/state/vllm-plugin" in no_steps.remedy
    hidden = judged(HIDDEN, DoctorFinding("absent", "not here"), steps=False)
    assert hidden.level == "absent" and "waits for 75 s" in hidden.what
    assert "--stack-dumps on" in hidden.remedy and "PYTHONPATH" in hidden.remedy


def test_an_engine_without_a_plug_in_is_asked_for_none() -> None:
    """llama.cpp's steps are seen by no one."""
    found = judged(SEEN, DUMPED, steps=False, kind="llamacpp")
    assert "core" not in found.what and found.remedy == ""


async def test_a_real_process_is_looked_at(py_spy: str, tmp_path: Path) -> None:
    """Its tree is in sight and its stacks can be read: a lock could be proved."""
    with victim() as engine:
        settings = Settings(engine=engine.url, state_dir=str(tmp_path))
        found = await asyncio.to_thread(proofs.check, settings)
    assert found.level == "ok" and "a lock, a stopped or a lost process" in found.what
