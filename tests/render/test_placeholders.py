"""Image tokens become as many as the model sees, each run where its image stands."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sidecar.errors import NotRendered
from sidecar.render.placeholders import expand

IMAGE = 9


@given(st.lists(st.integers(0, 5), max_size=30), st.lists(st.tuples(st.integers(0, 30), st.integers(1, 7)), max_size=8))
def test_runs_are_where_images_stand(text: list[int], images: list[tuple[int, int]]) -> None:
    """Without its runs the prompt is the text; each run has its image's length and nothing else in it."""
    images = sorted(images, key=lambda image: image[0])
    prompt = list(text)
    for at, _ in reversed(images):
        prompt.insert(at, IMAGE)
    ids, places = expand(prompt, IMAGE, [length for _, length in images])
    inside = {index for place in places for index in range(place.offset, place.offset + place.length)}
    assert [place.length for place in places] == [length for _, length in images]
    assert [ids[index] for index in sorted(inside)] == [IMAGE] * len(inside)
    assert [id for index, id in enumerate(ids) if index not in inside] == text


@pytest.mark.parametrize(("prompt", "lengths"), [([1, 2], [3]), ([IMAGE, IMAGE], [3]), ([IMAGE], [])])
def test_other_numbers_of_images_are_not_rendered(prompt: list[int], lengths: list[int]) -> None:
    """A user who writes an image's token, or a template that drops an image, gets no guess."""
    with pytest.raises(NotRendered):
        expand(prompt, IMAGE, lengths)
