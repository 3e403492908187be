"""Print the cost of a request in milli-MU as a CEL expression, for gateways that limit or bill by it.

    sidecar cel --coefficients coefficients.json

Envoy AI Gateway evaluates it over a response's `usage` (`llmRequestCosts`, type CEL): unsigned `input_tokens`,
`cached_input_tokens` and `output_tokens`. A usage does not count image tokens separately: they are priced as input,
without the work of their encoder (g, h, q).
"""

from __future__ import annotations

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

    coefficients: str = flag(
        "", existing_file, "Coefficients file; default: a documented roofline", expected="an existing file"
    )


def main(settings: CelSettings) -> int:
    """Print the expression. Returns 0. Raises UsageError."""
    coefficients = (
        preflight.load_coefficients(settings.coefficients) if settings.coefficients else cost_model.Coefficients()
    )
    print(expression(coefficients))
    return 0


def expression(coefficients: cost_model.Coefficients) -> str:
    """Milli-MU as a rounded unsigned integer: `cost_model.mu` of the same tokens, except for images."""
    scale = 1000 / cost_model.unit_ms(coefficients)
    both = f"({INPUT_TOKENS} + {OUTPUT_TOKENS})"
    terms = (
        (coefficients.k, ""),
        (coefficients.a, f"({INPUT_TOKENS} - {CACHED_TOKENS})"),
        (
            coefficients.b,
            f"({_preceding_tokens(INPUT_TOKENS, coefficients)} - {_preceding_tokens(CACHED_TOKENS, coefficients)})",
        ),
        (coefficients.d, OUTPUT_TOKENS),
        (
            coefficients.f,
            f"({_preceding_tokens(both, coefficients)} - {_preceding_tokens(INPUT_TOKENS, coefficients)})",
        ),
    )
    parts = [
        f"{_format_double(value * scale)} * {what}" if what else _format_double(value * scale)
        for value, what in terms
        if value
    ]
    return f"uint({' + '.join(parts)} + 0.5)"


def _preceding_tokens(tokens: str, coefficients: cost_model.Coefficients) -> str:
    """The sum, over the first `tokens`, of the tokens before each, as `cost_model.context` counts from 0."""
    whole = f"{tokens} * {tokens} / 2.0"
    if coefficients.windowed <= 0:
        return f"({whole})"
    window, share = _format_double(coefficients.window), _format_double(coefficients.windowed)
    seen = f"({tokens} < {window} ? {whole} : {window} * ({tokens} - {window} / 2.0))"
    return f"({_format_double(1 - coefficients.windowed)} * {whole} + {share} * {seen})"


def _format_double(value: float) -> str:
    """A CEL double: without a point or an exponent it would be an integer."""
    text = f"{value:.9g}"
    return text if "." in text or "e" in text else text + ".0"
