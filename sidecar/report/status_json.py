"""Pure: a Snapshot as `GET /status`: what whoever is woken asks first. `sidecar status` and `sidecar top` show it.

Times are seconds, `since` and `at` are seconds since 1970, shares are of 1. A value that could not be read is null,
with its reason under the same key plus `_absent`.
"""

from __future__ import annotations

from dataclasses import asdict
from typing import Any, Final

from sidecar.events import Verdict
from sidecar.readings import Value
from sidecar.report.load_json import entry, gpu_json
from sidecar.snapshot import Percentiles, Snapshot, TenantUse

MAX_CHANGES: Final = 10
MAX_TENANTS: Final = 10


def render(snapshot: Snapshot) -> dict[str, Any]:
    """The body of `GET /status`."""
    verdict, load, latencies, gpus = snapshot.verdict, snapshot.load, snapshot.latencies, snapshot.gpus
    tenants = sorted(snapshot.tenants, key=lambda use: (use.mu_in_flight, use.mu_total), reverse=True)
    return {
        "state": verdict.state,
        "reason": verdict.reason,
        "detail": verdict.detail,
        "since": verdict.since_wall,
        "at": snapshot.at_wall,
        "probes": dict(snapshot.probes),
        "draining": snapshot.draining,
        "operator_must_act": snapshot.handover or None,
        **asdict(snapshot.place),
        "engine": snapshot.engine_kind,
        "engine_version": snapshot.engine_version,
        "models": list(snapshot.models),
        "version": snapshot.version,
        "silence": snapshot.progress_age,
        "silence_allowed": snapshot.silence_allowed,
        "requests": {
            "in_flight": load.requests_in_flight,
            "waiting": load.requests_waiting,
            "per_second": load.requests_per_second,
            "errors_per_second": load.errors_per_second,
        },
        "tokens_per_second": load.tokens_per_second,
        "first_token": _percentiles(latencies.first_token),
        "output_token": _percentiles(latencies.output_token),
        "utilization": load.utilization,
        "limited_by": load.limited_by,
        "kills": snapshot.kills,
        **({"gpus": [gpu_json(gpu) for gpu in gpus.value]} if isinstance(gpus, Value) else entry("gpus", gpus)),
        "tenants": [_tenant(use) for use in tenants[:MAX_TENANTS]],
        "changes": [_change(change) for change in snapshot.changes[:MAX_CHANGES]],
    }


def _percentiles(found: Percentiles | None) -> dict[str, Any] | None:
    """Of the last minute; null where no stream has shown it."""
    return None if found is None else asdict(found)


def _tenant(use: TenantUse) -> dict[str, Any]:
    return {
        "tenant": use.tenant,
        "in_flight": use.requests_in_flight,
        "mu_in_flight": use.mu_in_flight,
        "mu_total": use.mu_total,
        "requests_total": use.requests_total,
    }


def _change(verdict: Verdict) -> dict[str, Any]:
    return {"state": verdict.state, "reason": verdict.reason, "since": verdict.since_wall}
