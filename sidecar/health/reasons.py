"""Pure: the reason code of a silence, from a literal table: the first row of CAUSES that holds names it; all codes.

Rules:
- A reason tells an operator where to look; it decides nothing.
- A part is the reason of the whole's silence only if the engine's own numbers speak for it. A silence that no row
  explains is `no_progress`, and `canary_lost` while nothing is outstanding.
- Each code has one sentence here, or as a hold in kill_policy.py, and a paragraph in docs/runbook.md.
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
    `part`: the code of a part that had begun to hang before, "" for none; `moves`: a counter of the engine moved in
    the silence; `waiting`: seconds for which the oldest of the relay's requests has waited, None where one of them was
    begun or none is open; `ended`: seconds since the engine ended a request, None before it did; `vanished`: requests
    that ran left the engine's gauge and did not end.
    """

    age: float | None = None
    sample: EngineSample | None = None
    xid_age: float | None = None
    unanswered: float = 0.0
    iterating: int = 0
    part: str = ""
    moves: bool = False
    waiting: float | None = None
    ended: float | None = None
    vanished: bool = False


@dataclass(slots=True)
class ClueHistory:
    """When the explanations of a silence were last seen. Times are monotonic seconds."""

    unanswered_since: float | None = None
    xids: int | None = None  # in all, when last read
    xid_at: float | None = None
    start_at: float = 0.0  # when the engine process was first seen
    vanished: bool = False  # requests that ran left the gauge and did not end; until some run again
    _sample: EngineSample | None = None

    def read(self, sample: EngineSample) -> None:
        """Compare a new metrics page with the last one: a gauge that falls to 0 says whether its requests ended."""
        before, self._sample = self._sample, sample
        if sample.running:
            self.vanished = False
        elif before is not None and before.running and sample.running == 0:
            known = before.finished is not None and sample.finished is not None
            self.vanished = known and (sample.finished or 0.0) - (before.finished or 0.0) < before.running

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
    """The page says that none runs and some wait, and the engine lives: it counts, or ended others meanwhile.

    A core that froze shows the same where its gauge of running requests is set to 0, or is counted by its API.
    """
    sample = clues.sample
    if sample is None or sample.running != 0 or not sample.waiting or (sample.kv_usage or 0.0) >= KV_FULL:
        return False
    if clues.waiting is None or clues.vanished:
        return False
    return clues.moves or (clues.ended is not None and clues.ended < clues.waiting)


def _is_livelock(clues: HangClues) -> bool:
    """Steps go on, and the engine's counter of tokens, which would show what is generated unseen, stands still."""
    if clues.sample is None or clues.iterating < MIN_ITERATING:
        return False
    return clues.sample.generation_tokens is not None and not clues.sample.tokens_at_end


def _has_part(part: str) -> Cause:
    return lambda clues: clues.part == part


CAUSES: Final[tuple[tuple[str, Cause, str], ...]] = (
    ("gpu_fault", _has_gpu_fault, "the driver reported an XID just before or during the silence"),
    ("api_blocked", _is_api_blocked, "the API accepts connections and answers none: its process is blocked or stopped"),
    (
        "admission_stalled",
        _is_admission_stalled,
        "the engine's page says that requests wait and none runs, while others ended or its counters move",
    ),
    ("rank_silent", _has_part("rank_silent"), "one data-parallel rank had stopped while others worked"),
    ("decode_stalled", _has_part("decode_stalled"), "several first tokens had come, and since then no other token"),
    ("stream_stuck", _has_part("stream_stuck"), "several streams had fallen silent one by one while others moved"),
    ("livelock", _is_livelock, "the engine's steps continue, and its counter of generated tokens stands still"),
)

# What an operator reads next to the code of a doubt, a stall or an abort.
REASON_TEXTS: Final[dict[str, str]] = {
    "no_progress": "work is outstanding, and nothing of it moves",
    "canary_lost": "nothing was outstanding, and the engine gave a canary nothing",
    "work_stuck": "canaries pass, the users' work does not move",
    "work_unserved": "users leave unserved one after another, or no client gets what is generated",
    "request_overtaken": "a request waits while later ones of its model and priority are served again and again",
    "connection_silent": "some connections to the idle engine are answered and others are not: a listener hangs",
    "refuses_work": "an engine that has served refuses all work",
    "stream_stuck": "single streams fall silent again and again while others move; each was aborted",
    "decode_stalled": "first tokens come, and no stream gets any more",
    "rank_silent": "one data-parallel rank has work and generates nothing while others do",
    "admission_stalled": "requests wait and none is admitted, although others end",
    "prompt_exceeds_kv_cache": "the prompt is larger than the engine's KV cache, waits forever, and blocks the queue",
    "startup_stuck": "start-up has shown no sign of progress for longer than any is known to take",
    **{code: text for code, _, text in CAUSES if code in ("gpu_fault", "api_blocked", "livelock")},
}

# Those for which requests are aborted one by one, while the engine goes on.
ABORT_REASONS: Final = ("stream_stuck", "prompt_exceeds_kv_cache")

# The codes of the states without a doubt, of those that are not judged, and of a remark in the history.
STATE_TEXTS: Final[dict[str, str]] = {
    "progress": "something was delivered, or a counter of the engine moved",
    "canary_ok": "a canary passed",
    "within_allowed": "work is outstanding and silent, within the time that it may be",
    "no_work": "nothing is outstanding",
    "garbage_output": "the last canaries were answered differently from all before them; nothing is restarted for it",
    "awaiting_first_token": "the engine has started and served nothing yet",
    "engine_restarted": "another process of the engine answers; it has served nothing yet",
    "engine_restarting": "the stalled or dead engine is being restarted",
    "engine_unreachable": "the engine takes no connections; it is starting or being restarted",
    "engine_gone": "the engine, which has served, takes no connections any more",
    "draining": "the pod is being deleted; open requests may end",
    "engine_sleeping": "the engine sleeps by order, or says that it does",
    "engine_paused": "the engine is paused by order, or says that it is",
    "engine_profiling": "a profiler was started in the engine by order",
    "weight_update": "the engine's weights are being replaced by order",
    "canary_rejected": "the engine takes no canary, and nothing else can be judged now",
    "own_pause": "the sidecar itself stood still, so what it saw of the engine proves nothing",
    "clock_jump": "the machine's clock jumped, so times measured across the jump prove nothing",
    "relay_blind": "a relay process with open requests does not report",
    "sidecar_restarted": "the sidecar was restarted, and has not yet seen the engine work",
}

# A change to one of these is reported even if the state stays.
NOTABLE: Final = frozenset(
    {
        *("startup_stuck", "work_stuck", "rank_silent", "stream_stuck"),
        *("request_overtaken", "work_unserved", "connection_silent", "refuses_work"),
    }
)


def cause_of(clues: HangClues) -> str:
    """The reason code of a silence; `age` None: of a canary's, while nothing is outstanding."""
    unexplained = "canary_lost" if clues.age is None else "no_progress"
    return next((code for code, holds, _ in CAUSES if holds(clues)), unexplained)
