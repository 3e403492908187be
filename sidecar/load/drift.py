"""Pure: whether an engine still takes as long as its coefficients predict.

A two-sided CUSUM (Page 1954) on the log of measured over predicted time, per window of work, in two views:
- misfit: against the coefficients. Requests that decode together share the reading of the weights, so the prediction is
  a range: d paid per token, to d paid per step. Only time outside the range counts.
- change: against this engine's usual time under the same kind of load (requests decoding together, share of prefill).

Rules:
- Only deviations above `slack` count: the largest of CUSUM_SLACK, the coefficients' P90 error, and the usual scatter.
- Unless the engine reports cached prompt tokens, being faster than predicted, or ceasing to be, is not evidence.
- Nothing is learned while in doubt. Stale coefficients hold again after RECOVERY_WINDOWS windows within the slack.
- A new kind of load is judged by a line through known kinds near it, else learned: a slower engine has more requests
  open, so its load soon is of a new kind.
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

CUSUM_SLACK: Final = 0.2  # of log residuals: 22 % slower or faster does not count
CUSUM_LIMIT: Final = 9.0  # multiple of the slack at which the sum raises an alarm
MAX_RESIDUAL: Final = 1.0  # so that no single window raises an alarm
MIN_BASELINE_WINDOWS: Final = 8  # of a kind of load before a change in it can be detected
MAX_BASELINE_WINDOWS: Final = 200  # that the mean of a kind of load is over
MAX_WINDOW_MS: Final = 1e12
DEVIATION_PER_MEAN_DISTANCE: Final = 1.25  # of a normal distribution: standard over mean absolute deviation
RECOVERY_WINDOWS: Final = 20
MAX_LOAD_KINDS: Final = 200
EXTRAPOLATION_STEPS: Final = 2  # beyond known kinds along their line; one step if there is no line
MAX_SLOPE_PER_STEP: Final = math.log(2) / 2  # of that line, if nothing of d is paid per step
CAPACITY_FLAGS: Final = ("gpu_memory_utilization",)  # they change how much fits, not what it costs

# Requests that decode together, in powers of the square root of two; the share of prefill, in thirds.
LoadKind = tuple[int, int]


@dataclass(slots=True)
class Baseline:
    """The mean log residual of one kind of load."""

    windows: int = 0
    mean: float = 0.0


@dataclass(slots=True)
class Cusum:
    """Sums of slower (`over`) and faster (`under`) windows; `calm` counts windows in a row within the slack."""

    over: float = 0.0
    under: float = 0.0
    calm: int = 0

    def add(self, residual: float, slack: float) -> None:
        residual = max(-MAX_RESIDUAL, min(MAX_RESIDUAL, residual))
        self.over = max(0.0, self.over + residual - slack)
        self.under = max(0.0, self.under - residual - slack)
        self.calm = self.calm + 1 if abs(residual) <= slack else 0


@dataclass(slots=True)
class DriftState:
    """What was learned, in plain values that can be saved. `stale` is the reason, `scatter` that of residuals."""

    stale: str = ""
    scatter: float = 0.0
    seen: int = 0
    misfit: Cusum = field(default_factory=Cusum)
    change: Cusum = field(default_factory=Cusum)
    usual: dict[str, Baseline] = field(default_factory=dict)


@dataclass(slots=True)
class Drift:
    """Compares windows to predictions. `caching`: this engine reports cached prompt tokens."""

    co: Coefficients
    memory: DriftState = field(default_factory=DriftState)
    caching: bool = False

    def add(self, window: WorkWindow) -> None:
        low, high, middle = predict_range(window, self.co)
        numbers = low, middle, high, window.ms, window.together
        if not all(0 < number < MAX_WINDOW_MS for number in numbers) or window.together < 1:
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
        """Log residuals within this do not count."""
        return max(CUSUM_SLACK, math.log1p(self.co.p90), self.memory.scatter)

    def _is_doubtful(self) -> bool:
        limit = CUSUM_LIMIT * self.slack / 2
        return any(s > limit for sums in (self.memory.misfit, self.memory.change) for s in (sums.over, sums.under))

    def _learn(self, load: LoadKind, residual: float, usual: float | None) -> None:
        state = self.memory
        own = state.usual.setdefault("{}/{}".format(*load), Baseline())
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
        calm = state.misfit.calm
        if state.change.over + state.change.under:
            calm = min(calm, state.change.calm)
        if state.stale and calm >= RECOVERY_WINDOWS:
            state.stale, state.misfit, state.change = "", Cusum(), Cusum()
        elif not state.stale and max(slower, faster) > limit:
            how = "slower" if slower >= faster else "faster"
            has_changed = max(state.change.over, state.change.under) > limit
            state.stale = f"the engine is {how} than {'it used to be' if has_changed else 'its coefficients predict'}"


def predict_range(window: WorkWindow, co: Coefficients) -> tuple[float, float, float]:
    """Milliseconds of a window: the lowest and highest that d allows, and with all of d paid per step."""
    work = dict(zip(WINDOW_TERMS, window.work, strict=True))
    rest = sum(getattr(co, name) * work[name] for name in cost_model.TERMS if name != "d")
    per_token, per_step = co.d * work["d"], co.d * co.batch * work["step"]
    return rest + min(per_token, per_step), rest + max(per_token, per_step), rest + per_step


def log_excess(ms: float, low: float, high: float) -> float:
    """The log of a measurement over the bound of the range that it exceeds; 0 within the range."""
    return math.log(ms / high) if ms > high else math.log(ms / low) if ms < low else 0.0


def load_kind(window: WorkWindow, co: Coefficients) -> LoadKind:
    _, _, whole = predict_range(window, co)
    decode = co.d * co.batch * window.work[STEP_INDEX] + co.f * window.work[WINDOW_TERMS.index("f")]
    return round(2 * math.log2(window.together)), min(2, int(3 * (1 - decode / whole)))


def expected_residual(baselines: Mapping[str, Baseline], load: LoadKind) -> float | None:
    """The usual log residual under a load: its own, else by a line through its neighbours; None if none is near."""
    learned = {key.partition("/"): usual for key, usual in baselines.items() if usual.windows >= MIN_BASELINE_WINDOWS}
    known = {int(step): usual.mean for (step, _, third), usual in learned.items() if third == str(load[1])}
    if not known or load[0] in known:
        return known.get(load[0])
    nearest = min(known, key=lambda step: abs(step - load[0]))
    slope, reach = _slope(known)
    return known[nearest] + slope * (load[0] - nearest) if abs(load[0] - nearest) <= reach else None


def _slope(known: Mapping[int, float]) -> tuple[float, int]:
    """The slope of a line through known loads, within what batching can explain; and how far to extrapolate."""
    if max(known) - min(known) < EXTRAPOLATION_STEPS:
        return 0.0, 1
    middle, level = sum(known) / len(known), sum(known.values()) / len(known)
    slope = sum((s - middle) * (m - level) for s, m in known.items()) / sum((s - middle) ** 2 for s in known)
    return max(0.0, min(MAX_SLOPE_PER_STEP, slope)), EXTRAPOLATION_STEPS


def find_mismatch(co: Coefficients, identity: EngineIdentity) -> str:
    """How the engine differs from the one that was measured; "" if it does not, or either side is unknown."""
    if co.model and identity.models and co.model not in identity.models:
        return f"measured on model {co.model}, but the engine serves {identity.models[0]}"
    if co.engine not in ("", "unknown") and identity.engine and co.engine != identity.engine:
        return f"measured on engine version {co.engine}, but it is {identity.engine}"
    if co.gpu and identity.gpus and all(identity.gpus) and not any(is_same_gpu(co.gpu, gpu) for gpu in identity.gpus):
        return f"measured on {co.gpu}, but this GPU is {identity.gpus[0]}"
    now = dict(flag.split("=", 1) for flag in identity.flags)
    for flag in filter(None, co.flags.split(",")):
        name, _, value = flag.partition("=")
        if name not in CAPACITY_FLAGS and now.get(name, value) != value:
            return f"measured with {flag}, but the engine runs with {name}={now[name]}"
    return ""


def is_same_gpu(a: str, b: str) -> bool:
    """True if two names are of the same GPU: "H100" and "NVIDIA H100 80GB HBM3"."""
    return a == b or (find_gpu(a) is not None and find_gpu(a) == find_gpu(b))
