"""The targets of the fuzzer withstand its seeds and some bytes near them; `make fuzz` looks further."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from .fuzz import seeds
from .fuzz.targets import TARGETS

NEAR = settings(max_examples=200)


@pytest.mark.parametrize("target", TARGETS)
def test_seeds_are_withstood(target: str) -> None:
    """Every seed holds what the target asks of any bytes."""
    for seed in seeds.of(target):
        TARGETS[target](seed)


@pytest.mark.parametrize("target", TARGETS)
def test_bytes_near_the_seeds_are_withstood(target: str) -> None:
    """So does a seed that was cut, changed, or joined with another one."""
    some = seeds.of(target)[:200]

    @NEAR
    @given(st.sampled_from(some), st.sampled_from(some), st.data())
    def holds(one: bytes, other: bytes, data: st.DataObject) -> None:
        at, on = data.draw(st.integers(0, len(one))), data.draw(st.integers(0, len(other)))
        TARGETS[target](one[:at] + data.draw(st.binary(max_size=4)) + other[on:])

    holds()
