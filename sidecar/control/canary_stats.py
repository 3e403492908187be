"""Pure: what canaries cost."""

from __future__ import annotations

from dataclasses import dataclass

from sidecar.events import CanaryResult, RequestSize
from sidecar.load import cost_model
from sidecar.snapshot import CanaryUse


@dataclass(slots=True)
class CanaryStats:
    """The canaries that passed since the sidecar started: no tenant's work, so they are counted here."""

    co: cost_model.Coefficients
    count: int = 0
    mu: float = 0.0
    tokens: int = 0

    def add(self, result: CanaryResult) -> None:
        """Count one that passed."""
        output = 1 if result.digest else 0  # an embedding has no output tokens
        self.count += 1
        self.mu += cost_model.mu(RequestSize(uncached=result.prompt_tokens, output=output), self.co)
        self.tokens += result.prompt_tokens + output

    def use(self, *, garbage: bool, usable: bool | None = None) -> CanaryUse:
        """For reports."""
        return CanaryUse(self.count, self.mu, self.tokens, garbage, usable)
