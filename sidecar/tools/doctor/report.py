"""Check settings, engine, GPU, shared memory and CPU quota; print what is missing and how to fix it.

Rules of this package: a check never raises and has a timeout; its finding states what was found and what to do; only
what keeps `sidecar run` from working is a `fail`.
"""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import Callable
from dataclasses import asdict
from typing import Final

from sidecar.settings import Settings
from sidecar.tools import terminal
from sidecar.tools.doctor import engine, image_costs, machine, proofs, stacks
from sidecar.tools.doctor.finding import DoctorFinding, Level

Check = Callable[[Settings], DoctorFinding]

CHECKS: Final[dict[str, Check]] = {
    "coefficients": machine.coefficients,
    "tenant-limits": machine.limits,
    "state-dir": machine.state_dir,
    "usage-database": machine.usage_database,
    "ports": machine.ports,
    "model": machine.model,
    "bodies": machine.bodies,
    "tokenizer": machine.tokenizer,
    "images": machine.images,
    "images-cost": image_costs.check,
    "images-sandbox": machine.images_sandbox,
    "images-gpu": machine.images_gpu,
    "gpu": machine.gpu,
    "cpu": machine.cpu,
    "open-files": machine.files,
    "shm": machine.shm,
    "stack-dumps": stacks.check,
    "hang-proofs": proofs.check,
}

LEVEL_STYLES: Final[dict[Level, tuple[str, ...]]] = {
    "ok": ("green",),
    "warn": ("bold", "yellow"),
    "fail": ("bold", "red"),
    "absent": ("dim",),
}


def main(chosen: Settings, as_json: bool) -> int:
    """Print the findings. Returns 1 if any is a `fail`, otherwise 0."""
    found = asyncio.run(examine(chosen))
    if as_json:
        print(json.dumps([{"name": name} | asdict(f) for name, f in found.items()], indent=1))
    else:
        print(text(found, colours=terminal.has_colours(sys.stdout)))
    return 1 if any(f.level == "fail" for f in found.values()) else 0


async def examine(chosen: Settings) -> dict[str, DoctorFinding]:
    """All findings by name, in the order of the tables; checks run concurrently."""
    of_engine = asyncio.create_task(engine.check(chosen))
    others = await asyncio.gather(*(_safely(check, chosen) for check in CHECKS.values()))
    return await of_engine | dict(zip(CHECKS, others, strict=True))


async def _safely(check: Check, chosen: Settings) -> DoctorFinding:
    try:
        return await asyncio.to_thread(check, chosen)
    except Exception as e:  # noqa: BLE001 - a broken check must not hide the other findings
        return DoctorFinding("fail", f"the check itself failed ({type(e).__name__})", "please report this")


def text(found: dict[str, DoctorFinding], *, colours: bool = False) -> str:
    """Aligned lines; a remedy follows its finding."""
    width = max(map(len, found))
    lines = []
    for name, f in found.items():
        level = terminal.paint(f"{f.level:<6}", *LEVEL_STYLES[f.level], on=colours)
        lines.append(f"{level}  {name:<{width}}  {f.what}")
        if f.remedy:
            lines.append(f"{'':<6}  {'':<{width}}  -> {f.remedy}")
    failed, warned = (sum(f.level == level for f in found.values()) for level in ("fail", "warn"))
    last = f"{failed} to fix" if failed else "nothing fails" if warned else "nothing to fix"
    return "\n".join([*lines, last + (f", {warned} to consider (warn)" if warned else "")])
