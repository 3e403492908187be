"""Pure: header fields on their way through, in both directions.

Rules: hop-by-hop fields end here (RFC 9110, 7.6.1); all others pass as the bytes that came, in their order. The
sidecar's replace the engine's of the same name.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Final

from sidecar.events import LoadReport, Trace
from sidecar.labels import DEFAULT_TENANT
from sidecar.load.tenant_limits import MAX_TENANT_NAME_CHARS
from sidecar.relay.http.client import Request
from sidecar.relay.http.head import Field, Fields, with_length
from sidecar.trace_context import format_traceparent

_CONNECTION_FIELDS: Final = (b"connection", b"keep-alive", b"proxy-connection", b"te", b"transfer-encoding")
_HOP_BY_HOP: Final = frozenset({*_CONNECTION_FIELDS, b"upgrade", b"proxy-authenticate", b"proxy-authorization"})
# `host` becomes the engine's; `expect` is answered here, because the body is read here; the others are rewritten
_NOT_TO_ENGINE: Final = _HOP_BY_HOP | {b"host", b"expect", b"x-request-id", b"x-forwarded-for"}
_REQUEST_ID: Final = re.compile(r"[A-Za-z0-9._:/+=-]{1,128}", re.ASCII)


def request_id(fields: Fields) -> str:
    """The client's `x-request-id` if it is valid, else empty."""
    given = fields.get(b"x-request-id")
    return given if _REQUEST_ID.fullmatch(given) else ""


def tenant(fields: Fields, name: bytes) -> str:
    """Tenant of a request, from the last field `name`: the one that the nearest gateway wrote.

    Bytes that are not UTF-8 are read as Latin-1.
    """
    raw = fields.last(name)
    try:
        given = raw.decode()
    except UnicodeDecodeError:
        given = raw.decode("latin-1")
    return given[:MAX_TENANT_NAME_CHARS] or DEFAULT_TENANT


def to_engine(
    request: Request,
    authority: bytes,
    *,
    id: str,
    trace: Trace | None = None,
    length: int | None = None,
    is_upgrade: bool = False,
    plain: bool = False,
) -> list[Field]:
    """What the engine gets. `plain`: ask for an answer that is not compressed.

    `authority`: the engine's, for `host`; `length`: bytes of a body that is sent whole; `trace`: the sidecar's span, if
    tracing is on.
    """
    given = request.fields
    dropped = _dropped(given, _NOT_TO_ENGINE)
    if trace is not None:
        dropped |= {b"traceparent"}
    passed = [(b"host", authority)]
    for name, field in zip(given.names, given.all, strict=True):
        if name not in dropped:
            passed.append((field[0], b"identity") if plain and name == b"accept-encoding" else field)
    passed.append((b"x-request-id", id.encode()))
    hops = given.every(b"x-forwarded-for")
    if request.peer:
        hops = [*hops, request.peer.encode()]
    if hops:
        passed.append((b"x-forwarded-for", b", ".join(hops)))
    if b"x-forwarded-proto" not in given:
        passed.append((b"x-forwarded-proto", request.scheme))
    if b"x-forwarded-host" not in given and (hosts := given.every(b"host")):
        passed.append((b"x-forwarded-host", hosts[0]))
    if trace is not None:
        passed.append((b"traceparent", format_traceparent(trace).encode()))
    if is_upgrade:
        passed += [(b"connection", b"upgrade"), (b"upgrade", given.get(b"upgrade").encode("latin-1"))]
    if length is not None:
        return with_length(passed, length) if length or request.has_body else passed
    if b"transfer-encoding" in given:
        passed.append((b"transfer-encoding", b"chunked"))
    return passed


def to_client(
    request: Fields,
    answer: Fields,
    id: str,
    report: LoadReport | None,
    ours: Mapping[bytes, bytes],
    *,
    drop: tuple[bytes, ...] = (),
) -> list[Field]:
    """What the client gets: the engine's fields, replaced by `ours`; `drop` names more that end here."""
    added = {b"x-request-id": id.encode(), **ours}
    if report is not None and b"endpoint-load-metrics-format" in request:  # in the form that the request asks for
        forms = {"JSON": report.orca_json, "TEXT": report.orca_text, "BIN": report.orca_bin}
        if value := forms.get(request.get(b"endpoint-load-metrics-format").upper()):
            added[b"endpoint-load-metrics"] = value.encode()
    dropped = _dropped(answer, _HOP_BY_HOP)
    passed = [
        field
        for name, field in zip(answer.names, answer.all, strict=True)
        if name not in dropped and name not in added and name not in drop
    ]
    passed += added.items()
    return passed


def retry_after(seconds: float) -> list[Field]:
    """When to retry: whole seconds for HTTP, milliseconds for OpenAI's clients, which look for those first."""
    whole, milli = max(1, math.ceil(seconds)), math.ceil(seconds * 1000)
    return [(b"retry-after", b"%d" % whole), (b"retry-after-ms", b"%d" % milli)]


def wants_price(fields: Fields) -> bool:
    """Whether the client wants what its request cost, `mu_milli`, in the answer's usage."""
    return fields.get(b"x-sidecar-usage").strip().lower() == "mu"


def _dropped(fields: Fields, always: frozenset[bytes]) -> frozenset[bytes]:
    """The names of the fields that end here; those that `connection` names, too."""
    if b"connection" not in fields:
        return always
    named = {token.encode("latin-1") for token in fields.tokens(b"connection")}
    return always | (named - {b"content-length"})  # which frames the body
