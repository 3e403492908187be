"""Pure: how far the coefficients in use can be trusted: the re-fit beside them, and whether they still hold.

Coefficients that were not measured (a roofline, the default) are not called stale, because they never were fresh: `source` and a wide
margin say what they are. The re-fit is told all the same: it is what they should be.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable
from dataclasses import replace
from typing import Final

from sidecar.load import cost_model
from sidecar.load.cost_model import Coefficients
from sidecar.load.drift import Drift, DriftState, find_mismatch
from sidecar.load.ledger import AdmissionHold, Settlement
from sidecar.load.refit import Refit, RefitResult
from sidecar.load.work_windows import WorkWindows
from sidecar.readings import EngineIdentity
from sidecar.snapshot import PriceUse, ShadowUse

UNMEASURED_MARGIN: Final = (
    1.0  # margin of a roofline: REACHED and READ are half and 70 %, engines differ by a factor of two
)
DEFAULT_MEASURED_MARGIN: Final = 0.25  # of a file that does not say its P90 error: what calibration aims at
MIN_MARGIN: Final = 0.1
STALE_MARGIN_FACTOR: Final = 2.0  # times the margin


class CoefficientMonitor:
    """Watches the coefficients of one engine."""

    def __init__(self, co: Coefficients, now: float) -> None:
        self.co = co
        self.refit = Refit(co)
        self.drift = Drift(co)
        self.stale = ""  # why; "" while they hold
        self._windows = WorkWindows(co, now)
        self._prices = _prices(co)

    def settled(self, settlement: Settlement) -> None:
        """A request ended."""
        self.drift.caching |= settlement.settled.usage is not None and settlement.settled.usage.cached_tokens > 0
        self._windows.settled(settlement)

    def tick(self, holds: Iterable[AdmissionHold], now: float, identity: EngineIdentity, *, trusted: bool) -> None:
        """Judge what ended by now. `trusted`: the engine works as usual, for nobody but us, and we are well."""
        if not trusted:
            self._windows.spoil(now)
        for window in self._windows.close(holds, now):
            self.refit.add(window)
            if cost_model.is_measured(self.co):
                self.drift.add(window)
        self.stale = self._stale_reason(identity)

    def restore(self, state: DriftState) -> None:
        """Know what an earlier process of ours knew."""
        self.drift.memory = state

    @property
    def margin(self) -> float:
        """How far off a price may be, as a share of it."""
        usual = (
            max(self.co.p90 or DEFAULT_MEASURED_MARGIN, MIN_MARGIN)
            if cost_model.is_measured(self.co)
            else UNMEASURED_MARGIN
        )
        return usual * (STALE_MARGIN_FACTOR if self.stale else 1.0)

    def shadow(self) -> Coefficients | None:
        """The re-fit as coefficients of their own, for whoever wants to use them; None while there is too little work."""
        shadow = self.refit.shadow()
        if shadow is None:
            return None
        text = repr([(name, getattr(shadow.co, name)) for name in cost_model.TERMS])
        fingerprint = "refit-" + hashlib.blake2b(text.encode(), digest_size=6).hexdigest()
        error = round(math.expm1(shadow.error), 4)  # of windows, where a calibration has one of shapes
        return replace(
            shadow.co, fingerprint=fingerprint, source=f"refit of {self.co.fingerprint}", mape=error, p90=2 * error
        )

    def use(self) -> PriceUse:
        """For reports."""
        return PriceUse(
            source=self.co.source, stale=self.stale, margin=self.margin, windows=self.refit.windows,
            shadow=_shadow(self.refit.shadow()), **self._prices,
        )  # fmt: skip

    def _stale_reason(self, identity: EngineIdentity) -> str:
        if not cost_model.is_measured(self.co):
            return ""
        slower = self.drift.memory.stale
        if slower and identity.slowdowns:
            slower += f"; a GPU's clocks are held down ({', '.join(identity.slowdowns)})"
        return find_mismatch(self.co, identity) or slower


def _prices(co: Coefficients) -> dict[str, tuple[tuple[str, float], ...]]:
    return {"terms": cost_model.by_cause(cost_model.REFERENCE, co), "line": cost_model.line(co)}


def _shadow(shadow: RefitResult | None) -> ShadowUse | None:
    if shadow is None:
        return None
    values = tuple((name, getattr(shadow.co, name)) for name in cost_model.TERMS)
    return ShadowUse(values, cost_model.max_mu_per_minute(shadow.co), shadow.windows, shadow.error)
