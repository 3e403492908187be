"""Estimates: what a request is expected to take, and how answers change that."""

from __future__ import annotations

from sidecar import units
from sidecar.facts import Usage, Work
from sidecar.relay.estimate import IMAGE_TOKENS, Estimator, Means
from sidecar.relay.shapes import Shape

CO = units.Coefficients()


def test_the_first_request_is_priced_by_the_documented_defaults() -> None:
    """Four bytes a token, 256 output tokens, and a documented size for an image nobody measured."""
    work = Estimator(CO).work("t", Shape("m", text_bytes=400, token_ids=5, images=2), [77])
    assert work == Work(uncached=100 + 5 + 77 + IMAGE_TOKENS, output=256, image_tokens=77 + IMAGE_TOKENS, images=2)


def test_the_clients_limit_caps_and_choices_multiply() -> None:
    """`n` choices are n outputs, and no estimate exceeds what the client allows over all of them."""
    estimator = Estimator(CO)
    assert estimator.work("t", Shape(choices=3), []).output == 768
    assert estimator.work("t", Shape(choices=3, max_output=30), []).output == 30


def test_embeddings_generate_nothing() -> None:
    """A route that is not generative has no output, whatever it learned."""
    estimator = Estimator(CO)
    shape = Shape(generative=False, text_bytes=40)
    estimator.learn("t", shape, Usage(10, 0))
    assert estimator.work("t", shape, []).output == 0
    assert estimator.work("t", Shape(), []).output == 256


def test_ratio_and_length_are_learned_where_they_belong() -> None:
    """Bytes per token belong to the model, output lengths to (tenant, model); others keep their values."""
    estimator = Estimator(CO)
    shape = Shape("m", text_bytes=2000)
    for _ in range(200):
        estimator.learn("a", shape, Usage(1000, 10))
    assert abs(estimator.work("a", shape, []).uncached - 1000) < 20
    assert abs(estimator.work("a", shape, []).output - 10) <= 1
    assert abs(estimator.work("b", shape, []).uncached - 1000) < 20
    assert estimator.work("b", shape, []).output == 256
    assert estimator.work("a", Shape("other", text_bytes=2000), []).uncached == 500


def test_images_teach_nothing_about_text() -> None:
    """Prompt tokens of a request with images are mostly the images' and leave the ratio alone."""
    estimator = Estimator(CO)
    estimator.learn("t", Shape("m", text_bytes=40, images=1), Usage(3000, 5))
    assert estimator.work("t", Shape("m", text_bytes=400), []).uncached == 100


def test_a_price_is_the_units_price() -> None:
    """The estimator's price of a work is that of units.mu."""
    work = Work(3500, 10, 300, 20, 1)
    assert abs(Estimator(CO).mu(work) - units.mu(work, CO)) < 1e-12


def test_the_tables_are_bounded() -> None:
    """What was used least recently is forgotten first, and then has its start value again."""
    means: Means[int] = Means(1.0, limit=2)
    for key in (1, 2, 1, 3):
        means.add(key, 100.0)
    assert [means.get(key) > 1.0 for key in (1, 2, 3)] == [True, False, True]
