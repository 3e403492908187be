"""Pure: how far the coefficients in use can be trusted: whether they still hold, what a re-fit yields, and the capacity
that follows from it.

Coefficients that were not measured (a roofline, the default) are never stale; their margin is wide, and re-fit shown.
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
from sidecar.load.measured_capacity import MeasuredCapacity
from sidecar.load.refit import Refit
from sidecar.load.work_windows import WorkWindows
from sidecar.readings import EngineIdentity
from sidecar.snapshot import PriceUse, ShadowUse

UNMEASURED_MARGIN: Final = 1.0  # a roofline assumes 50 % of peak and 70 % of bandwidth; engines differ by a factor of 2
DEFAULT_MEASURED_MARGIN: Final = 0.25  # for a file without its P90 error: the error that calibration aims at
MIN_MARGIN: Final = 0.1
STALE_MARGIN_FACTOR: Final = 2.0


class CoefficientMonitor:
    """Watches the coefficients of one engine. `stale` is why they no longer hold, "" while they do."""

    def __init__(self, co: Coefficients, now: float, *, follows: bool = True) -> None:
        """`follows`: the capacity follows the measured speed."""
        self.co, self.stale = co, ""
        self.refit, self.drift, self._windows = Refit(co), Drift(co), WorkWindows(co, now)
        self.capacity = MeasuredCapacity(co, follows=follows)

    def settled(self, settlement: Settlement) -> None:
        self.drift.caching |= settlement.settled.usage is not None and settlement.settled.usage.cached_tokens > 0
        self._windows.settled(settlement)

    def tick(self, holds: Iterable[AdmissionHold], now: float, identity: EngineIdentity, *, trusted: bool) -> None:
        """Evaluate the work done by now.

        `trusted`: the engine works normally, serves only this sidecar, and the sidecar itself is healthy.
        """
        if not trusted:
            self._windows.spoil(now)
        for window in self._windows.close(holds, now):
            is_measured = cost_model.is_measured(self.co)
            if window.is_full or not is_measured:  # without measured coefficients, a rough speed is better than none
                self.capacity.add(window, self.refit, caching=self.drift.caching)
            if not window.is_full:
                continue
            self.refit.add(window)
            if is_measured:
                self.drift.add(window)
        self.stale = self._stale_reason(identity)

    def restore(self, state: DriftState) -> None:
        self.drift.memory = state

    @property
    def margin(self) -> float:
        """How far off a price may be, as a share of it."""
        if not cost_model.is_measured(self.co):
            return UNMEASURED_MARGIN
        return max(self.co.p90 or DEFAULT_MEASURED_MARGIN, MIN_MARGIN) * (STALE_MARGIN_FACTOR if self.stale else 1.0)

    def shadow(self) -> Coefficients | None:
        """The re-fit as coefficients ready for use; None until there was enough work."""
        shadow = self.refit.shadow()
        if shadow is None:
            return None
        text = repr([(name, getattr(shadow, name)) for name in cost_model.TERMS])
        fingerprint = "refit-" + hashlib.blake2b(text.encode(), digest_size=6).hexdigest()
        source = f"refit of {self.co.fingerprint}"
        error = round(math.expm1(self.refit.error), 4)  # over windows; a calibration's is over shapes
        return replace(shadow, fingerprint=fingerprint, source=source, mape=error, p90=2 * error)

    def use(self) -> PriceUse:
        """The coefficients as reports show them."""
        shadow = None
        if (found := self.refit.shadow()) is not None:
            values = tuple((name, getattr(found, name)) for name in cost_model.TERMS)
            shadow = ShadowUse(values, cost_model.max_mu_per_minute(found), self.refit.windows, self.refit.error)
        terms, line = cost_model.by_cause(cost_model.REFERENCE, self.co), cost_model.line(self.co)
        slowness = self.capacity.slowness
        return PriceUse(self.co.source, self.stale, self.margin, terms, line, self.refit.windows, shadow, slowness)

    def _stale_reason(self, identity: EngineIdentity) -> str:
        if not cost_model.is_measured(self.co):
            return ""
        slower = self.drift.memory.stale
        if slower and identity.slowdowns:
            slower += f"; a GPU's clocks are reduced ({', '.join(identity.slowdowns)})"
        return find_mismatch(self.co, identity) or slower
