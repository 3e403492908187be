"""What a check says."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Level = Literal["ok", "warn", "fail", "absent"]


@dataclass(frozen=True, slots=True)
class DoctorFinding:
    """One check's result. `absent`: not there and not needed. `remedy` is what to do, empty where nothing is."""

    name: str
    level: Level
    what: str
    remedy: str = ""
