"""Pure: headers on their way through, in both directions.

Rules: hop-by-hop headers end here (RFC 9110, 7.6.1); all others pass unchanged. The sidecar's replace the engine's of
the same name.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Final

from aiohttp import web
from multidict import CIMultiDict, CIMultiDictProxy

from sidecar.events import LoadReport, Trace
from sidecar.load.tenant_limits import MAX_TENANT_NAME_CHARS
from sidecar.trace_context import format_traceparent

_CONNECTION_HEADERS: Final = ("connection", "keep-alive", "proxy-connection", "te", "trailer", "transfer-encoding")
_HOP_BY_HOP: Final = frozenset({*_CONNECTION_HEADERS, "upgrade", "proxy-authenticate", "proxy-authorization"})
# `host` becomes the engine's; `expect` is answered here, because the body is read here
_NOT_TO_ENGINE: Final = _HOP_BY_HOP | {"host", "expect"}
_REQUEST_ID: Final = re.compile(r"[A-Za-z0-9._:/+=-]{1,128}", re.ASCII)

Headers = CIMultiDict[str]
Received = CIMultiDictProxy[str]


def request_id(headers: Received) -> str:
    """The client's `x-request-id` if it is valid, else empty."""
    given = headers.get("x-request-id", "")
    return given if _REQUEST_ID.fullmatch(given) else ""


def tenant(headers: Received, name: str) -> str:
    """Tenant of a request, from the header `name`. Bytes that are not UTF-8 are read as Latin-1."""
    given = headers.get(name, "")
    if not given.isascii():
        raw = given.encode(errors="surrogateescape")
        try:
            given = raw.decode()
        except UnicodeDecodeError:
            given = raw.decode("latin-1")
    return given[:MAX_TENANT_NAME_CHARS] or "default"


def to_engine(request: web.BaseRequest, *, id: str, trace: Trace | None = None, length: int | None = None) -> Headers:
    """What the engine gets. `length`: bytes of the body, if known; `trace`: the sidecar's span, if tracing is on."""
    passed, remote = _passed(request.headers, _NOT_TO_ENGINE), request.remote or ""
    passed["x-request-id"] = id
    forwarded = passed.get("x-forwarded-for")
    passed["x-forwarded-for"] = f"{forwarded}, {remote}" if forwarded else remote
    passed.setdefault("x-forwarded-proto", "http")
    if host := request.headers.get("host"):
        passed.setdefault("x-forwarded-host", host)
    if trace is not None:
        passed["traceparent"] = format_traceparent(trace)
    if length is not None:
        passed["content-length"] = str(length)
    return passed


def to_client(
    request: Received, answer: Received, id: str, report: LoadReport | None, ours: Mapping[str, str], *, drop: str = ""
) -> Headers:
    """What the client gets: the engine's headers, replaced by `ours`; `drop` names one more that ends here."""
    passed = _passed(answer, _HOP_BY_HOP | {drop} if drop else _HOP_BY_HOP)
    passed.update({"x-request-id": id, **ours})
    if report is not None:  # in the form that the request asks for, if it asks
        forms = {"JSON": report.orca_json, "TEXT": report.orca_text, "BIN": report.orca_bin}
        if value := forms.get(request.get("endpoint-load-metrics-format", "").upper()):
            passed["endpoint-load-metrics"] = value
    return passed


def retry_after(seconds: float) -> dict[str, str]:
    """When to retry: whole seconds for HTTP, milliseconds for OpenAI's clients, which look for those first."""
    return {"retry-after": str(max(1, math.ceil(seconds))), "retry-after-ms": str(math.ceil(seconds * 1000))}


def wants_price(headers: Received) -> bool:
    """Whether the client wants what its request cost, `mu_milli`, in the answer's usage."""
    return headers.get("x-sidecar-usage", "").strip().lower() == "mu"


def _passed(headers: Received, dropped: frozenset[str]) -> Headers:
    if (named := headers.get("connection")) is not None:
        dropped = dropped.union(token.strip().lower() for token in named.split(","))
    return CIMultiDict([item for item in headers.items() if item[0].lower() not in dropped])
