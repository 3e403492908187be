"""A real vLLM counts the tokens of a video that the sidecar's price expects, by every way to sample it."""

from __future__ import annotations

import base64
import json
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from sidecar.kernels import families
from sidecar.relay.pricing import video_price
from sidecar.relay.pricing.tokenizer import load_counter
from sidecar.relay.request_body import parse
from sidecar.tools.synthetic_photos import photo

from ..images.clips import clip
from . import client
from .client import Http
from .processes import Engine

PATH = "/v1/chat/completions"
made = cache(clip)


def url(data: bytes, kind: str = "video/mp4") -> str:
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"


def videos() -> dict[str, tuple[str, dict[str, Any]]]:
    """Name -> data URL, and options of the request."""
    jpegs = ",".join(base64.b64encode(photo(160, 120, n)).decode() for n in range(6))
    return {
        "two seconds": (url(made("mp4", 60)), {}),
        "half a second": (url(made("mp4, B-frames", 12)), {}),
        "webm": (url(made("webm, VP9", 47, 322, 182, 24), "video/webm"), {}),
        "mkv": (url(made("mkv", 90, 200, 300), "video/x-matroska"), {}),
        "avi": (url(made("avi", 50), "video/avi"), {}),
        "fragments": (url(made("mp4 in fragments", 60)), {}),
        "eight frames": (url(made("mp4", 60)), {"num_frames": 8}),
        "three a second": (url(made("mp4", 60)), {"fps": 3}),
        "a list of JPEGs": (f"data:video/jpeg;base64,{jpegs}", {}),
    }


@pytest.mark.vllm
@pytest.mark.timeout(400)
@pytest.mark.parametrize("engine", ["small", "qwen3"], indirect=True)
async def test_a_video_costs_what_the_engine_counts(
    engine: Engine, model: Callable[[str], Path], http: Http, request: pytest.FixtureRequest
) -> None:
    """The prompt's tokens with a video, less those without it, within 2 %."""
    folder = model(request.node.callspec.params["engine"])
    spec, counter = families.video_from_dir(str(folder)), load_counter(str(folder))
    assert spec is not None
    assert counter is not None

    async def prompt_tokens(*parts: dict[str, Any], **more: Any) -> int:
        content = [*parts, {"type": "text", "text": "What is this?"}]
        body = client.completion(max_tokens=1) | {"messages": [{"role": "user", "content": content}], **more}
        async with http.post(engine.url + PATH, json=body) as answer:
            said = await answer.json()
            assert answer.status == 200, said
            return int(said["usage"]["prompt_tokens"])

    without = await prompt_tokens()
    seen: dict[str, tuple[int, int]] = {}
    for name, (data, options) in videos().items():
        part = {"type": "video_url", "video_url": {"url": data}}
        more = {"media_io_kwargs": {"video": options}} if options else {}
        told = await prompt_tokens(part, **more) - without
        body = json.dumps({"messages": [{"role": "user", "content": [part]}], **more}).encode()
        parsed = parse(body)
        assert parsed.scan is not None
        sampling = video_price.sampling_of(parsed.scan.options)
        ((is_list, header),) = parsed.videos
        cost = video_price.cost_of(header, sampling, spec, counter.time_tokens, is_list=is_list)
        seen[name] = told, cost.tokens + cost.text
    counter.close()
    wrong = {name: pair for name, pair in seen.items() if abs(pair[0] - pair[1]) > 0.02 * pair[0]}
    assert not wrong, seen
