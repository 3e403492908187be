"""Pure: which reason code a silence gets, from a literal table: the first row of CAUSES that holds names it.

A reason says where an operator should look; it decides nothing. What no row explains is `no_progress`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from sidecar.readings import EngineSample

XID_BEFORE = 60.0  # seconds before a silence in which an XID explains it
BLOCKED_SHARE = 0.5  # of a silence in which the API must have answered nothing
BLOCKED_LEAST = 4.0  # seconds, where nothing is outstanding but a canary
ITERATING = 4  # readings in a row in which steps moved
KV_FULL = 0.95  # share of the KV cache from which waiting is memory's, not admission's


@dataclass(frozen=True, slots=True)
class HangClues:
    """What a cause is chosen from. `sample` is None where the page could not be read; `xid_age` None without an XID.

    `unanswered`: seconds for which the API has answered nothing; `iterating`: readings in a row in which steps moved; `part`: the code of a
    part that had begun to hang before, "" for none.
    """

    age: float | None = None
    sample: EngineSample | None = None
    xid_age: float | None = None
    unanswered: float = 0.0
    iterating: int = 0
    part: str = ""


def _gpu_fault(s: HangClues) -> bool:
    return s.xid_age is not None and s.xid_age <= (s.age or 0.0) + XID_BEFORE


def _api_blocked(s: HangClues) -> bool:
    return s.unanswered >= max(BLOCKED_LEAST if s.age is None else 0.0, BLOCKED_SHARE * (s.age or 0.0), 1.0)


def _admission_stalled(s: HangClues) -> bool:
    if s.sample is None or s.sample.running is None:
        return False
    return s.sample.running == 0 and (s.sample.waiting or 0) > 0 and (s.sample.kv_usage or 0.0) < KV_FULL


@dataclass(slots=True)
class ClueHistory:
    """When what explains a silence was last seen. Times are monotonic seconds."""

    unanswered_since: float | None = None
    xids: int | None = None  # in all, when last read
    xid_at: float | None = None
    start_at: float = 0.0  # the last sign that a start-up goes on

    def record(self, now: float, unanswered: bool, xids: int | None) -> None:
        """One tick. `xids`: XID errors that the GPUs have counted so far; None where none can be read."""
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

CAUSES: tuple[tuple[str, Cause, str], ...] = (
    ("gpu_fault", _gpu_fault, "the driver reported an XID just before or during the silence"),
    ("api_blocked", _api_blocked, "the API takes connections and answers nothing on them: its event loop is blocked, or its process stopped"),
    ("admission_stalled", _admission_stalled, "requests wait and none runs: the scheduler admits nothing, or the head of the queue cannot enter"),
    ("rank_silent", lambda s: s.part == "rank_silent", "one data-parallel rank had stood while others worked"),
    ("decode_stalled", lambda s: s.part == "decode_stalled", "several first tokens had come, and since then no other token"),
    ("stream_stuck", lambda s: s.part == "stream_stuck", "several streams had fallen silent one by one while others moved"),
    ("livelock", lambda s: s.iterating >= ITERATING, "the engine's steps go on and nothing is delivered"),
)  # fmt: skip

# What an operator reads beside a code, for codes that are not causes of a silence.
REASON_TEXTS: dict[str, str] = {
    "no_progress": "work or a canary is outstanding and nothing of it moves",
    "canary_lost": "nothing was outstanding, and a canary got no token",
    "work_stuck": "canaries pass, the users' work does not move",
    "stream_stuck": "single streams fall silent again and again while others move; each was ended",
    "decode_stalled": "first tokens come, and no stream gets any more",
    "rank_silent": "one data-parallel rank has work and generates nothing while others do",
    "admission_stalled": "requests end and none that waits is admitted",
    "prompt_exceeds_kv_cache": "the prompt is larger than the engine's KV cache, waits for ever, and blocks the queue",
    "startup_stuck": "start-up has shown no sign of progress for longer than any is known to take",
    **{code: text for code, _, text in CAUSES if code in ("gpu_fault", "api_blocked", "livelock")},
}

NOTABLE: frozenset[str] = frozenset(
    {"startup_stuck", "work_stuck", "rank_silent", "stream_stuck"}
)  # a change to these within a state is news, too


def cause_of(signs: HangClues) -> str:
    """The reason code of a silence."""
    return next((code for code, holds, _ in CAUSES if holds(signs)), "no_progress")
