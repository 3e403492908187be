"""What is rendered equals what the real vLLM 0.32 answered to the same requests (tests/render/record.py)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from sidecar.errors import RequestError
from sidecar.render.protocol import PATHS, RenderCall, RenderSettings
from sidecar.render.renderer import Renderer

FOLDER = Path(__file__).parent
MODELS = sorted(path.stem for path in (FOLDER / "recorded").glob("*.json"))
MAX_MODEL_LEN = 4096


def renderer(model: str) -> Renderer:
    return Renderer(RenderSettings(str(FOLDER / "models" / model)))


def recorded(model: str) -> list[dict[str, Any]]:
    return list(json.loads((FOLDER / "recorded" / f"{model}.json").read_text()))


def rendered(made: Renderer, model: str, case: dict[str, Any]) -> Any:
    """The answer to a recorded request, or the status and reason of an error."""
    call = RenderCall(PATHS[case["path"]], engine_model=model, max_model_len=MAX_MODEL_LEN, whole=True)
    try:
        return json.loads(made.render(call, json.dumps(case["request"]).encode()))
    except RequestError as e:
        return e.status, str(e)


def without_ids(answer: Any) -> Any:
    """An answer without the random part of its id; also those of several prompts."""
    if isinstance(answer, list):
        return [without_ids(one) for one in answer]
    if not isinstance(answer, dict):
        return answer
    id = answer["request_id"]
    return answer | {"request_id": id if id.endswith("-mine") else id.partition("-")[0]}


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")
@pytest.mark.parametrize("model", MODELS)
def test_answers_are_those_of_vllm(model: str) -> None:
    """Text, tools, one to eight images, odd images: equal in every member."""
    made, cases = renderer(model), recorded(model)
    differing = {
        case["name"]: (ours, theirs)
        for case in cases
        if case["status"] == 200
        and (ours := without_ids(rendered(made, model, case))) != (theirs := without_ids(case["answer"]))
    }
    assert differing == {}
    assert len(cases) >= 7


def test_the_models_have_templates_of_both_forms() -> None:
    """Content as one text and content piece by piece are both held against vLLM."""
    forms = {renderer(model)._template.takes_parts for model in MODELS}  # type: ignore[union-attr]
    assert forms == {True, False}
