"""Pure: the steps of the engine's cores -> does a core stand in a step, and is a prompt being computed.

Rules:
- A core that has requests and begins no step for longer than its steps take stands: readiness goes at once. It is no
  proof for a kill, since a kernel that compiles stands in a step, too.
- Tokens that are scheduled are work, of a prompt that shows nothing else, and hold suspicion off: but no more of them
  than the open prompts have, twice over, for requests that were preempted. What decodes for no one comes to an end so.
- All cores with requests must stand: one of several is a rank that hangs, which is another finding.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Final

from sidecar.readings import CoreSteps

# A core may take so long for a step, whatever it has done so far; and so many times its longest one lately.
STEP_FLOOR_S: Final = 6.0
STEP_MARGIN: Final = 2.0
# The longest step counts half after so long.
HALF_LIFE_S: Final = 600.0
# Scheduled tokens that moved so recently are work.
MOVING_S: Final = 2.0
# Times the tokens of the open prompts that their computing may take.
RECOMPUTED: Final = 2.0


@dataclass(slots=True)
class StepWatch:
    """The last readings of the cores, and how long their steps take. Times are monotonic seconds."""

    longest: float = 0.0
    _cores: dict[int, CoreSteps] = field(default_factory=dict)
    _read_at: float = 0.0
    _moved_at: float | None = None
    _tokens: int = 0  # scheduled in all
    _base: int = 0  # the same when the silence began
    _base_at: float = 0.0

    def read(self, cores: tuple[CoreSteps, ...], now: float, *, teaches: bool) -> None:
        """A new reading. `teaches`: the steps that it ends were of a healthy engine."""
        self.longest *= 0.5 ** (max(0.0, now - self._read_at) / HALF_LIFE_S) if self._read_at else 1.0
        seen = {core.pid: self._timed(core, now) for core in cores}
        for core in cores:
            before = self._cores.get(core.pid)
            if before is None or core.steps < before.steps:
                continue
            self._tokens += max(0, core.tokens - before.tokens)
            if core.tokens > before.tokens:
                self._moved_at = now
            if teaches and core.steps > before.steps and has_work(before):
                self.longest = max(self.longest, self._read_at - before.at)  # it still stood when it was read
        self._cores, self._read_at = seen, now

    def _timed(self, core: CoreSteps, now: float) -> CoreSteps:
        """When its step began, by what was seen: its clock may differ. A new one began after the reading before."""
        before = self._cores.get(core.pid)
        if before is None:
            return replace(core, at=now)
        if core.steps == before.steps:
            return replace(core, at=before.at)
        return replace(core, at=min(max(core.at, self._read_at), now))

    def forget(self) -> None:
        """Nothing can be read: of what comes later, nothing is known."""
        self._cores, self._moved_at = {}, None

    def standing(self, now: float) -> float | None:
        """Seconds since any core with requests began a step; None where none has any."""
        return min((now - core.at for core in self._cores.values() if has_work(core)), default=None)

    def allowed(self, predicted: float) -> float:
        """Seconds that a step may take. `predicted`: those of its tokens, with their margin."""
        return max(STEP_FLOOR_S, STEP_MARGIN * self.longest, predicted)

    def last_tokens(self) -> int:
        """The most tokens that a step under way computes."""
        return max((core.last_tokens for core in self._cores.values()), default=0)

    def is_computing(self, now: float, silent_since: float, open_tokens: int) -> bool:
        """Whether scheduled tokens move, and no more than the open prompts explain were, since the silence began."""
        if silent_since > self._base_at:
            self._base, self._base_at = self._tokens, silent_since
        is_moving = self._moved_at is not None and now - self._moved_at <= MOVING_S
        return is_moving and self._tokens - self._base <= RECOMPUTED * open_tokens


def has_work(core: CoreSteps) -> bool:
    """Whether a core had requests when it last said so."""
    return core.running + core.waiting > 0
