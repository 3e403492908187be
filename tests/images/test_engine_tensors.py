"""Finished tensors for an engine: real workers write the file, and its bytes are those of /v1/preprocess."""

from __future__ import annotations

import base64
from pathlib import Path
from typing import Any

import pytest

from sidecar.errors import BadImage, ImagesBusy
from sidecar.images import engine_tensors, shm_handoff
from sidecar.images.engine_tensors import SentTensors, spec_for
from sidecar.images.protocol import ImageDone
from sidecar.images.service import ImageService
from sidecar.images.shm_cache import SHARED_PREFIX, CacheFolder, ImageCache
from sidecar.images.vllm_plugin import Handoffs, TensorOffer
from sidecar.runtime import open_files
from sidecar.tools import synthetic_photos

from .test_imagecache import plugin

OFFER = TensorOffer("", "U8", 1 << 30, 1)
PHOTOS = {
    "landscape": synthetic_photos.photo(640, 480, seed=4),
    "turned": synthetic_photos.photo(900, 300, seed=5, exif_orientation=6),
    "enlarged": synthetic_photos.photo(40, 30, seed=6),
}


@pytest.fixture
def images(server: Any, spec: Any, tmp_path: Path) -> ImageService:
    folder = CacheFolder(str(tmp_path), 64 << 20)
    return ImageService(server.path, server.settings, spec, ImageCache(folder.path, folder.bytes, b"secret"))


def files(tmp_path: Path) -> list[Path]:
    return sorted(tmp_path.glob(f"*/{SHARED_PREFIX}*"))


@pytest.mark.parametrize("dtype", ["U8", "F32", "BF16", "F16"])
@pytest.mark.parametrize("name", PHOTOS)
async def test_the_file_holds_the_processors_tensor(
    images: ImageService, spec: Any, tmp_path: Path, name: str, dtype: str
) -> None:
    """The same bytes as the tensor that is sent to a client, nothing after them; the URL says its size and grid."""
    data, offer = base64.b64encode(PHOTOS[name]), TensorOffer("", dtype, 0, 1)
    [expected] = await images.tensors([(data, True)], spec=spec_for(spec, dtype))
    got = await images.engine_tensors(data, "x", "", "r", offer)
    assert got is not None and (got.outcome, got.base64, got.url) == ("ok", None, "")
    [file] = files(tmp_path)
    assert file.read_bytes() == bytes(expected.values) and file.stat().st_mode & 0o777 == 0o600
    assert got.bytes_out == len(expected.values) and got.tokens == expected.prepared.tokens
    height, width = expected.prepared.original
    _, grid_h, grid_w = expected.prepared.grid
    numbers = f"1.{file.parent.name}.{file.name}.{height}.{width}.{grid_h}.{grid_w}.{dtype}"
    assert got.parameter == f"sidecar-tensors={numbers}"
    url = f"data:image/jpeg;{got.parameter};base64,"
    assert plugin().tensors.URL_PATTERN.fullmatch(url), "the plug-in reads what is written here"
    images.release("r")
    assert files(tmp_path) == []


async def test_a_worker_measures_the_costs(images: ImageService) -> None:
    """Within its sandbox and its CPU limit, a worker of a running server answers with the costs of this machine."""
    await images.calibrate()
    assert images.costs is not None and images.costs.by_step["decode_jpeg"] > 0


async def test_what_was_sent_is_not_made_again(images: ImageService, tmp_path: Path) -> None:
    """A repeat names no file, until the engine's cache has had to give it up, or the engine is another process."""
    data = base64.b64encode(PHOTOS["landscape"])

    async def sent(offer: TensorOffer) -> tuple[str, bool]:
        got = await images.engine_tensors(data, "x", "", "r", offer)
        assert got is not None
        images.release("r")
        return got.outcome, "=1.0.0." in got.parameter

    assert [await sent(OFFER), await sent(OFFER)] == [("ok", False), ("cached", True)]
    restarted = TensorOffer("", "U8", 1 << 30, 2)
    assert [await sent(restarted), await sent(restarted)] == [("ok", False), ("cached", True)]
    without_cache = TensorOffer("", "U8", 0, 2)
    assert [await sent(without_cache), await sent(without_cache)] == [("ok", False), ("ok", False)]
    other = await images.engine_tensors(data, "x", "another tenant", "r", restarted)
    assert other is not None and other.outcome == "ok"


def test_memory_of_what_was_sent_is_bounded() -> None:
    """The oldest go when the sum of sizes exceeds the engine's cache, as they go there."""
    sent, offer = SentTensors(), TensorOffer("", "U8", 100, 1)
    done = ImageDone("ok", "jpeg", "", 28, 28, (1, 2, 2), 1, "h", (), 1, (28, 28))
    for key in "abc":
        assert sent.find(key, offer) is None
        sent.add(key, offer, done, 40)
    assert [sent.find(key, offer) is not None for key in "abc"] == [False, True, True]
    sent.add("b", offer, done, 60)
    assert [sent.find(key, offer) is not None for key in "bc"] == [True, True]


async def test_what_has_no_room_passes(images: ImageService, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Beyond the bytes that may wait for engines nothing is written; once a request ends there is room again."""
    monkeypatch.setattr(shm_handoff, "MAX_TENSOR_FILE_BYTES", 400_000)
    landscape, turned = (base64.b64encode(PHOTOS[name]) for name in ("landscape", "turned"))
    assert await images.engine_tensors(landscape, "x", "", "first", OFFER) is not None
    with pytest.raises(ImagesBusy):
        await images.engine_tensors(turned, "x", "", "second", OFFER)
    assert len(files(tmp_path)) == 1
    images.release("first")
    assert await images.engine_tensors(turned, "x", "", "second", OFFER) is not None


async def test_a_refused_image_leaves_no_file(images: ImageService, tmp_path: Path) -> None:
    """An image that cannot be decoded, or none at all: the error or None, and nothing in shared memory."""
    broken = PHOTOS["landscape"][:600]
    with pytest.raises(BadImage):
        await images.engine_tensors(base64.b64encode(broken), "x", "", "r", OFFER)
    assert await images.engine_tensors(base64.b64encode(b"no image"), "x", "", "r", OFFER) is None
    assert files(tmp_path) == []
    descriptors = open_files.count()
    with pytest.raises(BadImage):
        await images.engine_tensors(base64.b64encode(broken), "x", "", "r", OFFER)
    assert open_files.count() == descriptors


async def test_an_engine_that_offers_nothing_gets_none(images: ImageService, tmp_path: Path) -> None:
    """The way follows from what the engine takes: tensors, pixels in shared memory, or a resized image inline."""
    data = base64.b64encode(PHOTOS["landscape"])
    ways = {}
    for name, handoffs in {
        "tensors": Handoffs(True, OFFER),
        "pixels": Handoffs(True, None),
        "nothing": Handoffs(False, None),
    }.items():
        got = await images.hand_over(data, "x", "", name, handoffs)
        ways[name] = bool(got.parameter), bool(got.url), got.base64 is not None
        images.release(name)
    assert ways == {
        "tensors": (True, False, False),
        "pixels": (False, True, False),
        "nothing": (False, False, True),
    }
    assert images.inline_bytes == 0 and files(tmp_path) == []


def test_a_size_covers_both_orientations(spec: Any) -> None:
    """The file is large enough for an image that is turned when it is decoded."""
    for height, width in ((900, 300), (300, 900), (613, 337)):
        sizes = [engine_tensors.bytes_of(spec, spec.geometry(*pair)) for pair in ((height, width), (width, height))]
        assert engine_tensors.file_bytes(spec, height, width) == max(sizes)
    assert engine_tensors.file_bytes(spec, 1, 100_000) == 0
