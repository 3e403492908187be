"""Through shared memory, with our plugin in its environment, a real vLLM sees the same pixels and gives the same answer."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from . import client, processes
from .client import Http
from .processes import Engine, Sidecar
from .test_images import BODIES, PATH, beside, formats, recording

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(400)]


@pytest.fixture(scope="module")
def engine(model: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    """A vLLM with the plugin, which lies in a folder of its own: the shared environment stays as it is."""
    site = tmp_path_factory.mktemp("site")
    with processes.engine(model("vision"), site / "engine.log", environ=processes.with_plugin(site)) as running:
        yield running


def left_behind() -> list[str]:
    return [p.name for p in Path("/dev/shm").glob("sidecar-images-*/out-*")]


async def test_pixels_in_shared_memory_give_the_same_answer(
    engine: Engine, start_sidecar: Callable[..., Sidecar], http: Http
) -> None:
    """Text, log-probabilities and usage are the same to the last bit; nothing is left behind; a repeated image, too."""
    bodies = [BODIES[name] for name in ("1080p", "EXIF 6", "small, enlarged", "alpha", "two", "1080p")]
    without = [await client.ask(http, engine.url + PATH, body) for body in bodies]
    async with recording(engine.url, http) as (url, recorder):
        sidecar = await beside(start_sidecar, url, engine.model, http, images="shm")
        through = [await client.ask(http, sidecar.url + PATH, body) for body in bodies]
    assert through == without
    seen = [found for body in recorder.bodies for found in formats(body)]
    assert len(seen) == 7 and all(found.startswith("sidecar-shm://") for found in seen)
    assert left_behind() == []


async def test_a_name_that_is_not_there_is_the_clients_error(engine: Engine, http: Http) -> None:
    """What a client makes up is answered with 4xx, and the engine goes on."""
    url = "sidecar-shm://sidecar-images-x/out-" + "0" * 32 + "?h=28&w=28&o=0"
    part = {"type": "image_url", "image_url": {"url": url}}
    body = client.completion(max_tokens=1) | {"messages": [{"role": "user", "content": [part]}]}
    async with http.post(engine.url + PATH, json=body) as answer:
        assert 400 <= answer.status < 500, await answer.text()
    good = {"role": "user", "content": "hello"}
    async with http.post(engine.url + PATH, json=client.completion(max_tokens=1) | {"messages": [good]}) as answer:
        assert answer.status == 200
