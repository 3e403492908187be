"""What a request is held and charged for: estimated when its body is known, charged to its tenant, and corrected when it is over."""

from __future__ import annotations

from sidecar.facts import Published
from sidecar.ledger import spent
from sidecar.relay.admission import Admission
from sidecar.relay.estimate import Estimator
from sidecar.relay.quota import Quota


class Pricing:
    """One per relay process. `quota` is None where tenants have no limits."""

    def __init__(self, estimator: Estimator, quota: Quota | None = None) -> None:
        self._estimator = estimator
        self._quota = quota

    def heard(self, load: Published) -> None:
        """A load report."""
        if self._quota is not None:
            self._quota.heard(load)

    def charge(self, admission: Admission) -> None:
        """Take the request out of its tenant's limits, before any work is done for it. Raises TenantLimited."""
        if self._quota is not None:
            estimate = self._estimator.estimate(admission.tenant, admission.shape, [])
            admission.lease = self._quota.take(admission.tenant, estimate)

    def admit(self, admission: Admission, image_tokens: list[int]) -> None:
        """Hold what it is expected to take. `image_tokens`: those that are known."""
        estimate = self._estimator.estimate(admission.tenant, admission.shape, image_tokens)
        admission.admit(admission.shape, estimate)

    def over(self, admission: Admission) -> None:
        """It has settled: learn from it, and correct its charge to what it used."""
        end = admission.settled
        if end is None:
            return
        if end.usage is not None and end.outcome == "ok":
            self._estimator.learn(admission.tenant, admission.shape, end.usage)
        if self._quota is not None:
            started = end.first_at is not None
            work = spent(admission.work, end, started=started, delivered=end.delivered_tokens)
            self._quota.settle(admission.lease, 0.0 if work is None else self._estimator.mu(work))
