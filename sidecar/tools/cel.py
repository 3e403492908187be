"""Print the cost of a request in milli-MU as a CEL expression, for gateways that limit or bill by it.

    sidecar cel --coefficients coefficients.json

Envoy AI Gateway evaluates it over a response's `usage` (`llmRequestCosts`, type CEL): unsigned `input_tokens`, `cached_input_tokens` and
`output_tokens`. A usage does not say how many of the input tokens are of images: they are priced as input, what their encoder did (g, h, q) is not.
"""

from __future__ import annotations

from dataclasses import dataclass

from sidecar.flags import existing_file, flag
from sidecar.launch import preflight
from sidecar.load import cost_model

INPUT, OUTPUT = "double(input_tokens)", "double(output_tokens)"
# More cached than read would be an error of the upstream's; a CEL error would make the request free.
CACHED = "double(cached_input_tokens < input_tokens ? cached_input_tokens : input_tokens)"


@dataclass(frozen=True, slots=True)
class CelSettings:
    """What `sidecar cel` may be told."""

    coefficients: str = flag("", existing_file, "Coefficients file; default: a documented roofline")


def main(chosen: CelSettings) -> int:
    """Print the expression. Returns 0. Raises UsageError."""
    co = preflight.load_coefficients(chosen.coefficients) if chosen.coefficients else cost_model.Coefficients()
    print(expression(co))
    return 0


def expression(co: cost_model.Coefficients) -> str:
    """Milli-MU as an unsigned integer, rounded; `units.mu` of the same tokens, but for images."""
    scale = 1000 / cost_model.unit_ms(co)
    both = f"({INPUT} + {OUTPUT})"
    terms = (
        (co.k, ""),
        (co.a, f"({INPUT} - {CACHED})"),
        (co.b, f"({_before(INPUT, co)} - {_before(CACHED, co)})"),
        (co.d, OUTPUT),
        (co.f, f"({_before(both, co)} - {_before(INPUT, co)})"),
    )
    parts = [f"{_number(value * scale)} * {what}" if what else _number(value * scale) for value, what in terms if value]
    return f"uint({' + '.join(parts)} + 0.5)"


def _before(tokens: str, co: cost_model.Coefficients) -> str:
    """Tokens that lie before each of the first `tokens`, summed, as `units.context` counts them from 0."""
    whole = f"{tokens} * {tokens} / 2.0"
    if co.windowed <= 0:
        return f"({whole})"
    window, share = _number(co.window), _number(co.windowed)
    seen = f"({tokens} < {window} ? {whole} : {window} * ({tokens} - {window} / 2.0))"
    return f"({_number(1 - co.windowed)} * {whole} + {share} * {seen})"


def _number(value: float) -> str:
    """A CEL double: it has a point or an exponent, or it would be an integer."""
    text = f"{value:.9g}"
    return text if "." in text or "e" in text else text + ".0"
