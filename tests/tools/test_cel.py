"""`sidecar cel`: the cost model as an expression that gateways evaluate."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import celpy
import pytest
from celpy import celtypes
from hypothesis import given, settings
from hypothesis import strategies as st

from sidecar import __main__
from sidecar.events import RequestSize
from sidecar.load import cost_model
from sidecar.load.cost_model import Coefficients
from sidecar.tools.cel import expression

PLAIN = Coefficients()
CASES = {
    "default": PLAIN,
    "sliding": replace(PLAIN, window=4096.0, windowed=0.75),
    "windows only": replace(PLAIN, window=1024.0, windowed=1.0),
    "whole numbers": replace(PLAIN, k=1.0, a=2.0, b=3.0, d=4.0, f=5.0),
    "no context": replace(PLAIN, b=0.0, f=0.0, k=0.0),
}


def program(text: str) -> Callable[[int, int, int], Any]:
    """A CEL expression compiled by cel-python, with the gateway's unsigned variables."""
    environment = celpy.Environment()
    compiled = environment.program(environment.compile(text))

    def run(read: int, cached: int, output: int) -> Any:
        numbers = {
            "input_tokens": read,
            "cached_input_tokens": cached,
            "output_tokens": output,
            "total_tokens": read + output,
        }
        return compiled.evaluate({name: celtypes.UintType(value) for name, value in numbers.items()})

    return run


PROGRAMS = {name: program(expression(co)) for name, co in CASES.items()}


@given(st.sampled_from(sorted(CASES)), st.integers(0, 200_000), st.floats(0, 1), st.integers(0, 32_000))
@settings(max_examples=150)
def test_the_expression_is_the_cost_model(name: str, read: int, share: float, output: int) -> None:
    """For any tokens and sliding windows, it equals `cost_model.mu` to one milli-MU or a millionth."""
    cached = int(read * share)
    mine = cost_model.mu(RequestSize(read - cached, cached, output), CASES[name]) * 1000
    assert float(PROGRAMS[name](read, cached, output)) == pytest.approx(mine, rel=1e-6, abs=0.51)


@pytest.mark.parametrize("name", CASES)
def test_a_gateway_takes_it(name: str) -> None:
    """The result is an unsigned integer, even of 0 tokens, with which Envoy AI Gateway validates expressions."""
    assert isinstance(PROGRAMS[name](0, 0, 0), celtypes.UintType)
    assert PROGRAMS[name](3500, 0, 300) == 1000
    assert PROGRAMS[name](10, 20, 1) == PROGRAMS[name](10, 10, 1)  # more cached than read
    assert "\n" not in expression(CASES[name])


def test_the_command_prints_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """From a coefficients file, or from the default."""
    file = tmp_path / "coefficients.json"
    file.write_text(cost_model.to_json(CASES["sliding"]))
    assert __main__.run(["cel", "--coefficients", str(file)]) == 0
    assert capsys.readouterr().out == expression(CASES["sliding"]) + "\n"
    assert __main__.run(["cel"]) == 0
    assert capsys.readouterr().out == expression(PLAIN) + "\n"
    assert __main__.run(["cel", "--coefficients", "/nowhere"]) == 2
