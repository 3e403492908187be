"""A video costs what its frames and their size make of it, wherever it stands in a body."""

from __future__ import annotations

import base64
import json
from typing import Any

import pytest

from sidecar.images.video_headers import UNKNOWN, VideoHeader
from sidecar.kernels.families.videos import VideoSpec, from_config
from sidecar.kernels.video_sampling import VideoSource
from sidecar.load.body_scan import find
from sidecar.load.cost_model import Coefficients
from sidecar.load.estimator import Estimator
from sidecar.load.request_shape import DEFAULT_FRAME_TOKENS, RequestShape
from sidecar.relay.media.video_places import find_videos
from sidecar.relay.pricing.charge import Pricing
from sidecar.relay.pricing.video_price import Sampling, cost_of, sampling_of, with_videos
from sidecar.tools.synthetic_photos import photo

from ...images.clips import clip
from ...images.test_video_families import QWEN2, QWEN3, theirs
from ..work import echo, once


def spec(config: dict[str, Any]) -> VideoSpec:
    found = from_config(config)
    assert isinstance(found, VideoSpec)
    return found


QWEN25_VL, QWEN3_VL = spec(QWEN2), spec(QWEN3)


def text(data: bytes) -> str:
    return base64.b64encode(data).decode()


MP4 = clip("mp4", 60, 640, 360)
URL = f"data:video/mp4;base64,{text(MP4)}"
HEADER = VideoHeader(60, 30.0, 360, 640)
PLACES: dict[str, dict[str, Any]] = {
    "video_url": {"type": "video_url", "video_url": {"url": URL}},
    "video_url as text": {"type": "video_url", "video_url": URL},
    "the type last": {"video_url": {"url": URL}, "type": "video_url"},
    "input_video": {"type": "input_video", "input_video": {"url": URL}},
    "video": {"type": "video", "video": URL},
    "another type of media": {"type": "video_url", "video_url": {"url": URL.replace("video/mp4", "application/mp4")}},
    "no type of media": {"type": "video_url", "video_url": {"url": URL.replace("video/mp4", "")}},
    "capitals": {"type": "video_url", "video_url": {"url": URL.replace("video/mp4", "Video/MP4")}},
    "an id before": {"type": "video_url", "video_url": {"uuid": "a", "url": URL}},
}


@pytest.mark.parametrize("slashes", [False, True])
@pytest.mark.parametrize("place", PLACES)
def test_a_video_is_found_and_measured(place: str, slashes: bool) -> None:
    """In each form of a part, also where an encoder of JSON writes `\\/`."""
    body = json.dumps({"messages": [{"role": "user", "content": [PLACES[place]]}]})
    body = body.replace("/", "\\/") if slashes else body
    found = find(body.encode())
    assert found is not None
    assert find_videos(body.encode(), found) == [(False, HEADER)]


def test_sglangs_list_and_lists_of_jpegs_are_found() -> None:
    """`video_data` next to a prompt; frames are counted and the first one measured."""
    body = json.dumps({"text": "x", "video_data": [URL, URL]}).encode()
    found = find(body)
    assert found is not None
    assert find_videos(body, found) == [(False, HEADER)] * 2
    jpegs = "data:video/jpeg;base64," + ",".join([text(photo(64, 48, 1))] * 5)
    body = json.dumps({"messages": [{"content": [{"type": "video_url", "video_url": {"url": jpegs}}]}]}).encode()
    found = find(body)
    assert found is not None
    assert find_videos(body, found) == [(True, VideoHeader(5, 0.0, 48, 64))]


def test_a_text_is_no_video() -> None:
    """What only looks like one is not looked for, and links and damage are unknown."""
    for part in ({"type": "text", "text": URL}, {"type": "text", "text": '"video_url": {"url": ' + URL}):
        body = json.dumps({"messages": [{"content": [part]}]}).encode()
        found = find(body)
        assert found is not None
        assert find_videos(body, found) == []
    damaged = {"type": "video_url", "video_url": {"url": "data:video/mp4;base64,!"}}
    body = json.dumps({"messages": [{"content": [damaged]}]})
    found = find(body.encode())
    assert found is not None
    assert find_videos(body.encode(), found) == [(False, UNKNOWN)]


def test_qwen2_5_is_priced_as_its_processor_counts() -> None:
    """Two frames a second, at least four, an even number; or the rate that the request asks for."""
    cases = (300, Sampling(), 20), (20, Sampling(), 4), (300, Sampling(8), 20), (330, Sampling(0, 1.0), 10)
    for frames, sampling, taken in cases:
        cost = cost_of(VideoHeader(frames, 30.0, 720, 1280), sampling, QWEN25_VL)
        expected = QWEN25_VL.video(taken, 720, 1280)
        assert (cost.frames, cost.tokens, cost.text) == (taken, expected.tokens, 2)


def test_qwen3_is_priced_with_its_times() -> None:
    """Two frames a second, and a time in text before each pair."""
    cost = cost_of(VideoHeader(300, 30.0, 720, 1280), Sampling(), QWEN3_VL)
    patches = theirs("qwen3-vl").get_num_of_video_patches(20, 720, 1280)
    assert (cost.frames, cost.tokens) == (20, patches // 4)
    times = QWEN3_VL.timestamps(QWEN3_VL.sampled_by_vllm(VideoSource(300, 30.0)), 30.0)
    # each sign or digit is a token, and the word is one
    text_tokens = sum(len(f"<{time:.1f} seconds>") - len(" seconds") + 1 for time in times)
    assert cost.text == 2 + text_tokens + 2 * len(times)


def test_frames_not_minutes_are_bounded() -> None:
    """An hour costs the 768 frames that are taken of it; a refused shape costs what an unknown processor would."""
    cost = cost_of(VideoHeader(108_000, 30.0, 720, 1280), Sampling(), QWEN3_VL)
    assert cost.frames == 768
    assert cost_of(VideoHeader(1 << 24, 30.0, 720, 1280), Sampling(1 << 12), None).frames == 1 << 12
    single = cost_of(VideoHeader(1, 30.0, 64, 64), Sampling(), QWEN25_VL)  # vLLM refuses it
    assert (single.frames, single.tokens) == (1, DEFAULT_FRAME_TOKENS)
    assert cost_of(VideoHeader(30, 30.0, 1, 30_000), Sampling(), QWEN3_VL).tokens == 4 * DEFAULT_FRAME_TOKENS


def test_an_unknown_processor_costs_its_frames() -> None:
    """128 tokens a frame, and no more frames than the file has."""
    shape = RequestShape(videos=3, video_frames=96, video_tokens=96 * DEFAULT_FRAME_TOKENS)
    priced = with_videos(shape, [(False, VideoHeader(9, 30.0, 720, 1280)), (False, UNKNOWN)], Sampling())
    assert (priced.video_frames, priced.video_tokens) == (9 + 32 + 32, 73 * DEFAULT_FRAME_TOKENS)
    assert with_videos(shape, [], Sampling()) == shape


def test_options_of_another_type_are_not_given() -> None:
    """What engines would refuse changes no price."""
    for value in ({"num_frames": "x"}, {"num_frames": True}, {"fps": -1}, {"fps": "2"}, [], 7, None):
        assert sampling_of({"media_io_kwargs": {"video": value}}) == Sampling()
    assert sampling_of({"media_io_kwargs": {"video": {"num_frames": 8, "fps": 1}}}) == Sampling(8, 1.0)


@pytest.mark.parametrize(("frames", "counted"), [(2, 2), (8, 8), (200, 32)])
async def test_a_list_of_frames_costs_its_frames(rig: Any, serve: Any, frames: int, counted: int) -> None:
    """A video of two frames is not priced as one of 32; of 200, the engine samples as many as of any other."""
    r = await rig(await serve(echo))
    jpeg = text(photo(64, 64, 1))
    parts = [
        {"type": "video_url", "video_url": {"url": "data:video/jpeg;base64," + ",".join([jpeg] * frames)}},
        {"type": "video_url", "video_url": {"url": "data:video/mp4;base64,AAAA"}},
    ]
    asked = {"model": "m", "messages": [{"role": "user", "content": parts}]}
    async with r.client.post(r.url + "/v1/chat/completions", json=asked) as got:
        assert got.status == 200
    await r.emitted.settled()
    expected = once(r.emitted)[0].expected
    assert expected.videos == 2
    assert expected.video_tokens == DEFAULT_FRAME_TOKENS * (counted + 32)


async def test_a_request_is_priced_by_the_models_own_processor(rig: Any, serve: Any) -> None:
    """The engine gets the body as it came; the estimate has the tokens of the video's frames."""
    pricing = Pricing(Estimator(Coefficients()), video_spec=QWEN25_VL)
    r = await rig(await serve(echo), pricing=pricing)
    body = json.dumps({"model": "m", "messages": [{"role": "user", "content": [PLACES["video_url"]]}]}).encode()
    async with r.client.post(r.url + "/v1/chat/completions", data=body) as got:
        assert (got.status, await got.read()) == (200, body)
    await r.emitted.settled()
    expected = once(r.emitted)[0].expected
    assert (expected.videos, expected.video_frames) == (1, 4)
    assert expected.video_tokens == QWEN25_VL.video(4, 360, 640).tokens
