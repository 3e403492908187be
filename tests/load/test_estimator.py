"""Estimates of requests, and how answers change them."""

from __future__ import annotations

from sidecar.events import RequestSize, Usage
from sidecar.load import cost_model
from sidecar.load.estimator import DEFAULT_IMAGE_TOKENS, Estimate, Estimator
from sidecar.load.request_shape import RequestShape

CO = cost_model.Coefficients()


def work(estimator: Estimator, tenant: str, shape: RequestShape) -> RequestSize:
    return estimator.estimate(tenant, shape, []).work


def test_the_first_request_is_priced_by_the_documented_defaults() -> None:
    """Without history: four bytes per token, the prior's mean output, and the default size of an image."""
    first = Estimator(CO).estimate("t", RequestShape("m", text_bytes=400, token_ids=5, images=2), [77]).work
    assert first == RequestSize(
        100 + 5 + 77 + DEFAULT_IMAGE_TOKENS,
        output=first.output,
        image_tokens=77 + DEFAULT_IMAGE_TOKENS,
        images=2,
        image_squares=77**2 + DEFAULT_IMAGE_TOKENS**2,
    )
    assert 200 < first.output < 280


def test_text_that_was_counted_needs_no_ratio() -> None:
    """A tokenizer's count replaces the ratio of bytes."""
    assert Estimator(CO).estimate("t", RequestShape("m", text_bytes=400, token_ids=5), [], 31).work.uncached == 36


def test_the_clients_limit_caps_and_choices_multiply() -> None:
    """`n` choices are n outputs; neither estimate nor reservation exceeds the client's limit over all of them."""
    estimator = Estimator(CO)
    one, three = work(estimator, "t", RequestShape()).output, work(estimator, "t", RequestShape(choices=3)).output
    assert abs(three - 3 * one) <= 2
    capped = estimator.estimate("t", RequestShape(choices=3, max_output=30), [])
    assert (
        25
        <= capped.work.output
        <= estimator.high_output("t", RequestShape(choices=3, max_output=30), capped.work)
        <= 30
    )


def test_embeddings_generate_nothing() -> None:
    """A route that is not generative has no output."""
    estimator = Estimator(CO)
    shape = RequestShape(generative=False, text_bytes=40)
    estimator.learn("t", shape, Usage(10, 0))
    assert estimator.estimate("t", shape, []) == Estimate(RequestSize(10), cost_model.mu(RequestSize(10), CO))


def test_ratio_and_length_are_learned_where_they_belong() -> None:
    """Bytes per token and output lengths are learned per tenant, then of the typical tenant for new ones."""
    estimator = Estimator(CO)
    shape = RequestShape("m", text_bytes=2000)
    for _ in range(300):
        estimator.learn("a", shape, Usage(1000, 10))
        for tenant in ("b", "c", "d"):
            estimator.learn(tenant, shape, Usage(1000, 100))
    assert abs(work(estimator, "a", shape).uncached - 1000) < 20
    assert work(estimator, "a", shape).output < 15 and work(estimator, "b", shape).output > 90
    assert 90 < work(estimator, "new", shape).output < 120
    assert work(estimator, "a", RequestShape("other", text_bytes=2000)).uncached == 500
    assert work(estimator, "a", RequestShape("m", text_bytes=2000, script=3)).uncached == 500


def test_what_outlasts_its_estimate_is_expected_to_go_on() -> None:
    """The tail is the remaining output: it grows if lengths vary widely, and ends at the client's limit."""
    estimator = Estimator(CO)
    shape = RequestShape("m", stream=True, text_bytes=400)
    for n in range(600):
        estimator.learn("t", shape, Usage(100, 2000 if n % 4 == 0 else 20))
    open_end = estimator.estimate("t", shape, [])
    assert 400 < open_end.work.output < 650 and open_end.tail[0] > open_end.work.output
    bounded = estimator.estimate("t", RequestShape("m", stream=True, text_bytes=400, max_output=100), [])
    assert bounded.tail[0] < 100 and bounded.tail[-1] == 0


def test_images_teach_nothing_about_text() -> None:
    """Requests with images do not change the ratio, as most of their prompt tokens are of images."""
    estimator = Estimator(CO)
    estimator.learn("t", RequestShape("m", text_bytes=40, images=1), Usage(3000, 5))
    assert work(estimator, "t", RequestShape("m", text_bytes=400)).uncached == 100


def test_a_price_is_the_units_price() -> None:
    """The estimator prices as cost_model.mu does, and a reservation is at least the expected value."""
    estimator = Estimator(CO)
    whole = RequestSize(3500, 10, 300, 20, 1)
    assert abs(estimator.mu(whole) - cost_model.mu(whole, CO)) < 1e-12
    shape = RequestShape("m", text_bytes=100)
    estimate = estimator.estimate("t", shape, [])
    assert estimate.mu == estimator.mu(estimate.work) < estimator.reserved_mu("t", shape, estimate.work)


def test_a_hostile_tenant_does_not_move_another_price() -> None:
    """100 answers at one byte a token leave an honest 4,000-token prompt as it was, of a new tenant or a known one."""
    for known in (0, 20):
        estimator = Estimator(CO)
        honest, hostile = RequestShape("m", text_bytes=16_000), RequestShape("m", text_bytes=4_000)
        for _ in range(known):
            estimator.learn("honest", honest, Usage(4000, 100))
        before = estimator.estimate("honest", honest, [])
        for _ in range(100):
            estimator.learn("hostile", hostile, Usage(4000, 8000))
        after = estimator.estimate("honest", honest, [])
        assert after.work.uncached == before.work.uncached == 4000
        assert abs(after.mu / before.mu - 1) < 0.02
        assert work(estimator, "hostile", hostile).uncached > 3500


def test_ten_agents_are_priced_as_they_settle() -> None:
    """Streams whose prompts are 95 % cached are held at what they settle at, once a few have ended."""
    estimator, held, used = Estimator(CO), 0.0, 0.0
    for turn in range(40):
        for _ in range(10):
            prompt = 12_000 + 400 * turn
            shape = RequestShape("m", stream=True, text_bytes=4 * prompt)
            usage = Usage(prompt, 200, int(0.95 * prompt))
            if turn > 0:
                held += estimator.estimate("agents", shape, []).mu
                used += estimator.mu(cost_model.settled_work(RequestSize(0), usage, 0))
            estimator.learn("agents", shape, usage)
    assert abs(held / used - 1) < 0.1


def test_a_reservation_does_not_count_on_the_cache() -> None:
    """What is reserved of a tenant's limit is the price without a cache, whatever its earlier answers had cached."""
    estimator, shape = Estimator(CO), RequestShape("m", text_bytes=48_000)
    for _ in range(40):
        estimator.learn("t", shape, Usage(12_000, 100, 11_400))
    estimate = estimator.estimate("t", shape, [])
    uncached = estimator.mu(RequestSize(12_000, output=estimate.work.output))
    assert estimate.mu < 0.6 * uncached < estimator.reserved_mu("t", shape, estimate.work)
