"""The scaling rule as the settings of a KEDA ScaledObject: a Prometheus query, the HPA's behaviour, and cron triggers.

The query holds the demand, which is the flow and the growth of the queue, so that the HPA's own stabilisation window
has to hold only what a queue asks for.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Final

from sidecar.load.scaling_rule import HOLD_S, ScalingRule

PROMETHEUS: Final = "http://prometheus.monitoring:9090"
PART: Final = 'sum(sidecar_mu_utilization_part_ratio{{part="{}"}})'
POLL_S: Final = 15

Floors = Sequence[tuple[int, int, int]]  # start and end in seconds since 1970, replicas


def query_of(rule: ScalingRule, ttft_s: float) -> str:
    """Replicas times the target. The `queue` part is the predicted wait over the objective."""
    queue = PART.format("queue")
    demand = f"clamp_min({PART.format('flow')} + {ttft_s:g} * deriv({queue}[1m:{POLL_S}s]), 0)"
    return f"max_over_time({demand}[{rule.calm}s:{POLL_S}s]) + {rule.target * ttft_s / rule.drain:.4g} * {queue}"


def cron_triggers(floors: Floors) -> str:
    """Triggers of a ScaledObject. KEDA takes the largest of all; a cron trigger repeats until it is replaced."""
    lines = [
        "# sidecar forecast: floors of the coming day; write them again each day. Put them next to the other triggers."
    ]
    for begins, ends, replicas in floors:
        if replicas:
            start, end = (datetime.fromtimestamp(at, UTC) for at in (begins, ends))
            lines += [
                "- type: cron",
                "  metadata:",
                "    timezone: Etc/UTC",
                f'    start: "{start.minute} {start.hour} {start.day} {start.month} *"',
                f'    end: "{end.minute} {end.hour} {end.day} {end.month} *"',
                f'    desiredReplicas: "{replicas}"',
            ]
    return "\n".join(lines)


def scaled_object(
    why: Sequence[str], rule: ScalingRule, ttft_s: float, most: int, prometheus: str, floors: Floors
) -> str:
    """A ScaledObject's `spec` without its `scaleTargetRef`. `floors`: the times that ask for more than the rule's."""
    lines = [f"# {line}" for line in why]
    lines += [
        f"minReplicaCount: {rule.floor}",
        f"maxReplicaCount: {most}",
        f"pollingInterval: {POLL_S}",
        f"cooldownPeriod: {rule.calm}",
        "advanced:",
        "  horizontalPodAutoscalerConfig:",
        "    behavior:",
        "      scaleUp:",
        "        stabilizationWindowSeconds: 0",
        f"        policies: [{{type: Pods, value: {most}, periodSeconds: 15}}]",
        "      scaleDown:",
        f"        stabilizationWindowSeconds: {HOLD_S}",
        "        policies: [{type: Percent, value: 100, periodSeconds: 15}]",
        "triggers:",
    ]
    if not rule.floor:
        lines.append(
            "# To start the first pod, add the trigger on the queue before the pods: deploy/keda/scale-to-zero.yaml"
        )
    lines += [
        "- type: prometheus",
        "  metricType: AverageValue",
        "  metadata:",
        f"    serverAddress: {prometheus or PROMETHEUS}",
        "    query: >-",
        f"      {query_of(rule, ttft_s)}",
        f'    threshold: "{rule.target:g}"',
        f'    ignoreNullValues: "{"false" if rule.floor else "true"}"',
    ]
    return "\n".join([*lines, *([cron_triggers(floors)] if floors else [])])
