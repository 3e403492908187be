"""Which requests are traced: OpenTelemetry's samplers by its variables, held against its own SDK."""

from __future__ import annotations

import random

import pytest
from opentelemetry import trace as api
from opentelemetry.sdk.trace import sampling

from sidecar.events import Trace
from sidecar.trace_context import SAMPLERS, is_exported, new_trace, sampler_of, sampler_trouble

HERE = {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://collector:4318"}
RATIOS = ("", "0", "0.1", "0.5", "1", "nonsense", "2")


def traces() -> list[Trace | None]:
    """No parent, and parents that were sampled or not, of many ids."""
    rng = random.Random(7)
    ids = [f"{rng.getrandbits(128):032x}" for _ in range(200)]
    return [None, *(Trace(id, "b" * 16, "c" * 16, sampled) for id in ids for sampled in (True, False))]


@pytest.mark.parametrize("ratio", RATIOS)
@pytest.mark.parametrize("name", ["", *SAMPLERS, "jaeger_remote"])
def test_a_sampler_decides_as_the_sdk_does(name: str, ratio: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """For every sampler of the specification, known parents and any trace id; what is unknown is the default."""
    monkeypatch.setenv("OTEL_TRACES_SAMPLER", name)
    monkeypatch.setenv("OTEL_TRACES_SAMPLER_ARG", ratio)
    theirs, ours = (
        sampling._get_from_env_or_default(),
        sampler_of(HERE | {"OTEL_TRACES_SAMPLER": name, "OTEL_TRACES_SAMPLER_ARG": ratio}),
    )
    assert ours is not None
    for parent in traces():
        found = ours.sample(parent)
        context = None
        if parent is not None:
            flags = api.TraceFlags(int(parent.sampled))
            span = api.SpanContext(int(parent.trace_id, 16), int(parent.parent_id, 16), True, flags)
            context = api.set_span_in_context(api.NonRecordingSpan(span))
            assert (found.trace_id, found.span_id, found.parent_id) == (parent.trace_id, "b" * 16, "c" * 16)
        assert found.sampled == theirs.should_sample(context, int(found.trace_id, 16), "").decision.is_sampled()


@pytest.mark.parametrize(
    ("variables", "endpoint", "on"),
    [
        ({}, "", False),
        ({}, "http://c", True),
        (HERE, "", True),
        ({"OTEL_EXPORTER_OTLP_TRACES_ENDPOINT": "http://c/v1/traces"}, "", True),
        ({"OTEL_EXPORTER_OTLP_METRICS_ENDPOINT": "http://c/v1/metrics"}, "", False),
        (HERE | {"OTEL_SDK_DISABLED": "TRUE"}, "http://c", False),
        (HERE | {"OTEL_SDK_DISABLED": "false"}, "", True),
        (HERE | {"OTEL_TRACES_EXPORTER": "none"}, "http://c", False),
        (HERE | {"OTEL_TRACES_EXPORTER": "console, otlp"}, "", True),
        (HERE | {"OTEL_TRACES_EXPORTER": ""}, "", True),
    ],
)
def test_tracing_is_on_where_the_variables_say(variables: dict[str, str], endpoint: str, on: bool) -> None:
    """An endpoint by flag or variable, unless the SDK or its exporter is switched off."""
    assert (sampler_of(variables, endpoint) is not None) is on


def test_metrics_are_exported_only_where_they_are_asked_for() -> None:
    """A collector of spans alone is not sent metrics."""
    assert not is_exported("METRICS", HERE, "", default="")
    assert is_exported("METRICS", HERE | {"OTEL_METRICS_EXPORTER": "otlp"}, "", default="")


@pytest.mark.parametrize(
    ("name", "argument", "trouble"),
    [
        ("", "", ""),
        ("always_on", "x", ""),
        ("parentbased_traceidratio", "0.5", ""),
        ("parentbased_traceidratio", "1.5", "OTEL_TRACES_SAMPLER_ARG"),
        ("traceidratio", "x", "OTEL_TRACES_SAMPLER_ARG"),
        ("jaeger_remote", "", "OTEL_TRACES_SAMPLER "),
    ],
)
def test_a_wrong_variable_is_named(name: str, argument: str, trouble: str) -> None:
    """One line for the log says which, and what holds instead."""
    found = sampler_trouble({"OTEL_TRACES_SAMPLER": name, "OTEL_TRACES_SAMPLER_ARG": argument})
    assert found.startswith(trouble) and bool(found) == bool(trouble)


def test_a_ratio_is_a_share_of_new_traces() -> None:
    """Ids of our own are random in the bits that a ratio is of."""
    sampler = sampler_of(HERE | {"OTEL_TRACES_SAMPLER": "traceidratio", "OTEL_TRACES_SAMPLER_ARG": "0.25"})
    assert sampler is not None
    assert 300 < sum(sampler.sample(new_trace()).sampled for _ in range(2000)) < 700
