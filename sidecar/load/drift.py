"""Pure: whether an engine still takes the time that its coefficients say.

Two-sided CUSUM (Page 1954) on the log of measured over predicted time of a window of work, in two views:
- misfit: against the coefficients as they stand. What a step's weights cost is shared by those that decode together, so that the
  prediction is a range, from all of d being paid per token to all of it per step; only what lies outside of it counts.
- change: against what this engine used to take under a load of the same kind (how many decode together, the share of prefill).
Rules: what counts is what is over `slack`, the larger of SLACK, of the coefficients' own P90 error and of this engine's usual scatter.
Unless the engine says what of a prompt it had cached, to be faster than the coefficients says nothing, and to be so no longer neither.
While in doubt nothing is learned; what is stale is well
again after CALM windows within the slack. A load of a new kind is judged by a line through those that are known, if it is near to them
(a slower engine has more open, so that its load is soon of a new kind); else it is learned.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final

from sidecar.load import cost_model
from sidecar.load.cost_model import Coefficients
from sidecar.load.gpu_specs import find
from sidecar.load.work_windows import STEP, TERMS, WorkWindow
from sidecar.readings import EngineIdentity

CUSUM_SLACK: Final = 0.2  # of a log: 22 % slower or faster is nothing
CUSUM_LIMIT: Final = 9.0  # times the slack: the sum at which it is an alarm
MAX_RESIDUAL: Final = 1.0  # of a log; no single window is an alarm
LEARN: Final = 8  # windows of a kind of load before a change can be told in it
BASELINE_WINDOWS: Final = 200  # windows that a kind of load remembers
MAX_CUSUM: Final = 1e12  # milliseconds of a window, before it is no measurement
NORMAL: Final = 1.25  # deviation of a normal distribution, in mean distances from its middle
CALM: Final = 20
KINDS: Final = 200  # kinds of load kept
EXTRAPOLATION_STEPS: Final = (
    2  # steps of `together` that the line is believed beyond what is known; one, where there is no line
)
STEEPEST: Final = math.log(2) / 2  # of that line, per step: were nothing of d paid per step

CAPACITY: Final = ("gpu_memory_utilization",)  # settings that change how much is held, not what it costs

Kind = tuple[int, int]  # how many decode together, in steps of the square root of two; the third of prefill


@dataclass(slots=True)
class Baseline:
    """The mean log residual of one kind of load."""

    windows: int = 0
    mean: float = 0.0


@dataclass(slots=True)
class Cusum:
    """CUSUM: `over` of what was slower, `under` of what was faster; `calm` windows in a row within the slack."""

    over: float = 0.0
    under: float = 0.0
    calm: int = 0

    def add(self, residual: float, slack: float) -> None:
        """One more residual."""
        r = max(-MAX_RESIDUAL, min(MAX_RESIDUAL, residual))
        self.over = max(0.0, self.over + r - slack)
        self.under = max(0.0, self.under - r - slack)
        self.calm = self.calm + 1 if abs(r) <= slack else 0


@dataclass(slots=True)
class DriftState:
    """All that is known; plain numbers, so that they can be kept. `stale` is why, "" for fresh; `scatter` that of a log residual."""

    stale: str = ""
    scatter: float = 0.0
    seen: int = 0
    misfit: Cusum = field(default_factory=Cusum)
    change: Cusum = field(default_factory=Cusum)
    usual: dict[str, Baseline] = field(default_factory=dict)


@dataclass(slots=True)
class Drift:
    """Judges windows. `caching`: this engine says what of its prompts it had cached."""

    co: Coefficients
    memory: DriftState = field(default_factory=DriftState)
    caching: bool = False

    def add(self, window: WorkWindow) -> None:
        """Judge one window."""
        low, high, middle = prediction(window, self.co)
        if not (all(0 < ms < MAX_CUSUM for ms in (low, high, window.ms)) and 1 <= window.together < MAX_CUSUM):
            return
        m, slack = self.memory, self.slack
        m.seen += 1
        m.misfit.add(outside(window.ms, low, high), slack)
        load, residual = kind(window, self.co), math.log(window.ms / middle)
        usual = expected(m.usual, load)
        if usual is not None:
            m.change.add(residual - (usual if self.caching else max(usual, 0.0)), slack)
        if not self.caching:
            m.misfit.under = m.change.under = 0.0
        if not self._doubt() and not m.stale:
            self._learn(load, residual, usual)
        self._judge()

    @property
    def slack(self) -> float:
        """Of a log residual: what says nothing."""
        return max(CUSUM_SLACK, math.log1p(self.co.p90), self.memory.scatter)

    def _doubt(self) -> bool:
        limit = CUSUM_LIMIT * self.slack / 2
        return any(s > limit for sums in (self.memory.misfit, self.memory.change) for s in (sums.over, sums.under))

    def _learn(self, load: Kind, residual: float, usual: float | None) -> None:
        m = self.memory
        own = m.usual.setdefault(name(load), Baseline())
        if usual is not None:
            if own.windows < LEARN and abs(residual - usual) > self.slack:
                return
            off = min(abs(residual - usual), MAX_RESIDUAL)
            m.scatter += 0.02 * (NORMAL * off - m.scatter)
        own.windows = min(own.windows + 1, BASELINE_WINDOWS)
        own.mean += (residual - own.mean) / own.windows
        while len(m.usual) > KINDS:
            del m.usual[next(iter(m.usual))]

    def _judge(self) -> None:
        m, limit = self.memory, CUSUM_LIMIT * self.slack
        slower, faster = max(m.misfit.over, m.change.over), max(m.misfit.under, m.change.under)
        if m.stale and min(m.misfit.calm, m.change.calm if m.change.over + m.change.under else CALM) >= CALM:
            m.stale, m.misfit, m.change = "", Cusum(), Cusum()
        elif not m.stale and max(slower, faster) > limit:
            how = "longer" if slower >= faster else "shorter"
            against = "than it used to" if max(m.change.over, m.change.under) > limit else "than its coefficients say"
            m.stale = f"the engine takes {how} {against}"


def prediction(window: WorkWindow, co: Coefficients) -> tuple[float, float, float]:
    """Milliseconds of a window: least and most that d allows, and were all of it paid per step."""
    work = dict(zip(TERMS, window.work, strict=True))
    rest = sum(getattr(co, name) * work[name] for name in cost_model.TERMS if name != "d")
    per_token, per_step = co.d * work["d"], co.d * co.batch * work["step"]
    return rest + min(per_token, per_step), rest + max(per_token, per_step), rest + per_step


def outside(ms: float, low: float, high: float) -> float:
    """The log of how far a measurement lies outside of its range; 0 within it."""
    return math.log(ms / high) if ms > high else math.log(ms / low) if ms < low else 0.0


def kind(window: WorkWindow, co: Coefficients) -> Kind:
    """The kind of load."""
    _, _, whole = prediction(window, co)
    decode = co.d * co.batch * window.work[STEP] + co.f * window.work[TERMS.index("f")]
    return round(2 * math.log2(window.together)), min(2, int(3 * (1 - decode / whole)))


def name(load: Kind) -> str:
    """As it is kept."""
    return f"{load[0]}/{load[1]}"


def expected(seen: Mapping[str, Baseline], load: Kind) -> float | None:
    """The usual log residual under a load: its own, else that of a line through its neighbours; None where nothing near is known."""
    own = seen.get(name(load))
    if own is not None and own.windows >= LEARN:
        return own.mean
    known = [
        (int(step), usual.mean)
        for step, _, third in (key.partition("/") for key in seen)
        if (usual := seen[f"{step}/{third}"]).windows >= LEARN and third == str(load[1])
    ]
    if not known:
        return None
    nearest, mean = min(known, key=lambda each: abs(each[0] - load[0]))
    slope, reach = _slope(known)
    return mean + slope * (load[0] - nearest) if abs(load[0] - nearest) <= reach else None


def _slope(known: list[tuple[int, float]]) -> tuple[float, int]:
    """Of the line through known loads, within what a batch can explain; and how far it is believed."""
    steps = [step for step, _ in known]
    if max(steps) - min(steps) < EXTRAPOLATION_STEPS:
        return 0.0, 1
    middle, level = sum(steps) / len(known), sum(mean for _, mean in known) / len(known)
    slope = sum((s - middle) * (m - level) for s, m in known) / sum((s - middle) ** 2 for s in steps)
    return max(0.0, min(STEEPEST, slope)), EXTRAPOLATION_STEPS


def mismatch(co: Coefficients, seen: EngineIdentity) -> str:
    """What of the coefficients' origin is another one now; "" where nothing is, or one of the two sides does not know."""
    if co.model and seen.models and co.model not in seen.models:
        return f"measured on the model {co.model}, the engine serves {seen.models[0]}"
    if co.engine not in ("", "unknown") and seen.engine and co.engine != seen.engine:
        return f"measured on version {co.engine} of the engine, it is {seen.engine}"
    if co.gpu and seen.gpus and all(seen.gpus) and not any(same(co.gpu, gpu) for gpu in seen.gpus):
        return f"measured on {co.gpu}, here is {seen.gpus[0]}"
    now = dict(flag.split("=", 1) for flag in seen.flags)
    for flag in filter(None, co.flags.split(",")):
        name, _, value = flag.partition("=")
        if name not in CAPACITY and now.get(name, value) != value:
            return f"measured with {flag}, the engine runs with {name}={now[name]}"
    return ""


def same(a: str, b: str) -> bool:
    """Whether two names are of the same GPU: "H100" and "NVIDIA H100 80GB HBM3"."""
    return a == b or (find(a) is not None and find(a) == find(b))
