"""Pure: coefficients fitted online to the engine's own work. Never used for prices; the capacity follows them.

Least squares over windows of work (least_squares.py). Decoding is fitted in two parts, per step and per token, because
a small batch pays as much for reading the weights. The reported d is for the batch size of the coefficients in use.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Final

from sidecar.load import cost_model
from sidecar.load.cost_model import Coefficients
from sidecar.load.least_squares import RelativeFit
from sidecar.load.work_windows import WINDOW_TERMS, WorkWindow

FORGETTING_FACTOR: Final = 0.995  # per window: one from half an hour of work ago weighs a third of a new one
RIDGE_WEIGHT: Final = 0.02  # of the coefficients in use, in windows
PRIOR_STEP_SHARE: Final = 0.8  # share of d that is paid per step, before anything is known
MIN_REFIT_WINDOWS: Final = 20  # before the fit is reported
TERM_COUNT: Final = len(WINDOW_TERMS)


class Refit:
    """Learns from windows. The fit's times are factors on the coefficients in use."""

    def __init__(self, co: Coefficients) -> None:
        self.co = co
        self.fit = RelativeFit(TERM_COUNT, FORGETTING_FACTOR, RIDGE_WEIGHT, MIN_REFIT_WINDOWS)
        self._prior = _prior(co)

    @property
    def windows(self) -> int:
        return self.fit.seen

    @property
    def error(self) -> float:
        return self.fit.error

    @property
    def times(self) -> list[float]:
        return self.fit.times

    def expected(self, window: WorkWindow) -> list[float]:
        """Milliseconds of each term of a window, by the coefficients in use."""
        return [x * p for x, p in zip(window.work, self._prior, strict=True)]

    def add(self, window: WorkWindow) -> None:
        self.fit.add(self.expected(window), window.ms)
        self.fit.solve()

    def shadow(self) -> Coefficients | None:
        """The fitted coefficients; None before MIN_REFIT_WINDOWS windows."""
        if not self.fit.is_settled:
            return None
        values = {name: p * t for name, p, t in zip(WINDOW_TERMS, self._prior, self.times, strict=True)}
        fitted = {name: values[name] for name in cost_model.TERMS}
        fitted["d"] = values["d"] + values["step"] / self.co.batch
        return replace(self.co, **fitted, fingerprint="", source="refit", mu_in_flight=0.0)  # type: ignore[arg-type]


def _prior(co: Coefficients) -> list[float]:
    """Each of WINDOW_TERMS, by the coefficients in use."""
    values = {name: getattr(co, name) for name in cost_model.TERMS}
    values |= {"step": PRIOR_STEP_SHARE * co.d * co.batch, "d": (1 - PRIOR_STEP_SHARE) * co.d}
    return [values[name] for name in WINDOW_TERMS]
