"""The attributes of spans and metrics against the published conventions."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Sequence
from typing import Any

import opentelemetry.semconv._incubating.attributes as incubating
import opentelemetry.semconv.attributes as stable
import pytest
from msgspec import structs
from opentelemetry.semconv._incubating.metrics import gen_ai_metrics

from sidecar.events import Admitted, AnswerDetails, HttpRequest, RequestSize, Settled, Usage
from sidecar.load.api_routes import APIS
from sidecar.report import semantic_conventions as conventions
from sidecar.report.otlp_metrics import HISTOGRAMS
from sidecar.report.semantic_conventions import COMMON, SPAN, FinishedRequest, Service

# Typed in from the published tables: GenAI v0.1.0, docs/gen-ai/client-inference.md; semantic-conventions v1.44.0,
# docs/http/http-spans.md (HTTP server span). Name -> its type, and whether it is required of a request that is whole.
PUBLISHED: dict[str, tuple[type, bool]] = {
    "gen_ai.operation.name": (str, True),
    "gen_ai.provider.name": (str, True),
    "gen_ai.request.model": (str, True),
    "gen_ai.request.stream": (bool, True),
    "gen_ai.request.max_tokens": (int, False),
    "gen_ai.response.id": (str, False),
    "gen_ai.response.model": (str, False),
    "gen_ai.response.finish_reasons": (tuple, False),
    "gen_ai.response.time_to_first_chunk": (float, False),
    "gen_ai.usage.input_tokens": (int, False),
    "gen_ai.usage.output_tokens": (int, False),
    "gen_ai.usage.cache_read.input_tokens": (int, False),
    "error.type": (str, True),
    "http.request.method": (str, True),
    "http.response.status_code": (int, True),
    "url.path": (str, True),
    "url.scheme": (str, True),
    "network.protocol.version": (str, False),
    "server.address": (str, False),
    "server.port": (int, True),
}
# docs/gen-ai/gen-ai-metrics.md, "Generative AI model server metrics": first and last bound, and how many.
BUCKETS = {
    "gen_ai.server.request.duration": (0.01, 81.92, 14),
    "gen_ai.server.time_to_first_token": (0.001, 10.0, 16),
    "gen_ai.server.time_per_output_token": (0.01, 2.5, 13),
}
# The predefined operations that an inference server can have.
OPERATIONS = {"chat", "text_completion", "embeddings"}

ADMITTED = Admitted("r", 10.0, "acme", "llama", "chat", True, RequestSize(10, 0, 20), 64, 0.5)
WHOLE = FinishedRequest(
    structs.replace(ADMITTED, http=HttpRequest("POST", "/v1/chat/completions", "http", "1.1")),
    Settled(
        *("r", 20.0, "engine_error", 500, Usage(12, 7, 3), 7, 700, 12.0, 11.0, 0.0004, "engine_error"),
        details=AnswerDetails("chatcmpl-1", "llama-3", ("stop",)),
    ),
    Service("vllm", "pod-0", 8080),
    12.0,
    0.75,
)


def published_names() -> set[str]:
    """Every attribute name of the package that OpenTelemetry publishes."""
    found = set()
    for package in (incubating, stable):
        for module in pkgutil.iter_modules(package.__path__):
            values = vars(importlib.import_module(f"{package.__name__}.{module.name}")).values()
            found |= {value for value in values if isinstance(value, str)}
    return found


def of(request: FinishedRequest, table: Sequence[tuple[str, Any]] = SPAN) -> dict[str, Any]:
    return conventions.attributes(table, request)


def test_every_name_is_a_published_one_or_ours() -> None:
    """No attribute is invented inside a namespace of the conventions."""
    names = [name for name, _ in SPAN]
    assert len(names) == len(set(names))
    foreign = {name for name in names if not name.startswith("sidecar.")}
    assert foreign == set(PUBLISHED) and foreign <= published_names()


def test_a_whole_request_has_every_attribute_in_its_type() -> None:
    """Nothing that the conventions require is missing, and each value is of the type that they name."""
    found = of(WHOLE)
    assert set(PUBLISHED) <= set(found)
    assert {name: type(found[name]) for name in PUBLISHED} == {name: kind for name, (kind, _) in PUBLISHED.items()}


def test_a_request_without_an_answer_has_what_is_required() -> None:
    """A request that ended before the engine answered still has every required attribute but the status."""
    settled = Settled("r", 20.0, "stalled", 0, None, 0, 0, None, None, 0.0)
    found = of(FinishedRequest(WHOLE.admitted, settled, Service("", "pod-0", 8080)))
    required = {name for name, (_, is_required) in PUBLISHED.items() if is_required}
    assert required - set(found) == {"http.response.status_code"}
    assert found["gen_ai.provider.name"] == "openai" and found["error.type"] == "stalled"
    assert None not in found.values()


@pytest.mark.parametrize("api", APIS, ids=lambda api: api.route)
def test_every_route_has_an_operation(api: Any) -> None:
    """A chat, a completion and an embedding by any API have the predefined name; other work its own."""
    found = of(FinishedRequest(structs.replace(ADMITTED, route=api.route), WHOLE.settled, WHOLE.service))
    own = {"rerank", "score", "pooling", "classify", "transcription", "speech", "images", "decisions"}
    assert found["gen_ai.operation.name"] in OPERATIONS | own
    assert (found["gen_ai.operation.name"] in OPERATIONS) == (api.route not in own)


def test_times_of_tokens_are_those_of_streams() -> None:
    """An answer in one piece has no first token, although its first byte was seen."""
    whole = FinishedRequest(structs.replace(ADMITTED, stream=False), WHOLE.settled, WHOLE.service, 12.0)
    assert (whole.first_token_s, whole.output_token_s) == (None, None)
    assert "gen_ai.response.time_to_first_chunk" not in of(whole) and "gen_ai.request.stream" not in of(whole)
    assert (WHOLE.first_token_s, WHOLE.output_token_s) == (2.0, pytest.approx(8.0 / 6))


def test_a_method_that_is_none_is_other() -> None:
    """A client's own method is no label."""
    admitted = structs.replace(ADMITTED, http=HttpRequest("BREW", "/", "http", "1.1"))
    assert of(FinishedRequest(admitted, WHOLE.settled, WHOLE.service))["http.request.method"] == "_OTHER"


def test_server_metrics_have_the_published_names_and_buckets() -> None:
    """All of the conventions' server metrics, with the attributes that they require."""
    names = {value for value in vars(gen_ai_metrics).values() if isinstance(value, str)}
    assert set(HISTOGRAMS) == {name for name in names if name.startswith("gen_ai.server.")}
    assert {name: (b[0], b[-1], len(b)) for name, b in HISTOGRAMS.items()} == BUCKETS
    assert all([*bounds] == sorted(bounds) for bounds in HISTOGRAMS.values())
    shared = {"gen_ai.operation.name", "gen_ai.provider.name", "gen_ai.request.model", "server.address", "server.port"}
    assert shared | {"error.type"} <= {name for name, _ in COMMON}
