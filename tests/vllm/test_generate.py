"""A real vLLM accepts the sidecar's tensors at `/inference/v1/generate`, with --enable-scale-out."""

from __future__ import annotations

import base64
from collections.abc import Callable, Iterator
from itertools import permutations
from typing import Any

import pytest

from sidecar.client import Client
from sidecar.tools.synthetic_photos import photo
from tests.examples.loading import load

from . import client, processes
from .client import Http
from .processes import Engine, Sidecar
from .test_images import PATH, QUESTION, chat, sidecar_for

example = load("vllm_generate")
expanded, features, items, packed = example.expanded, example.features, example.items, example.packed

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(400)]

GENERATE = "/inference/v1/generate"
IMAGE = "<|vision_start|><|image_pad|><|vision_end|>"
PHOTOS = [photo(1920, 1080, 41), photo(333, 517, 42)]
KINDS = {"uint8": (), "float32": ("--no-mm-device-do-normalize",)}  # what vLLM's models want, by its flags


@pytest.fixture(scope="module", params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def engine(kind: str, model: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    """A vLLM whose token interface is open."""
    log = tmp_path_factory.mktemp("engine") / "engine.log"
    with processes.engine(model("vision"), log, more=("--enable-scale-out", *KINDS[kind])) as running:
        yield running


def in_any_order(item: dict[str, Any]) -> list[bytes]:
    """The forms that an item has in vLLM's msgpack: the same entries, one after the other."""
    return [packed(dict(entries)) for entries in permutations(item.items())]


async def tokens(engine: Engine, http: Http, prompt: str) -> list[int]:
    asked = {"model": "tiny", "prompt": prompt, "add_special_tokens": False}
    return list((await client.ask(http, f"{engine.url}/tokenize", asked))["tokens"])


async def test_our_features_are_those_that_vllm_renders(
    kind: Any, engine: Engine, start_sidecar: Callable[..., Sidecar], http: Http
) -> None:
    """Prompt, places and tensors equal vLLM's own /render to the last byte, and so do tokens and log-probabilities.

    Only the order of an item's tensors differs: it comes from a set, and changes with PYTHONHASHSEED. vLLM gets no
    image, only tensors; under another salt they have other names.
    """
    rendered = await client.ask(http, f"{engine.url}{PATH}/render", chat(*PHOTOS))
    sidecar = await sidecar_for(start_sidecar, engine.url, engine.model, http)
    async with Client(sidecar.url) as ours:
        made = await ours.preprocess(PHOTOS, values=kind)
    prompt = f"<|im_start|>user\n{IMAGE * len(PHOTOS)}{QUESTION}<|im_end|>\n<|im_start|>assistant\n"
    (pad,) = await tokens(engine, http, "<|image_pad|>")
    ids = expanded(await tokens(engine, http, prompt), pad, made)
    found = features(ids, pad, made, salt=b"a secret of this tenant")

    assert ids == rendered["token_ids"]
    assert found["mm_placeholders"] == rendered["features"]["mm_placeholders"]
    theirs = [base64.b64decode(item) for item in rendered["features"]["kwargs_data"]["image"]]
    same = [item in in_any_order(ours) for item, ours in zip(theirs, items(made), strict=True)]
    assert same == [True] * len(PHOTOS)  # megabytes: their difference would take minutes to print
    asked = {"model": "tiny", "token_ids": ids, "features": found, "sampling_params": rendered["sampling_params"]}
    through = await client.ask(http, engine.url + GENERATE, asked)
    without = await client.ask(http, engine.url + GENERATE, rendered)
    assert through["choices"] == without["choices"] and len(through["choices"][0]["logprobs"]["content"]) == 24


async def test_another_image_of_the_same_size_gives_another_answer(
    kind: Any, engine: Engine, start_sidecar: Callable[..., Sidecar], http: Http
) -> None:
    """What is answered comes from the tensors that were sent: with others the log-probabilities differ."""
    sidecar = await sidecar_for(start_sidecar, engine.url, engine.model, http)
    (pad,) = await tokens(engine, http, "<|image_pad|>")
    prompt = await tokens(engine, http, IMAGE + QUESTION)
    answers = []
    for seed in (1, 2):
        async with Client(sidecar.url) as ours:
            made = await ours.preprocess([photo(640, 480, seed)], values=kind)
        ids = expanded(prompt, pad, made)
        sampling = {"max_tokens": 4, "temperature": 0, "logprobs": 2}
        body = {
            "model": "tiny",
            "token_ids": ids,
            "features": features(ids, pad, made, b"salt"),
            "sampling_params": sampling,
        }
        answers.append((await client.ask(http, engine.url + GENERATE, body))["choices"][0]["logprobs"])
    assert answers[0] != answers[1]
