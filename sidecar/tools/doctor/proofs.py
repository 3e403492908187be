"""Which proofs of a hang can be had here, and how to get a better one, by the looks that `sidecar run` takes."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path
from typing import Final

from sidecar.engines.registry import PLUGIN_KINDS
from sidecar.health.progress import PROVEN_KILL_S
from sidecar.readings import Absent, CoreSteps, Failed, Reading, Value
from sidecar.runtime.plugin_folders import PLUGIN_FOLDER
from sidecar.settings import Settings
from sidecar.signals import engine_processes, native_stacks
from sidecar.signals.engine_steps import EngineSteps
from sidecar.signals.process_examiner import HangProofThread
from sidecar.signals.process_state import EngineProcess
from sidecar.tools.doctor import stacks
from sidecar.tools.doctor.finding import DoctorFinding

SHARE: Final = (
    "share the pod's processes and grant SYS_PTRACE (sidecar manifests --stack-dumps on), or start the engine by "
    "`sidecar run -- COMMAND`"
)


def check(chosen: Settings) -> DoctorFinding:
    """Look once at the engine's processes, at their stacks, and at the steps of its cores."""
    if not chosen.engine:
        return DoctorFinding("absent", "no engine to examine")
    steps = EngineSteps(Path(chosen.state_dir))
    steps.refresh()
    found = asyncio.run(HangProofThread().run(lambda: engine_processes.find(chosen.engine)))
    command = native_stacks.locate()
    native = Path(command[0]).name if command else ""
    return judge(chosen, found, stacks.check(chosen), native, steps.read(), time.monotonic())


def judge(
    chosen: Settings,
    processes: tuple[EngineProcess, ...] | Absent | Failed,
    dumps: DoctorFinding,
    native: str,
    steps: Reading[tuple[CoreSteps, ...]],
    now: float,
) -> DoctorFinding:
    """The finding. `dumps`: that of stack dumps; `native`: what dumps processes without Python, "" for none."""
    is_seen, has_stacks = isinstance(processes, tuple), dumps.level == "ok"
    said = [_processes(chosen, is_seen=is_seen, has_stacks=has_stacks)]
    if is_seen:
        said.append(
            f"stacks of native processes by {native}" if native else "neither eu-stack nor gdb for native stacks"
        )
    remedies = [] if has_stacks else [dumps.remedy if is_seen and dumps.remedy else SHARE]
    if isinstance(steps, Value):
        age = min(now - core.at for core in steps.value)
        said.append(f"{len(steps.value)} core(s) report their steps, the last {age:.0f} s ago")
    elif chosen.engine_kind in ("auto", *PLUGIN_KINDS):
        said.append("no core reports its steps")
        plugin = Path(chosen.state_dir) / PLUGIN_FOLDER
        remedies.append(f"start vLLM or SGLang with PYTHONPATH={plugin} and one /dev/shm for engine and sidecar")
    has_any = is_seen or isinstance(steps, Value)
    return DoctorFinding("ok" if has_any else "absent", "; ".join(said), "; ".join(remedies))


def _processes(chosen: Settings, *, is_seen: bool, has_stacks: bool) -> str:
    """What the engine's processes can prove, and when a kill comes."""
    if not is_seen:
        return f"the engine's processes are not seen: a kill waits for {chosen.silence_kill:.0f} s of silence"
    proved = "a lock, a stopped or a lost process" if has_stacks else "a stopped or a lost process, but no lock"
    return f"{proved} is proved: a kill then comes at {PROVEN_KILL_S:.0f} s, else at {chosen.silence_kill:.0f} s"
