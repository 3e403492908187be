"""Pure: how many tokens an event of a stream holds, learned from streams that ended with a usage.

One for most engines, and more with speculative decoding or where events are sent at intervals. A stream that its
client leaves has no usage: its events are counted, and are worth what those of its tenant and model were, or else what
those of the model's other tenants were.
"""

from __future__ import annotations

from typing import Final

from sidecar.load.tenant_means import Prior, TenantMeans

MAX_KEYS: Final = 1024  # of tenants and models
MAX_WEIGHT: Final = 512  # events of one stream, so that no stream dominates
MAX_RATIO: Final = 64.0
# One token, which counts as one event, so that after one stream the next is counted within 2 %.
PRIOR: Final = Prior(1.0, 1.0, (1 / MAX_RATIO, MAX_RATIO))


class EventTokens:
    """The means of tenants and models."""

    def __init__(self) -> None:
        self._means = TenantMeans(PRIOR, MAX_KEYS)

    def get(self, tenant: str, model: str) -> float:
        """Tokens of an event."""
        return self._means.get(tenant, model)

    def learn(self, tenant: str, model: str, tokens: int, events: int) -> None:
        """A stream of `events` ended, and had `tokens`."""
        if events > 0 and tokens > 0:
            ratio = min(MAX_RATIO, max(1 / MAX_RATIO, tokens / events))
            self._means.add(tenant, model, ratio, min(events, MAX_WEIGHT))
