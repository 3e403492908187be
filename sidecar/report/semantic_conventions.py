"""Pure: the attributes of spans and metrics, from one literal table of OpenTelemetry's semantic conventions.

GenAI: open-telemetry/semantic-conventions-genai v0.1.0 (`gen_ai.client.inference`, "Generative AI model server
metrics"), in development. HTTP server spans, `server.*`, `url.*`, `error.type`: semantic-conventions v1.44.0, stable.
What no convention names begins with `sidecar.`. A test compares the table with the published names and types.

Rules: nothing that a request does not have gets an attribute; content, headers and queries never do. Times to and per
token are those of streams.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

from sidecar.events import Admitted, HttpRequest, Settled, Verdict
from sidecar.labels import printable

AttributeValue = str | int | float | bool | Sequence[str]
Attributes = dict[str, AttributeValue]

# By route (load/api_routes.py). A route that no predefined operation fits keeps its own name, as the convention allows.
OPERATIONS: Final[dict[str, str]] = {
    **dict.fromkeys(("chat", "responses", "messages", "ollama_chat", "cohere_chat"), "chat"),
    **dict.fromkeys(("completions", "generate", "llamacpp_completion", "ollama_generate"), "text_completion"),
    "embeddings": "embeddings",
}
# The convention's discriminator of a telemetry format: the engine's name, or OpenAI's where only its API is known.
DEFAULT_PROVIDER: Final = "openai"
HTTP_METHODS: Final = ("GET", "HEAD", "POST", "PUT", "DELETE", "CONNECT", "OPTIONS", "TRACE", "PATCH", "QUERY")
NO_HTTP: Final = HttpRequest("", "", "", "")


@dataclass(frozen=True, slots=True)
class Service:
    """What serves: the engine's kind, "" before it is known, and the sidecar's host and port."""

    engine_kind: str = ""
    address: str = ""
    port: int = 0

    @property
    def provider(self) -> str:
        return self.engine_kind or DEFAULT_PROVIDER


@dataclass(frozen=True, slots=True)
class FinishedRequest:
    """One request from its admission to its settlement. `mu`: its actual price, None before it is known."""

    admitted: Admitted
    settled: Settled
    service: Service
    first_at: float | None = None
    mu: float | None = None

    @property
    def http(self) -> HttpRequest:
        return self.admitted.http or NO_HTTP

    @property
    def first_token_s(self) -> float | None:
        """Seconds to a stream's first token."""
        if not self.admitted.stream or self.first_at is None:
            return None
        return self.first_at - self.admitted.at

    @property
    def output_token_s(self) -> float | None:
        """Seconds per token of a stream after its first one."""
        later = self.settled.delivered_tokens - 1
        if not self.admitted.stream or self.first_at is None or later < 1:
            return None
        return (self.settled.at - self.first_at) / later


Value = Callable[[FinishedRequest], AttributeValue | None]


def _operation(request: FinishedRequest) -> str:
    return OPERATIONS.get(request.admitted.route, request.admitted.route)


def _error_type(request: FinishedRequest) -> str | None:
    settled = request.settled
    return None if settled.outcome == "ok" else settled.error or settled.outcome


def _usage(name: str) -> Value:
    return lambda request: None if request.settled.usage is None else int(getattr(request.settled.usage, name))


def _detail(name: str) -> Value:
    def value(request: FinishedRequest) -> AttributeValue | None:
        found = getattr(request.settled.details, name, None)
        return (tuple(map(printable, found)) if isinstance(found, tuple) else printable(found)) if found else None

    return value


def _method(request: FinishedRequest) -> str | None:
    method = request.http.method
    return method if method in HTTP_METHODS else "_OTHER" if method else None


# Those that spans and metrics share.
COMMON: Final[tuple[tuple[str, Value], ...]] = (
    ("gen_ai.operation.name", _operation),
    ("gen_ai.provider.name", lambda request: request.service.provider),
    ("gen_ai.request.model", lambda request: printable(request.admitted.model)),
    ("gen_ai.response.model", _detail("model")),
    ("server.address", lambda request: request.service.address or None),
    ("server.port", lambda request: request.service.port if request.service.address else None),
    ("error.type", _error_type),
)
SPAN: Final[tuple[tuple[str, Value], ...]] = (
    *COMMON,
    ("gen_ai.request.max_tokens", lambda request: request.admitted.max_output),
    ("gen_ai.request.stream", lambda request: request.admitted.stream or None),
    ("gen_ai.response.id", _detail("id")),
    ("gen_ai.response.finish_reasons", _detail("finish_reasons")),
    ("gen_ai.response.time_to_first_chunk", lambda request: request.first_token_s),
    ("gen_ai.usage.input_tokens", _usage("prompt_tokens")),
    ("gen_ai.usage.output_tokens", _usage("completion_tokens")),
    ("gen_ai.usage.cache_read.input_tokens", _usage("cached_tokens")),
    ("http.request.method", _method),
    ("http.response.status_code", lambda request: request.settled.status or None),
    ("url.path", lambda request: request.http.path or None),
    ("url.scheme", lambda request: request.http.scheme or None),
    ("network.protocol.version", lambda request: request.http.version or None),
    ("sidecar.tenant", lambda request: printable(request.admitted.tenant)),
    ("sidecar.outcome", lambda request: request.settled.outcome),
    ("sidecar.mu", lambda request: request.admitted.mu if request.mu is None else request.mu),
    ("sidecar.overhead_seconds", lambda request: request.settled.overhead),
    ("sidecar.delivered_tokens", lambda request: request.settled.delivered_tokens),
)


def attributes(table: Sequence[tuple[str, Value]], request: FinishedRequest) -> Attributes:
    """The attributes of a table that the request has."""
    found = ((name, value(request)) for name, value in table)
    return {name: value for name, value in found if value is not None}


def verdict_attributes(verdict: Verdict, service: Service) -> Attributes:
    """The attributes of the event `sidecar.verdict`: the new verdict and its evidence, plain numbers and codes."""
    evidence = {f"sidecar.evidence.{name}": value for name, value in verdict.evidence.items() if value is not None}
    state = {"sidecar.verdict.state": verdict.state, "sidecar.verdict.reason": verdict.reason}
    return {**state, "gen_ai.provider.name": service.provider, **evidence}


def span_name(of: Attributes) -> str:
    """{operation} {model}, as the conventions name a span."""
    return f"{of['gen_ai.operation.name']} {of['gen_ai.request.model']}"
