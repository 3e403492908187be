"""W3C trace context, level 1: the `traceparent` header as `events.Trace` and back.

Pure except for random span ids. They come from the kernel, so that forked processes never share ids.
"""

from __future__ import annotations

import os
import re

from sidecar.events import Trace

_TRACEPARENT = re.compile(r"([0-9a-f]{2})-([0-9a-f]{32})-([0-9a-f]{16})-([0-9a-f]{2})(-.*)?", re.ASCII)
_SAMPLED = 0x01
MAX_TRACESTATE_CHARS = 512  # the standard demands that at least this much is propagated
_KEY = r"(?:[a-z][a-z0-9_*/-]{0,255}|[a-z0-9][a-z0-9_*/-]{0,240}@[a-z][a-z0-9_*/-]{0,13})"
_VALUE = r"[\x20-\x2b\x2d-\x3c\x3e-\x7e]{0,255}[\x21-\x2b\x2d-\x3c\x3e-\x7e]"
_MEMBER = re.compile(f"{_KEY}={_VALUE}", re.ASCII)


def parse_traceparent(header: str, state: str = "") -> Trace | None:
    """A new span under the caller's span, with the caller's trace id and sampling flag.

    None if the header is invalid; a new trace is then to be started, as the standard demands. `state` is the
    `tracestate` header; if it is invalid or longer than 512 characters it is dropped whole, as a cut one would be
    wrong.
    """
    match = _TRACEPARENT.fullmatch(header.strip())
    if match is None:
        return None
    version, trace_id, parent_id, flags, more = match.groups()
    if version == "ff" or (version == "00" and more) or not int(trace_id, 16) or not int(parent_id, 16):
        return None
    return Trace(trace_id, _random_id(8), parent_id, bool(int(flags, 16) & _SAMPLED), _valid_state(state))


def new_trace(sampled: bool = True) -> Trace:
    """The root of a new trace."""
    return Trace(_random_id(16), _random_id(8), "", sampled)


def child(trace: Trace) -> Trace:
    """A new span under `trace`'s span."""
    return Trace(trace.trace_id, _random_id(8), trace.span_id, trace.sampled, trace.state)


def format_traceparent(trace: Trace) -> str:
    """The header for an outgoing request, whose parent is this span."""
    return f"00-{trace.trace_id}-{trace.span_id}-{_SAMPLED if trace.sampled else 0:02x}"


def _valid_state(state: str) -> str:
    """`state`, or "" if a tracing library would reject it and log the client's text."""
    members = [member.strip(" \t") for member in state.split(",")] if len(state) <= MAX_TRACESTATE_CHARS else [""]
    return state if all(_MEMBER.fullmatch(member) for member in members) else ""


def _random_id(size: int) -> str:
    while True:  # all zeros means "invalid"
        number = os.urandom(size)
        if any(number):
            return number.hex()
