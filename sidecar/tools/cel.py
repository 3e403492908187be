"""Print the cost of a request in milli-MU as a CEL expression, for gateways that limit or bill by it.

    sidecar cel --coefficients coefficients.json

Envoy AI Gateway evaluates it over a response's `usage` (`llmRequestCosts`, type CEL): unsigned `input_tokens`,
`cached_input_tokens` and `output_tokens`. A usage does not count image tokens separately: they are priced as input,
without the work of their encoder (g, h, q).
"""

from __future__ import annotations

import json
from dataclasses import dataclass

from sidecar.flags import existing_file, flag
from sidecar.launch import preflight
from sidecar.load import cost_model

INPUT_TOKENS, OUTPUT_TOKENS = "double(input_tokens)", "double(output_tokens)"
# Guards against an upstream that reports more cached than input tokens: a CEL error would make the request free.
CACHED_TOKENS = "double(cached_input_tokens < input_tokens ? cached_input_tokens : input_tokens)"


@dataclass(frozen=True, slots=True)
class CelSettings:
    """Settings of `sidecar cel`."""

    coefficients: str = flag("", existing_file, "Coefficients file; default: a documented roofline")


def main(settings: CelSettings, as_json: bool = False) -> int:
    """Print the expression. Returns 0. Raises UsageError."""
    file = settings.coefficients
    co = preflight.load_coefficients(file) if file else cost_model.Coefficients()
    print(json.dumps({"cel": expression(co), "coefficients": co.fingerprint}, indent=1) if as_json else expression(co))
    return 0


def expression(co: cost_model.Coefficients) -> str:
    """Milli-MU as a rounded unsigned integer: `cost_model.mu` of the same tokens, except for images."""
    scale = 1000 / cost_model.unit_ms(co)
    before_input, before_cached = _preceding_tokens(INPUT_TOKENS, co), _preceding_tokens(CACHED_TOKENS, co)
    before_end = _preceding_tokens(f"({INPUT_TOKENS} + {OUTPUT_TOKENS})", co)
    terms = (
        (co.a, f"({INPUT_TOKENS} - {CACHED_TOKENS})"),
        (co.b, f"({before_input} - {before_cached})"),
        (co.d, OUTPUT_TOKENS),
        (co.f, f"({before_end} - {before_input})"),
    )
    parts = [_format_double(co.k * scale)] if co.k else []
    parts += [f"{_format_double(value * scale)} * {tokens}" for value, tokens in terms if value]
    return f"uint({' + '.join(parts)} + 0.5)"


def _preceding_tokens(tokens: str, co: cost_model.Coefficients) -> str:
    """The sum, over the first `tokens`, of the tokens before each, as `cost_model.context` counts from 0."""
    whole = f"{tokens} * {tokens} / 2.0"
    if co.windowed <= 0:
        return f"({whole})"
    window, share = _format_double(co.window), _format_double(co.windowed)
    seen = f"({tokens} < {window} ? {whole} : {window} * ({tokens} - {window} / 2.0))"
    return f"({_format_double(1 - co.windowed)} * {whole} + {share} * {seen})"


def _format_double(value: float) -> str:
    """A CEL double: without a point or an exponent it would be an integer."""
    text = f"{value:.9g}"
    return text if "." in text or "e" in text else text + ".0"
