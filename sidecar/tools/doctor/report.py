"""Check settings, engine, GPU, shared memory and CPU quota; print what is missing and how to fix it.

Rules of this package: a check never raises and has a timeout; its finding states what was found and what to do; only
what keeps `sidecar run` from working is a `fail`.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from dataclasses import asdict
from typing import Final

from sidecar.settings import Settings
from sidecar.tools.doctor import engine, machine, stacks
from sidecar.tools.doctor.finding import DoctorFinding

Check = Callable[[Settings], DoctorFinding]

CHECKS: Final[dict[str, Check]] = {
    "coefficients": machine.coefficients,
    "tenant-limits": machine.limits,
    "state-dir": machine.state_dir,
    "ports": machine.ports,
    "model": machine.model,
    "tokenizer": machine.tokenizer,
    "images": machine.images,
    "gpu": machine.gpu,
    "cpu": machine.cpu,
    "shm": machine.shm,
    "stack-dumps": stacks.check,
}


def main(chosen: Settings, as_json: bool) -> int:
    """Print the findings. Returns 1 if any is a `fail`, otherwise 0."""
    findings = asyncio.run(examine(chosen))
    print(json.dumps([asdict(f) for f in findings], indent=1) if as_json else text(findings))
    return 1 if any(f.level == "fail" for f in findings) else 0


async def examine(chosen: Settings) -> list[DoctorFinding]:
    """All findings in the order of the tables; checks run concurrently."""
    first = _engine(chosen)
    rest = (_safely(name, check, chosen) for name, check in CHECKS.items())
    of_engine, *others = await asyncio.gather(first, *rest)
    return [*of_engine, *(finding for findings in others for finding in findings)]


async def _engine(chosen: Settings) -> list[DoctorFinding]:
    if not chosen.engine:
        return [
            DoctorFinding(
                "engine", "fail", "no --engine", "give the engine's base URL, e.g. --engine http://127.0.0.1:8000"
            )
        ]
    return await engine.check(chosen)


async def _safely(name: str, check: Check, chosen: Settings) -> list[DoctorFinding]:
    try:
        return [await asyncio.to_thread(check, chosen)]
    except Exception as e:  # noqa: BLE001 - a broken check must not hide the other findings
        return [DoctorFinding(name, "fail", f"the check itself failed ({type(e).__name__})", "please report this")]


def text(findings: list[DoctorFinding]) -> str:
    """Aligned lines; a remedy follows its finding."""
    width = max(len(f.name) for f in findings)
    lines = []
    for f in findings:
        lines.append(f"{f.level:<6}  {f.name:<{width}}  {f.what}")
        if f.remedy:
            lines.append(f"{'':<6}  {'':<{width}}  -> {f.remedy}")
    failed, warned = (sum(f.level == level for f in findings) for level in ("fail", "warn"))
    last = f"{failed} to fix" if failed else "nothing fails" if warned else "nothing to fix"
    return "\n".join([*lines, last + (f", {warned} to consider (warn)" if warned else "")])
