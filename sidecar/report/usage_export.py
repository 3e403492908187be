"""Pure: usage records as rows of an hour for other systems: JSON lines, CSV, and FOCUS 1.4.

FOCUS is the FinOps Open Cost and Usage Specification (https://focus.finops.org): its dataset "Cost and Usage" has all
mandatory columns, of the others those that hold something here, and columns of our own that begin with `x_`. A row is
priced by GPU hours. A tenant is a sub account, a sidecar (pod) a resource.

An hour is exported once it is final, so a row is the same whenever it is exported, and so is its id. A row of a day,
which a file that was too full holds instead of hours, is exported as one: what its hours were is no longer known.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from typing import Any, Final

from sidecar.report.usage_query import Provenance
from sidecar.report.usage_rows import HOUR_S, IDLE, Rate, UsageKey, UsageSums
from sidecar.report.usage_store import LATE_S

DIGITS: Final = 6  # of numbers that are no counts: their last bits depend on the order in which rows were summed up

ExportRow = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Exporter:
    """Whose rows they are: the origin of the file, the pod's name, and the names of a bill."""

    origin: str
    pod: str
    account: str = ""
    provider: str = ""
    currency: str = ""


def exporter_of(
    provenance: Provenance, pod: str, account: str = "", provider: str = "", currency: str = ""
) -> Exporter:
    return Exporter("+".join(sorted(provenance.origins)) or pod, pod, account, provider, currency)


def final_until(now: float) -> int:
    """The end of the last hour that does not change any more (seconds since 1970)."""
    return int(now - LATE_S) // HOUR_S * HOUR_S


def record(key: UsageKey, sums: UsageSums, by: Exporter) -> ExportRow:
    """A row of an hour or of a day, in our own terms."""
    names = {name: getattr(key, name) for name in ("tenant", "model", "outcome", "source")} | key.rate._asdict()
    numbers = {k: round(v, DIGITS) if isinstance(v, float) else v for k, v in asdict(sums).items()}
    span = [] if key.span == HOUR_S else [key.span]
    identity = json.dumps([by.origin, float(key.at), *names.values(), *span])
    id = hashlib.blake2b(identity.encode(), digest_size=12).hexdigest()
    start, end = (_time(datetime.fromtimestamp(at, UTC)) for at in (key.at, key.at + key.span))
    return {"id": id, "origin": by.origin, "pod": by.pod, "start": start, "end": end, **names, **numbers}


def parse(raw: Any) -> tuple[str, str, UsageKey, UsageSums]:
    """Inverse of `record`: id, origin, key, sums. Raises ValueError, LookupError or TypeError."""
    start, end = (int(datetime.fromisoformat(raw[name]).timestamp()) for name in ("start", "end"))
    if end <= start:
        raise ValueError("it ends before it starts")
    tenant, model, outcome, source = (str(raw[name]) for name in ("tenant", "model", "outcome", "source"))
    rate = Rate(str(raw["fingerprint"]), int(raw["gpus"]), float(raw["dollars_per_gpu_hour"]))
    defaults = asdict(UsageSums(joules=0.0)).items()
    numbers: dict[str, Any] = {
        k: type(default)(raw[k]) for k, default in defaults if k != "joules" or raw[k] is not None
    }
    key = UsageKey(start, end - start, tenant, model, outcome, source, rate)
    return str(raw["id"]), str(raw["origin"]), key, UsageSums(**numbers)


def focus(row: ExportRow, by: Exporter) -> ExportRow:
    """A record in the terms of FOCUS 1.4; None is its null."""
    start = datetime.fromisoformat(row["start"])
    month = start.replace(day=1, hour=0)
    following = month.replace(year=month.year + month.month // 12, month=month.month % 12 + 1)
    is_idle = row["outcome"] == IDLE
    what = "GPU time that no request used" if is_idle else f"requests of {row['tenant']} for {row['model']}"
    cost, price = row["dollars"], row["dollars_per_gpu_hour"]
    tenant = None if is_idle else row["tenant"]
    return {
        "BilledCost": cost,
        "BillingAccountId": by.account,
        "BillingAccountName": by.account,
        "BillingCurrency": by.currency,
        "BillingPeriodEnd": _time(following),
        "BillingPeriodStart": _time(month),
        "ChargeCategory": "Usage",
        "ChargeClass": None,
        "ChargeDescription": f"{what} ({row['outcome']})",
        "ChargeFrequency": "Usage-Based",
        "ChargePeriodEnd": row["end"],
        "ChargePeriodStart": row["start"],
        "ConsumedQuantity": row["gpu_seconds"],
        "ConsumedUnit": "GPU Seconds",
        "ContractedCost": cost,
        "ContractedUnitPrice": price,
        "EffectiveCost": cost,
        "HostProviderName": by.provider,
        "InvoiceIssuerName": by.provider,
        "ListCost": cost,
        "ListUnitPrice": price,
        "PricingCategory": "Standard",
        "PricingQuantity": row["gpu_seconds"] / HOUR_S,
        "PricingUnit": "GPU Hours",
        "ResourceId": by.origin or by.pod,
        "ResourceName": by.pod,
        "ResourceType": "Inference engine",
        "ServiceCategory": "AI and Machine Learning",
        "ServiceName": "Inference",
        "ServiceProviderName": by.provider,
        "ServiceSubcategory": "Generative AI",
        "SkuId": "gpu-time",
        "SkuMeter": "GPU time",
        "SkuPriceId": f"gpu-time@{price:g}",
        "SubAccountId": tenant,
        "SubAccountName": tenant,
        "Tags": json.dumps({"model": row["model"], "outcome": row["outcome"]}),
        "x_RowId": row["id"],
        "x_Model": None if is_idle else row["model"],
        "x_Outcome": row["outcome"],
        "x_TokenSource": row["source"],
        "x_Coefficients": row["fingerprint"],
        "x_Gpus": row["gpus"],
        "x_ModelUnits": row["mu"],
        "x_Requests": row["requests"],
        "x_InputTokens": row["input_tokens"],
        "x_CachedTokens": row["cached_tokens"],
        "x_OutputTokens": row["output_tokens"],
        "x_ImageTokens": row["image_tokens"],
        "x_AudioTokens": row["audio_tokens"],
        "x_VideoTokens": row["video_tokens"],
        "x_Joules": row["joules"],
    }


def _time(at: datetime) -> str:
    return at.strftime("%Y-%m-%dT%H:%M:%SZ")
