"""Tokens of images, by their files' first bytes."""

from __future__ import annotations

import base64
import io
import json
from typing import Any

import pytest
from PIL import Image

from sidecar.events import Admitted
from sidecar.kernels import families
from sidecar.kernels.grid import ProcessorSpec
from sidecar.load.cost_model import Coefficients
from sidecar.load.estimator import DEFAULT_IMAGE_TOKENS, Estimator
from sidecar.relay.pricing.charge import Pricing, tokens_of
from sidecar.relay.request_body import ImagePart
from sidecar.tools.scripted_engine.server import EngineSettings, ScriptedEngine
from tests.relay.work import FAST

QWEN = {
    "image_processor_type": "Qwen2VLImageProcessor",
    "min_pixels": 3136,
    "max_pixels": 12845056,
    "patch_size": 14,
    "merge_size": 2,
    "temporal_patch_size": 2,
    "resample": 3,
    "do_resize": True,
    "do_rescale": True,
    "rescale_factor": 1 / 255,
    "do_normalize": True,
    "image_mean": [0.5, 0.5, 0.5],
    "image_std": [0.5, 0.5, 0.5],
    "do_convert_rgb": True,
}


@pytest.fixture(scope="module")
def spec(tmp_path_factory: pytest.TempPathFactory) -> ProcessorSpec:
    folder = tmp_path_factory.mktemp("qwen")
    (folder / "preprocessor_config.json").write_text(json.dumps(QWEN))
    found = families.from_dir(str(folder))
    assert found is not None
    return found


def text(width: int, height: int, kind: str, **how: Any) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (width, height)).save(file, kind, **how)
    return base64.b64encode(file.getvalue())


def part(data: bytes) -> ImagePart:
    return ImagePart("messages[0].content[0]", "image/x", memoryview(data))


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_a_size_in_the_header_gives_the_models_own_number(spec: ProcessorSpec, kind: str) -> None:
    """560 x 280 pixels are 20 x 10 tokens of 28 pixels a side, also where a block of 70 kB of metadata comes first."""
    assert tokens_of([part(text(560, 280, kind))], spec) == [200]
    exif = b"Exif\0\0" + bytes(65_000)
    assert tokens_of([part(text(560, 280, kind, exif=exif) if kind == "JPEG" else text(560, 280, kind))], spec) == [200]


def test_what_does_not_say_its_size_is_left_out(spec: ProcessorSpec) -> None:
    """Broken base64, no image, an image that the processor refuses: each counts as unknown, and the others count."""
    good = part(text(56, 56, "PNG"))
    strip = part(text(8000, 4, "PNG"))
    assert tokens_of([part(b"!!!!"), part(b""), part(base64.b64encode(b"x" * 99)), strip, good], spec) == [4]


async def test_images_that_pass_are_held_by_their_size(rig: Any, spec: ProcessorSpec) -> None:
    """With images off a picture counts as the model will see it, and one behind a link as one of unknown size."""
    urls = ["data:image/png;base64," + text(560, 280, "PNG").decode(), "http://127.0.0.1/x.png"]
    content = [{"type": "image_url", "image_url": {"url": url}} for url in urls]
    async with ScriptedEngine(EngineSettings(**FAST)) as engine:
        r = await rig(engine.url, pricing=Pricing(Estimator(Coefficients()), spec=spec))
        body = {"model": "scripted", "messages": [{"role": "user", "content": content}], "max_tokens": 2}
        async with r.client.post(r.url + "/v1/chat/completions", json=body) as got:
            await got.read()
    [admitted] = r.emitted.of(Admitted)
    assert (admitted.expected.images, admitted.expected.image_tokens) == (2, 200 + DEFAULT_IMAGE_TOKENS)
