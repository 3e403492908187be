"""The result of a check."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Level = Literal["ok", "warn", "fail", "absent"]


@dataclass(frozen=True, slots=True)
class DoctorFinding:
    """One check's result. `absent`: missing and not needed. `remedy`: what to do, empty if nothing."""

    level: Level
    what: str
    remedy: str = ""
