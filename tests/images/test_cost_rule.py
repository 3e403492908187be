"""The hand-off of an image: the cheapest by measured costs, within the bounds, and passing where nothing is cheaper."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sidecar.images import cost_rule
from sidecar.images.cost_rule import INLINE, PASS, SHM, STEPS, TENSORS, WAYS, ImageSize, UnitCosts, choose, milliseconds
from sidecar.images.worker import calibration

COST = st.floats(0, 100, allow_nan=False)
COSTS = st.fixed_dictionaries(dict.fromkeys(STEPS, COST)).map(UnitCosts)
SIZES = st.builds(
    ImageSize,
    st.sampled_from(["jpeg", "png", "webp", "gif"]),
    st.integers(1, 50_000_000),
    st.integers(1, 17_000_000),
    st.integers(1, 30_000_000),
    st.sampled_from([1, 2, 4]),
)
OFFERED = st.sets(st.sampled_from([INLINE, SHM, TENSORS]))


@given(SIZES, OFFERED, COSTS)
def test_no_choice_costs_more_than_passing(image: ImageSize, offered: set[str], costs: UnitCosts) -> None:
    """What is chosen was offered, is the cheapest of that, and clearly cheaper than leaving all to the engine."""
    way, spent = choose(image, offered, costs), milliseconds(image, costs)
    assert way in offered | {PASS}
    assert spent[way] <= spent[PASS]
    if way != PASS:
        assert spent[way] <= 0.95 * spent[PASS] and spent[way] == min(spent[other] for other in offered)


@given(SIZES, COSTS, COSTS)
def test_more_work_costs_more(image: ImageSize, costs: UnitCosts, more: UnitCosts) -> None:
    """No step is free or counted negatively: where each costs more, so does each way."""
    sums = UnitCosts({step: costs.by_step[step] + more.by_step[step] for step in STEPS})
    for way in WAYS:
        assert milliseconds(image, sums)[way] >= milliseconds(image, costs)[way]


def unit(**costs: float) -> UnitCosts:
    return UnitCosts(dict.fromkeys(STEPS, 0.0) | costs)


PHOTO = ImageSize("jpeg", 2_000_000, 2_000_000, 800_000)
ROWS = [
    # a decoder here that is no faster, and nothing saved: 12 megabytes of patches cost more than they save
    (unit(decode_jpeg=5, engine_decode_jpeg=5, write=1), PASS),
    # the engine's processor is what costs
    (unit(decode_jpeg=5, engine_decode_jpeg=5, engine_process_out=10, write=1), TENSORS),
    # its decoder is what costs, and plain pixels are less to write than two copies of each as patches
    (unit(decode_jpeg=1, engine_decode_jpeg=9, write=1, text=5), SHM),
    # new shared memory is dear, text is cheap
    (unit(decode_jpeg=1, engine_decode_jpeg=9, write=9, text=0.1), INLINE),
    # all equal
    (unit(), PASS),
]


@pytest.mark.parametrize(("costs", "way"), ROWS)
def test_the_dear_step_decides(costs: UnitCosts, way: str) -> None:
    """Each of the ways wins where the steps that it leaves out are the expensive ones."""
    assert choose(PHOTO, {INLINE, SHM, TENSORS}, costs) == (way if way != PASS else PASS)


def test_without_costs_bounds_decide() -> None:
    """Before the first measurement, what the engine takes is used, tensors first; nothing offered passes."""
    assert [choose(PHOTO, ways, None) for ways in ({INLINE, SHM, TENSORS}, {INLINE, SHM}, {INLINE}, set())] == [
        TENSORS,
        SHM,
        INLINE,
        PASS,
    ]


def test_this_machine_is_measured() -> None:
    """A worker's measurement has every step, none below zero, and each that reads memory above zero."""
    costs = UnitCosts(dict(calibration.measure()))
    assert all(cost > 0 for step, cost in costs.by_step.items() if step != "resize_out")
    assert costs.decode("gif") == costs.by_step["decode_jpeg"]


@pytest.mark.parametrize("wrong", [{}, dict.fromkeys(STEPS, -1.0), dict.fromkeys(STEPS[1:], 1.0)])
def test_costs_of_another_version_are_refused(wrong: dict[str, float]) -> None:
    """A worker's answer with other steps, or with nonsense, is no measurement."""
    with pytest.raises(KeyError):
        UnitCosts(wrong)
    assert cost_rule.WAYS[0] == PASS
