"""Pure: the reason code of a silence, from a literal table: the first row of CAUSES that holds names it.

A reason tells an operator where to look; it decides nothing. A silence that no row explains is `no_progress`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from sidecar.readings import EngineSample

# Seconds before a silence in which an XID explains it.
XID_WINDOW_S: Final = 60.0
# Share of a silence in which the API must have answered nothing; its seconds, where only a canary is outstanding.
BLOCKED_SHARE: Final = 0.5
MIN_BLOCKED_IDLE_S: Final = 4.0
MIN_BLOCKED_S: Final = 1.0
# Readings in a row in which steps moved.
MIN_ITERATING: Final = 4
# Share of the KV cache from which requests wait for memory, not for admission.
KV_FULL: Final = 0.95


@dataclass(frozen=True, slots=True)
class HangClues:
    """What a cause is chosen from. `sample` is None where the page could not be read; `xid_age` None without an XID.

    `unanswered`: seconds for which the API has answered nothing; `iterating`: readings in a row in which steps moved;
    `part`: the code of a part that had begun to hang before, "" for none.
    """

    age: float | None = None
    sample: EngineSample | None = None
    xid_age: float | None = None
    unanswered: float = 0.0
    iterating: int = 0
    part: str = ""


@dataclass(slots=True)
class ClueHistory:
    """When the explanations of a silence were last seen. Times are monotonic seconds."""

    unanswered_since: float | None = None
    xids: int | None = None  # in all, when last read
    xid_at: float | None = None
    start_at: float = 0.0  # when the engine process was first seen

    def record(self, now: float, unanswered: bool, xids: int | None) -> None:
        """Record a tick. `xids`: XID errors that the GPUs have counted so far; None where none can be read."""
        self.unanswered_since = (self.unanswered_since or now) if unanswered else None
        if xids is not None:
            if self.xids is not None and xids > self.xids:
                self.xid_at = now
            self.xids = xids

    def unanswered(self, now: float) -> float:
        """Seconds for which the API has answered nothing."""
        return 0.0 if self.unanswered_since is None else now - self.unanswered_since

    def xid_age(self, now: float) -> float | None:
        """Seconds since an XID was counted; None where none was."""
        return None if self.xid_at is None else now - self.xid_at


Cause = Callable[[HangClues], bool]


def _has_gpu_fault(clues: HangClues) -> bool:
    return clues.xid_age is not None and clues.xid_age <= (clues.age or 0.0) + XID_WINDOW_S


def _is_api_blocked(clues: HangClues) -> bool:
    shortest = MIN_BLOCKED_IDLE_S if clues.age is None else MIN_BLOCKED_S
    return clues.unanswered >= max(shortest, BLOCKED_SHARE * (clues.age or 0.0))


def _is_admission_stalled(clues: HangClues) -> bool:
    if clues.sample is None or clues.sample.running is None:
        return False
    return clues.sample.running == 0 and (clues.sample.waiting or 0) > 0 and (clues.sample.kv_usage or 0.0) < KV_FULL


def _has_part(part: str) -> Cause:
    return lambda clues: clues.part == part


CAUSES: Final[tuple[tuple[str, Cause, str], ...]] = (
    ("gpu_fault", _has_gpu_fault, "the driver reported an XID just before or during the silence"),
    ("api_blocked", _is_api_blocked, "the API accepts connections and answers none: its process is blocked or stopped"),
    ("admission_stalled", _is_admission_stalled, "requests wait and none runs: nothing, or not the head, is admitted"),
    ("rank_silent", _has_part("rank_silent"), "one data-parallel rank had stopped while others worked"),
    ("decode_stalled", _has_part("decode_stalled"), "several first tokens had come, and since then no other token"),
    ("stream_stuck", _has_part("stream_stuck"), "several streams had fallen silent one by one while others moved"),
    ("livelock", lambda clues: clues.iterating >= MIN_ITERATING, "the engine's steps continue, nothing is delivered"),
)

# What an operator reads next to a code.
REASON_TEXTS: Final[dict[str, str]] = {
    "no_progress": "work or a canary is outstanding and makes no progress",
    "canary_lost": "nothing was outstanding, and a canary got no token",
    "work_stuck": "canaries pass, the users' work does not move",
    "stream_stuck": "single streams fall silent again and again while others move; each was aborted",
    "decode_stalled": "first tokens come, and no stream gets any more",
    "rank_silent": "one data-parallel rank has work and generates nothing while others do",
    "admission_stalled": "requests end and no waiting request is admitted",
    "prompt_exceeds_kv_cache": "the prompt is larger than the engine's KV cache, waits forever, and blocks the queue",
    "startup_stuck": "start-up has shown no sign of progress for longer than any is known to take",
    **{code: text for code, _, text in CAUSES if code in ("gpu_fault", "api_blocked", "livelock")},
}

# A change to one of these is reported even if the state stays.
NOTABLE: Final = frozenset({"startup_stuck", "work_stuck", "rank_silent", "stream_stuck"})


def cause_of(clues: HangClues) -> str:
    """The reason code of a silence."""
    return next((code for code, holds, _ in CAUSES if holds(clues)), "no_progress")
