"""Prompts rendered by `sidecar render` equal those of the real vLLM's own renderer: whole answers, case by case."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from sidecar.errors import NotRendered, PromptRejected
from sidecar.render.protocol import PATHS, RenderCall, RenderSettings
from sidecar.render.renderer import Renderer
from sidecar.tools.render_server import RenderServerSettings, serving
from tests.render.odd_requests import odd_requests
from tests.render.record import MODELS, ask, cases_of

from .rendering import MAX_MODEL_LEN, renderer

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(400)]


# A start takes half a minute; the others, whose processors these share, are held by recorded answers.
LIVE = ("glm-4.1v", "qwen2-vl", "qwen3-vl", "text")


@pytest.fixture(scope="module", params=LIVE)
def theirs(
    request: pytest.FixtureRequest, vllm_python: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Any]:
    """vLLM's renderer of one model."""
    log = tmp_path_factory.mktemp("renderer") / "log"
    with renderer(MODELS, request.param, log) as running:
        yield running


async def test_answers_are_those_of_vllm(theirs: Any) -> None:
    """All of an answer is equal but a random id: tokens, hashes, placeholders, sampling parameters.

    What depends on the engine is asked of it at the start.
    """
    model = theirs.model
    wanted = cases_of(model.name)
    settings = RenderServerSettings(str(model), engine=theirs.url, listen=("127.0.0.1", 0), workers=1)
    async with serving(settings) as url:
        made, expected = await ask(url, wanted), await ask(theirs.url, wanted)
    differing = {
        one["name"]: (comparable(one["answer"]), comparable(other["answer"]))
        for one, other in zip(made, expected, strict=True)
        if (one["status"], comparable(one["answer"])) != (other["status"], comparable(other["answer"]))
    }
    assert differing == {}
    assert {one["status"] for one in expected} == {200}


async def test_odd_requests_never_get_another_answer(theirs: Any) -> None:
    """Where the relay would answer, its answer is vLLM's; what vLLM refuses is refused, or passed on to it."""
    model = theirs.model
    made = Renderer(RenderSettings(str(model)))
    wanted = odd_requests(images=model.name != "text")
    expected = {one["name"]: one for one in await ask(theirs.url, wanted)}
    differing = {}
    for name, (path, body) in wanted.items():
        call = RenderCall(PATHS[path], "", model.name, ("tiny",), MAX_MODEL_LEN, whole=True)
        status, answer = expected[name]["status"], comparable(expected[name]["answer"])
        try:
            ours = comparable(json.loads(made.render(call, json.dumps(body).encode())))
        except PromptRejected as e:
            if status == 200:
                differing[name] = (str(e), answer)
        except NotRendered:
            continue
        else:
            if (200, ours) != (status, answer):
                differing[name] = (ours, answer)
    assert differing == {}
    assert sum(one["status"] == 200 for one in expected.values()) > 100


def comparable(answer: Any) -> Any:
    """An answer without ids that are random."""
    if isinstance(answer, list):
        return [comparable(one) for one in answer]
    if "request_id" not in answer:  # an error
        return answer
    id = str(answer.get("request_id", ""))
    return answer | {"request_id": id if id.endswith("-mine") else id.partition("-")[0]}
