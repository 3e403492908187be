"""What an engine's processes and cores show, at sites where they can be seen: raw signs of what goes on inside.

Rules: signs only, no class and no proof; the production table decides what they mean. A look comes as the production
watch makes one, every three seconds while the verdict is suspect; one in fifty fails, and the series begins anew. A
hang shows what its mode says, an alarm what its story says; else an engine shows whether it works, waits for its GPU or
is idle. Where prefills go first, they are one long step.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, field, replace
from typing import Any, Final

from sidecar.health.hang_classes import LOOK_INTERVAL_S
from sidecar.readings import Absent, CoreSteps, HangSigns, Reading, Value
from sim.engine import Engine

LEVELS: Final = ("none", "processes", "steps", "both")  # what can be seen of an engine
MISSED: Final = 0.02  # share of the looks that fail
NOTHING: Final = Absent("not looked at")
CALM: Final = {"frozen": False, "memory": "none"}

# Signs by what goes on. Some hangs and some pauses look alike: a wait for the GPU is both.
SHOWN: Final[dict[str, dict[str, Any]]] = {
    "works": {"cpu": "busy", "same_stacks": False},
    "loops": {"cpu": "some", "same_stacks": False},
    "idle": {"cpu": "none", "same_stacks": True},
    "lock": {"cpu": "none", "wait": "lock", "same_stacks": True},
    "stopped": {"cpu": "none", "stopped": True, "same_stacks": True},
    "lost": {"cpu": "none", "lost": True, "same_stacks": True},
    "device": {"cpu": "none", "wait": "device", "same_stacks": True},
    "disk": {"cpu": "none", "wait": "disk", "same_stacks": True},
    "network": {"cpu": "none", "wait": "network", "same_stacks": True},
    "spins": {"cpu": "busy", "frames": "collective", "same_stacks": True},
    "jit": {"cpu": "busy", "frames": "compiler", "same_stacks": True},
    "compiler": {"cpu": "none", "wait": "lock", "compilers": ("ptxas",), "same_stacks": True},
    "swaps": {"cpu": "none", "wait": "lock", "memory": "pressure", "same_stacks": True},
    "frozen": {"cpu": "none", "wait": "lock", "frozen": True, "same_stacks": True},
    "traced": {"cpu": "none", "wait": "lock", "debugged": True, "same_stacks": True},
    "unreadable": {"cpu": "none"},
}
# What hangs of a mode's fault show: by lot. Others show what the engine does.
HANGS: Final[dict[str, tuple[str, ...]]] = {
    "freeze": ("lock", "stopped", "device"),
    "freeze_busy": ("lock", "stopped", "device", "spins", "unreadable"),
    "wedge_on_abort": ("lock",),
    "hang_after_idle": ("lock",),
    "core_dead": ("lost",),
    "api_block": ("stopped",),
    "gpu_fault": ("device",),
    "transfer_stuck": ("network",),
    "freeze_admission": ("loops",),
    "kv_deadlock": ("loops",),
}
# What a healthy engine may show while it stands and will go on.
PAUSES: Final = ("device", "disk", "network", "jit", "compiler", "swaps", "frozen", "traced", "unreadable", "works")


@dataclass(slots=True)
class ProcessLooks:
    """The series of looks of a doubt."""

    what: str = ""
    began: float = 0.0
    due: float = 0.0
    reading: Reading[HangSigns] = NOTHING
    rng: random.Random = field(default_factory=lambda: random.Random(0))  # its own: other draws stay what they are

    def tick(self, engine: Engine, shows: str, now: float, *, suspect: bool) -> None:
        """A look, if one is due."""
        if not suspect:
            self.what, self.reading = "", NOTHING
            return
        if now < self.due:
            return
        self.due = now + LOOK_INTERVAL_S
        if not engine.how.port_open or self.rng.random() < MISSED:
            self.what, self.reading = "", NOTHING
            return
        what = shows or shown(engine)
        signs = HangSigns(0.0, **(CALM | SHOWN[what]))
        if what != self.what or signs.cpu != "none":
            self.what, self.began = what, now
        self.reading = Value(replace(signs, seconds=now - self.began), now)


def shown(engine: Engine) -> str:
    """What an engine does, as its processes show it."""
    has_work = bool(engine.running or engine.waiting)
    if not engine.how.stepping:
        return "idle"  # told of no work, or paused
    if has_work and engine.compile_left > 0:
        return "compiler" if engine.site.blocks else "jit"
    if not engine.how.answering:
        return "works"  # the tokenizer
    return ("device" if engine.site.blocks else "works") if has_work else "idle"


def core_steps(engine: Engine, now: float) -> Reading[tuple[CoreSteps, ...]]:
    """What a plug-in in the core writes."""
    running, waiting = (len(engine.running), len(engine.waiting))
    tokens, last = int(engine.scheduled), int(engine.step_tokens)
    return Value((CoreSteps(1, engine.steps, tokens, last, running, waiting, engine.step_at),), now)
