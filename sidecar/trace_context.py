"""W3C trace context, level 1: the `traceparent` header as `events.Trace` and back; and which requests are sampled.

Pure except for random span ids. They come from the kernel, so that forked processes never share ids.

The relay decides what is sampled, as it passes the decision on to the engine. The samplers are OpenTelemetry's, by the
variables of its specification; they are here so that a relay does not import its SDK.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Final

from sidecar.events import Trace

_RATIO_BITS: Final = 64  # the low bits of a trace id that a ratio is of

_TRACEPARENT = re.compile(r"([0-9a-f]{2})-([0-9a-f]{32})-([0-9a-f]{16})-([0-9a-f]{2})(-.*)?", re.ASCII)
_NO_TRACE, _NO_SPAN = "0" * 32, "0" * 16
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
    if version == "ff" or (version == "00" and more) or trace_id == _NO_TRACE or parent_id == _NO_SPAN:
        return None
    is_sampled = bool(int(flags, 16) & _SAMPLED)
    return Trace(trace_id, _random_id(8), parent_id, is_sampled, _valid_state(state) if state else "")


def new_trace(sampled: bool = True) -> Trace:
    """The root of a new trace."""
    return Trace(_random_id(16), _random_id(8), "", sampled)


def child(trace: Trace) -> Trace:
    """A new span under `trace`'s span."""
    return Trace(trace.trace_id, _random_id(8), trace.span_id, trace.sampled, trace.state)


def format_traceparent(trace: Trace) -> str:
    """The header for an outgoing request, whose parent is this span."""
    return f"00-{trace.trace_id}-{trace.span_id}-{_SAMPLED if trace.sampled else 0:02x}"


@dataclass(frozen=True, slots=True)
class Sampler:
    """Samples a share `ratio` of the traces, by their id; of those that a caller began, what it sampled."""

    ratio: float = 1.0
    is_parent_based: bool = True

    def sample(self, parent: Trace | None) -> Trace:
        """The trace of a request; `parent`: by its header, None without a valid one."""
        if parent is not None and self.is_parent_based:
            return parent
        trace = new_trace() if parent is None else parent
        is_sampled = int(trace.trace_id[16:], 16) < round(self.ratio * (1 << _RATIO_BITS))
        if trace.sampled == is_sampled:
            return trace
        return Trace(trace.trace_id, trace.span_id, trace.parent_id, is_sampled, trace.state)


DEFAULT_SAMPLER: Final = Sampler()
# By OTEL_TRACES_SAMPLER; those with a ratio take it from OTEL_TRACES_SAMPLER_ARG.
SAMPLERS: Final[dict[str, Sampler]] = {
    "always_on": Sampler(1.0, is_parent_based=False),
    "always_off": Sampler(0.0, is_parent_based=False),
    "traceidratio": Sampler(1.0, is_parent_based=False),
    "parentbased_always_on": DEFAULT_SAMPLER,
    "parentbased_always_off": Sampler(0.0),
    "parentbased_traceidratio": Sampler(1.0),
}


def sampler_of(environ: Mapping[str, str], endpoint: str = "") -> Sampler | None:
    """The sampler that the environment names; None where tracing is off. `endpoint`: --otlp-endpoint.

    An unknown sampler, or a ratio that is none, is the default, as the specification has it; `sampler_trouble` says so.
    """
    if not is_exported("TRACES", environ, endpoint, default="otlp"):
        return None
    name = environ.get("OTEL_TRACES_SAMPLER", "").strip().lower()
    sampler = SAMPLERS.get(name, DEFAULT_SAMPLER)
    return replace(sampler, ratio=_ratio(environ)) if name.endswith("traceidratio") and name in SAMPLERS else sampler


def is_exported(signal: str, environ: Mapping[str, str], endpoint: str, *, default: str) -> bool:
    """Whether a signal ("TRACES", "METRICS") goes to a collector by OTLP. `default`: of OTEL_<signal>_EXPORTER."""
    if environ.get("OTEL_SDK_DISABLED", "").strip().lower() == "true":
        return False
    exporters = environ.get(f"OTEL_{signal}_EXPORTER", "").strip().lower() or default
    if "otlp" not in (name.strip() for name in exporters.split(",")):
        return False
    names = (f"OTEL_EXPORTER_OTLP_{signal}_ENDPOINT", "OTEL_EXPORTER_OTLP_ENDPOINT")
    return bool(endpoint) or any(environ.get(name, "").strip() for name in names)


def sampler_trouble(environ: Mapping[str, str]) -> str:
    """What is wrong with the variables of the sampler, in one line for the log; "" if nothing is."""
    name, argument = environ.get("OTEL_TRACES_SAMPLER", "").strip().lower(), environ.get("OTEL_TRACES_SAMPLER_ARG", "")
    if name and name not in SAMPLERS:
        return f"OTEL_TRACES_SAMPLER is none of {', '.join(SAMPLERS)}: parentbased_always_on is used"
    if name.endswith("traceidratio") and argument.strip() and _parsed_ratio(argument) is None:
        return "OTEL_TRACES_SAMPLER_ARG is no number from 0 to 1: 1 is used"
    return ""


def _ratio(environ: Mapping[str, str]) -> float:
    ratio = _parsed_ratio(environ.get("OTEL_TRACES_SAMPLER_ARG", ""))
    return 1.0 if ratio is None else ratio


def _parsed_ratio(text: str) -> float | None:
    try:
        ratio = float(text)
    except ValueError:
        return None
    return ratio if 0.0 <= ratio <= 1.0 else None


def _valid_state(state: str) -> str:
    """`state`, or "" if a tracing library would reject it and log the client's text."""
    members = [member.strip(" \t") for member in state.split(",")] if len(state) <= MAX_TRACESTATE_CHARS else [""]
    return state if all(_MEMBER.fullmatch(member) for member in members) else ""


def _random_id(size: int) -> str:
    while True:  # all zeros means "invalid"
        number = os.urandom(size)
        if any(number):
            return number.hex()
