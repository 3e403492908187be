"""What a request is charged: estimated when its body is known, and corrected when it has ended."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field

from sidecar.events import LoadReport, Usage
from sidecar.images import header_geometry
from sidecar.kernels.families.videos import VideoSpec
from sidecar.kernels.grid import ProcessorSpec
from sidecar.load.cost_model import settled_work
from sidecar.load.estimator import Estimate, Estimator
from sidecar.load.event_tokens import EventTokens
from sidecar.load.ledger import LEFT_OUTCOMES, actual_work
from sidecar.load.prefill_queue import LeftPrompts
from sidecar.relay.admission import Admission
from sidecar.relay.pricing import tokenizer, video_price
from sidecar.relay.pricing.quota import Quota
from sidecar.relay.pricing.tenant_accounts import TenantCharge
from sidecar.relay.pricing.tokenizer import TokenCounter
from sidecar.relay.request_body import ImagePart, ParsedBody


@dataclass(frozen=True, slots=True)
class Pricing:
    """One per relay process. None: no `quota` of tenants, no `counter` of tokens, no `spec` of an image processor,
    no `video_spec` of a video processor."""

    estimator: Estimator
    quota: Quota | None = None
    counter: TokenCounter | None = None
    spec: ProcessorSpec | None = None
    video_spec: VideoSpec | None = None
    event_tokens: EventTokens = field(default_factory=EventTokens)
    left_prompts: LeftPrompts = field(default_factory=LeftPrompts)

    def on_load_report(self, load: LoadReport) -> None:
        self.estimator.cached.on_engine(load.process, load.cached_share)
        if self.quota is not None:
            self.quota.on_load_report(load)

    async def charge(self, admission: Admission, body: ParsedBody) -> Estimate | None:
        """Charge the request to its tenant, before any work is done for it. Raises TenantLimited.

        Returns what it charged for; None where tenants have no limits.
        """
        admission.tokens_per_event = self.event_tokens.get(admission.tenant, admission.shape.model)
        if self.counter is not None and body.scan is not None:
            admission.token_count = await self.counter.count(body.scan.found)
        if self.spec is not None and body.images:
            admission.image_tokens = tokens_of(body.images, self.spec)
        if admission.shape.videos and body.scan is not None:
            sampling = video_price.sampling_of(body.scan.options)
            time_tokens = tokenizer.TIME_TOKENS if self.counter is None else self.counter.time_tokens
            admission.shape = video_price.with_videos(
                admission.shape, body.videos, sampling, self.video_spec, time_tokens
            )
        if self.quota is None:
            return None
        estimate = self.estimate(admission, [])
        reserved = self.estimator.reserved_mu(admission.tenant, admission.shape, estimate.work)
        admission.charge = self.quota.take(admission.tenant, estimate.mu, reserved)
        return estimate

    def estimate(self, admission: Admission, image_tokens: Sequence[int]) -> Estimate:
        """What the request is expected to take. `image_tokens`: those of prepared images, which are exact."""
        counted = None if admission.token_count is None else admission.token_count.tokens
        known = image_tokens or admission.image_tokens
        return self.estimator.estimate(admission.tenant, admission.shape, known, counted)

    def price_milli(self, admission: Admission, usage: Usage) -> int:
        """The price of a usage in milli-MU, as it will settle."""
        return round(1000 * self.estimator.mu(settled_work(admission.work, usage, 0)))

    def top_up(self, admission: Admission, mu: float) -> None:
        """Charge another `mu` to a request that exceeds its estimate. Raises TenantLimited."""
        before = admission.charge
        if self.quota is None or before is None:
            return
        if (more := self.quota.take(admission.tenant, mu, mu)) is not None:
            limit = more.limit if more.mu else before.limit
            admission.charge = TenantCharge(before.row, limit, before.mu + more.mu, before.high + more.high)

    def settle(self, admission: Admission) -> None:
        """The request has settled: correct its charge to what it used, and learn from it."""
        end = admission.settled
        if end is None:
            return
        if self.quota is not None:
            started, share = end.first_at is not None, 1.0
            if not started and end.sent_at is not None and end.outcome in LEFT_OUTCOMES:
                prefill = self.estimator.prefill_seconds(admission.work)
                share = self.left_prompts.share(prefill, end.sent_at, end.at)
            work = actual_work(admission.work, end, started=started, delivered=end.delivered_tokens, share=share)
            self.quota.settle(admission.charge, 0.0 if work is None else self.estimator.mu(work))
        if end.usage is not None and not end.estimated and end.outcome == "ok":
            if admission.events is not None and not admission.shape.withholds:
                tokens = end.usage.completion_tokens
                self.event_tokens.learn(admission.tenant, admission.shape.model, tokens, admission.tokens)
            counted = admission.token_count
            exact = counted.tokens if counted is not None and counted.exact else None
            self.estimator.learn(admission.tenant, admission.shape, end.usage, exact)
        elif (told := admission.told) is not None and told.prompt and told.cached is not None:
            # the client left, but the engine had already said how much of the prompt it knew
            self.estimator.learn_cached(admission.tenant, admission.shape, told.prompt, told.cached)


def tokens_of(parts: Iterable[ImagePart], spec: ProcessorSpec) -> list[int]:
    """The tokens of the images whose headers state their size, before anything is decoded.

    One that the model's processor would refuse is left out, too. Sizes are taken as stored: a photo that is to be
    rotated has the same number of tokens, or nearly.
    """
    found: list[int] = []
    for part in parts:
        if (header := header_geometry.read_size(part.data, is_base64=True)) is not None:
            with suppress(ValueError):
                found.append(spec.geometry(header.height, header.width).tokens)
    return [tokens for tokens in found if tokens]
