"""Pure: whether an engine still takes the time that its coefficients say.

Two-sided CUSUM (Page 1954) on the log of measured over predicted time of a window of work, in two views:
- misfit: against the coefficients as they stand. What a step's weights cost is shared by those that decode together, so that the
  prediction is a range, from all of d being paid per token to all of it per step; only what lies outside of it counts.
- change: against what this engine used to take under a load of the same kind (how many decode together, the share of prefill).
Rules: what counts is what is over `slack`, the larger of SLACK, of the coefficients' own P90 error and of this engine's usual scatter.
Unless the engine says what of a prompt it had cached, to be faster than the coefficients says nothing, and to be so no longer neither.
While in doubt nothing is learned; what is stale is well
again after RECOVERY_WINDOWS windows within the slack. A load of a new kind is judged by a line through those that are known, if it is near to them
(a slower engine has more open, so that its load is soon of a new kind); else it is learned.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final

from sidecar.load import cost_model
from sidecar.load.cost_model import Coefficients
from sidecar.load.gpu_specs import find_gpu
from sidecar.load.work_windows import STEP_INDEX, WINDOW_TERMS, WorkWindow
from sidecar.readings import EngineIdentity

CUSUM_SLACK: Final = 0.2  # of a log: 22 % slower or faster is nothing
CUSUM_LIMIT: Final = 9.0  # times the slack: the sum at which it is an alarm
MAX_RESIDUAL: Final = 1.0  # of a log; no single window is an alarm
MIN_BASELINE_WINDOWS: Final = 8  # windows of a kind of load before a change can be told in it
MAX_BASELINE_WINDOWS: Final = 200  # windows that a kind of load remembers
MAX_WINDOW_MS: Final = 1e12  # milliseconds of a window, before it is no measurement
DEVIATION_PER_MEAN_DISTANCE: Final = 1.25  # deviation of a normal distribution, in mean distances from its middle
RECOVERY_WINDOWS: Final = 20
MAX_LOAD_KINDS: Final = 200  # kinds of load kept
EXTRAPOLATION_STEPS: Final = (
    2  # steps of `together` that the line is believed beyond what is known; one, where there is no line
)
MAX_SLOPE_PER_STEP: Final = math.log(2) / 2  # of that line, per step: were nothing of d paid per step

CAPACITY_FLAGS: Final = ("gpu_memory_utilization",)  # settings that change how much is held, not what it costs

LoadKind = tuple[int, int]  # how many decode together, in steps of the square root of two; the third of prefill


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
        low, high, middle = predict_range(window, self.co)
        if not (all(0 < ms < MAX_WINDOW_MS for ms in (low, high, window.ms)) and 1 <= window.together < MAX_WINDOW_MS):
            return
        state, slack = self.memory, self.slack
        state.seen += 1
        state.misfit.add(log_excess(window.ms, low, high), slack)
        load, residual = load_kind(window, self.co), math.log(window.ms / middle)
        usual = expected_residual(state.usual, load)
        if usual is not None:
            state.change.add(residual - (usual if self.caching else max(usual, 0.0)), slack)
        if not self.caching:
            state.misfit.under = state.change.under = 0.0
        if not self._is_doubtful() and not state.stale:
            self._learn(load, residual, usual)
        self._judge()

    @property
    def slack(self) -> float:
        """Of a log residual: what says nothing."""
        return max(CUSUM_SLACK, math.log1p(self.co.p90), self.memory.scatter)

    def _is_doubtful(self) -> bool:
        limit = CUSUM_LIMIT * self.slack / 2
        return any(s > limit for sums in (self.memory.misfit, self.memory.change) for s in (sums.over, sums.under))

    def _learn(self, load: LoadKind, residual: float, usual: float | None) -> None:
        state = self.memory
        own = state.usual.setdefault(baseline_key(load), Baseline())
        if usual is not None:
            if own.windows < MIN_BASELINE_WINDOWS and abs(residual - usual) > self.slack:
                return
            off = min(abs(residual - usual), MAX_RESIDUAL)
            state.scatter += 0.02 * (DEVIATION_PER_MEAN_DISTANCE * off - state.scatter)
        own.windows = min(own.windows + 1, MAX_BASELINE_WINDOWS)
        own.mean += (residual - own.mean) / own.windows
        while len(state.usual) > MAX_LOAD_KINDS:
            del state.usual[next(iter(state.usual))]

    def _judge(self) -> None:
        state, limit = self.memory, CUSUM_LIMIT * self.slack
        slower, faster = max(state.misfit.over, state.change.over), max(state.misfit.under, state.change.under)
        if (
            state.stale
            and min(
                state.misfit.calm, state.change.calm if state.change.over + state.change.under else RECOVERY_WINDOWS
            )
            >= RECOVERY_WINDOWS
        ):
            state.stale, state.misfit, state.change = "", Cusum(), Cusum()
        elif not state.stale and max(slower, faster) > limit:
            how = "longer" if slower >= faster else "shorter"
            against = (
                "than it used to" if max(state.change.over, state.change.under) > limit else "than its coefficients say"
            )
            state.stale = f"the engine takes {how} {against}"


def predict_range(window: WorkWindow, co: Coefficients) -> tuple[float, float, float]:
    """Milliseconds of a window: least and most that d allows, and were all of it paid per step."""
    work = dict(zip(WINDOW_TERMS, window.work, strict=True))
    rest = sum(getattr(co, name) * work[name] for name in cost_model.TERMS if name != "d")
    per_token, per_step = co.d * work["d"], co.d * co.batch * work["step"]
    return rest + min(per_token, per_step), rest + max(per_token, per_step), rest + per_step


def log_excess(ms: float, low: float, high: float) -> float:
    """The log of how far a measurement lies outside of its range; 0 within it."""
    return math.log(ms / high) if ms > high else math.log(ms / low) if ms < low else 0.0


def load_kind(window: WorkWindow, co: Coefficients) -> LoadKind:
    """The kind of load."""
    _, _, whole = predict_range(window, co)
    decode = co.d * co.batch * window.work[STEP_INDEX] + co.f * window.work[WINDOW_TERMS.index("f")]
    return round(2 * math.log2(window.together)), min(2, int(3 * (1 - decode / whole)))


def baseline_key(load: LoadKind) -> str:
    """As it is kept."""
    return f"{load[0]}/{load[1]}"


def expected_residual(baselines: Mapping[str, Baseline], load: LoadKind) -> float | None:
    """The usual log residual under a load: its own, else that of a line through its neighbours; None where nothing near is known."""
    own = baselines.get(baseline_key(load))
    if own is not None and own.windows >= MIN_BASELINE_WINDOWS:
        return own.mean
    known = [
        (int(step), usual.mean)
        for step, _, third in (key.partition("/") for key in baselines)
        if (usual := baselines[f"{step}/{third}"]).windows >= MIN_BASELINE_WINDOWS and third == str(load[1])
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
    return max(0.0, min(MAX_SLOPE_PER_STEP, slope)), EXTRAPOLATION_STEPS


def find_mismatch(co: Coefficients, identity: EngineIdentity) -> str:
    """What of the coefficients' origin is another one now; "" where nothing is, or one of the two sides does not know."""
    if co.model and identity.models and co.model not in identity.models:
        return f"measured on the model {co.model}, the engine serves {identity.models[0]}"
    if co.engine not in ("", "unknown") and identity.engine and co.engine != identity.engine:
        return f"measured on version {co.engine} of the engine, it is {identity.engine}"
    if co.gpu and identity.gpus and all(identity.gpus) and not any(is_same_gpu(co.gpu, gpu) for gpu in identity.gpus):
        return f"measured on {co.gpu}, here is {identity.gpus[0]}"
    now = dict(flag.split("=", 1) for flag in identity.flags)
    for flag in filter(None, co.flags.split(",")):
        name, _, value = flag.partition("=")
        if name not in CAPACITY_FLAGS and now.get(name, value) != value:
            return f"measured with {flag}, the engine runs with {name}={now[name]}"
    return ""


def is_same_gpu(a: str, b: str) -> bool:
    """Whether two names are of the same GPU: "H100" and "NVIDIA H100 80GB HBM3"."""
    return a == b or (find_gpu(a) is not None and find_gpu(a) == find_gpu(b))
