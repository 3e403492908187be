"""The cost model's terms: sliding windows, other media, the linear form, and `GET /cost`."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec import structs

from sidecar.errors import UsageError
from sidecar.events import RequestSize, Usage
from sidecar.load import cost_model
from sidecar.load.cost_model import Coefficients
from sidecar.load.gpu_price import GpuPrice
from sidecar.report import cost_json

CO = Coefficients()
tokens = st.integers(0, 20_000)


@given(before=tokens, new=st.integers(0, 300), window=st.integers(1, 5000), windowed=st.floats(0, 1))
def test_a_window_counts_what_each_token_sees(before: int, new: int, window: int, windowed: float) -> None:
    """The closed form is the sum over new tokens of the tokens before each, at most the window."""
    co = replace(CO, window=window, windowed=windowed)
    middle = [before + i + 0.5 for i in range(new)]  # of the time in which a token's place is taken
    whole, seen = sum(middle), sum(min(x, window) for x in middle)
    assert cost_model.attended_tokens(before, new, co) == pytest.approx(
        (1 - windowed) * whole + windowed * seen, abs=0.2 + 1e-6 * whole
    )


@given(u=tokens, c=tokens, o=tokens, window=st.integers(0, 8192))
def test_windows_never_cost_more_and_cost_grows_with_work(u: int, c: int, o: int, window: int) -> None:
    """A sliding window only reduces work, and more tokens never cost less."""
    near, work = replace(CO, window=window, windowed=0.8), RequestSize(u, c, o)
    assert cost_model.gpu_ms(work, near) <= cost_model.gpu_ms(work, CO) * (1 + 1e-12)
    for name in ("uncached", "cached", "output"):
        assert cost_model.gpu_ms(structs.replace(work, **{name: getattr(work, name) + 1}), near) >= cost_model.gpu_ms(
            work, near
        ) * (1 - 1e-12)


@given(u=tokens, c=tokens, o=tokens, window=st.integers(0, 8192))
def test_output_alone_costs_what_is_left_of_the_whole(u: int, c: int, o: int, window: int) -> None:
    """The prices before the first token and of the output add up to that of the request, as in the ledger."""
    co = Coefficients(f=1e-3, window=window, windowed=0.5, g=0.1)
    work = RequestSize(u, c, o, image_tokens=u // 2, images=1)
    parts = cost_model.terms(work, co).before_first_token + cost_model.decode_ms(work, o, co)
    assert parts == pytest.approx(cost_model.gpu_ms(work, co))


def test_cached_tokens_are_cheaper_and_not_free() -> None:
    """Cached tokens are not computed, but attended to and read."""
    assert (
        cost_model.mu(RequestSize(500, output=10), CO)
        < cost_model.mu(RequestSize(500, 3000, 10), CO)
        < cost_model.mu(RequestSize(3500, output=10), CO)
    )


def test_audio_and_video_are_priced_as_images_are() -> None:
    """Encoder tokens are priced by modality, items alike; settling keeps them."""
    image = cost_model.terms(RequestSize(1000, image_tokens=500, images=2), CO).images
    assert cost_model.terms(RequestSize(1000, video_tokens=500, videos=2), CO).images == image
    heard = RequestSize(1000, audio_tokens=500, audios=2)
    assert cost_model.terms(heard, CO).images == pytest.approx(CO.audio * CO.g * 500 + 2 * CO.h)
    assert cost_model.settled_work(heard, Usage(900, 7, 100), 0) == structs.replace(
        heard, uncached=800, cached=100, output=7
    )


def test_an_encoders_attention_stays_within_an_image() -> None:
    """One image costs more than two with as many tokens together; `GET /cost` assumes images of one size."""
    asked = {"in": "2000", "image_tokens": "1600"}
    one, two = (cost_json.render(asked | {"images": str(n)}, CO, GpuPrice())["terms_ms"]["images"] for n in (1, 2))
    assert one - two == pytest.approx(CO.q * (1600**2 - 2 * 800**2) - CO.h)


def test_what_was_cached_of_images_costs_no_encoder() -> None:
    """Encoder tokens beyond the uncached part of the prompt were cached; without a cache nothing changes."""
    expected = RequestSize(900, image_tokens=800, images=1, image_squares=800**2)
    whole, half = (cost_model.settled_work(expected, Usage(900, 5, cached), 0) for cached in (0, 500))
    assert whole == structs.replace(expected, output=5)
    assert half == RequestSize(400, 500, 5, 400, 1, image_squares=800**2 // 2)
    assert cost_model.settled_work(expected, Usage(900, 5, 90), 0).image_tokens == 800


def test_a_file_says_its_version() -> None:
    """A file of version 1 was measured without q, so q is 0; a later version than ours is rejected."""
    assert cost_model.from_json(cost_model.to_json(CO)) == CO
    assert cost_model.from_json('{"g": 0.5}') == replace(CO, g=0.5, q=0.0, source="file")
    assert cost_model.from_json('{"version": 2, "g": 0.5}').q == CO.q
    assert cost_model.from_json('{"version": 3, "g": 0.5}').q == CO.q
    with pytest.raises(UsageError, match=r"unknown version 4 \(latest: 3\)"):
        cost_model.from_json('{"version": 4}', "co.json")


def test_the_line_is_exact_for_one_unit_and_for_nothing() -> None:
    """The linear form has alpha, beta and gamma, never negative."""
    line = dict(cost_model.line(CO))
    assert line["gamma"] + 3500 * line["alpha"] + 300 * line["beta"] == pytest.approx(cost_model.unit_ms(CO))
    assert line["gamma"] == cost_model.gpu_ms(RequestSize(0), CO)
    assert min(line.values()) >= 0


def test_cost_says_what_a_request_costs_and_why() -> None:
    """The terms add up; cached tokens are part of `in`."""
    told = cost_json.render(
        {"in": "3500", "cached": "500", "out": "300", "images": "1", "image_tokens": "400"}, CO, GpuPrice()
    )
    assert told["mu"] == cost_model.mu(RequestSize(3000, 500, 300, 400, 1, image_squares=400**2), CO)
    assert sum(told["terms_ms"].values()) == pytest.approx(told["gpu_ms"])
    batch = cost_json.render({"in": "512000", "prompts": "1000"}, CO, GpuPrice())
    assert batch["mu"] == pytest.approx(75, abs=0.05)
    assert cost_json.render({"audio_seconds": "60"}, CO, GpuPrice())["terms_ms"]["audio"] == pytest.approx(60 * CO.w)
    assert told["mu_milli"] == round(1000 * told["mu"])
    assert "dollars" not in told, "without a price"


def test_the_time_of_all_gpus_is_paid() -> None:
    """On eight GPUs a millisecond of the engine is eight of GPUs; an hour at full flow costs eight GPU hours."""
    told = cost_json.render({"in": "3500", "out": "300"}, CO, GpuPrice(8, 2.5))
    assert (told["gpus"], told["mu"]) == (8, 1.0)
    assert told["gpu_ms"] == pytest.approx(8 * told["engine_ms"]) == pytest.approx(sum(told["terms_ms"].values()))
    assert told["dollars"] * 60 * cost_model.max_mu_per_minute(CO) == pytest.approx(8 * 2.5)


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ({"into": "1"}, "unknown parameter 'into'"),
        ({"in": "-1"}, "in must be"),
        ({"in": "١"}, "in must be"),
        ({"cached": "1"}, "cached"),
    ],
)
def test_cost_says_what_is_wrong_with_a_question(asked: dict[str, str], said: str) -> None:
    """The error is one line that names the parameter."""
    with pytest.raises(ValueError, match=said):
        cost_json.render(asked, CO, GpuPrice())
