"""Public image files x families: what a worker makes of each is what the engine's own path makes, or it passes.

`make test-fixtures` fetches the files first: 1,086 of Pillow's own tests and the PngSuite; more by IMAGE_FIXTURES.
The engines' own loading code sees them in tests/vllm/test_image_loading.py.
"""

from __future__ import annotations

import hashlib
import math
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from sidecar.errors import BadImage
from sidecar.images import file_headers, tensor_layout
from sidecar.images.decode_bounds import find_excess
from sidecar.images.pass_reasons import PASS_REASONS, of_refusal
from sidecar.images.protocol import ImageLimits
from sidecar.images.service import ImageService
from sidecar.images.worker import tensors, tiles
from sidecar.images.worker.decode import FORMATS, ImageRejected, decode
from sidecar.images.worker.pipeline import octets
from sidecar.kernels import families
from sidecar.kernels.grid import TileSpec
from tests.missing import missing

from . import public_files, test_families, test_tiles
from .conftest import QWEN2_VL, Server
from .test_decode import engine
from .test_families import Family
from .test_tiles import KINDS, theirs

pytestmark = [pytest.mark.fixtures, pytest.mark.timeout(1800), pytest.mark.filterwarnings("ignore")]

ROWS = test_families.ROWS | test_tiles.ROWS
assert len(ROWS) == len(test_families.ROWS) + len(test_tiles.ROWS), "a row of one name hides that of the other"
LIMITS = ImageLimits(20 << 20, 50_000_000)
ODD_SIDE = 30  # a processor may fail on images of fewer pixels, which the geometry allows (test_families.py)
# Why a file that the engine opens need not be decoded here: in a request it goes on as it came.
PASSING = {"unknown_format", "format", "too_many_pixels", "too_long", "too_many_scans", "too_many_parts"}


Pixels = np.ndarray[Any, Any]


@pytest.fixture(scope="module")
def files() -> dict[str, bytes]:
    found = public_files.all_files()
    if len(found) < 100:
        missing("the public files are not fetched (make test-fixtures)")
    return found


def decoded(data: bytes, *, flatten: bool = True) -> Pixels | str:
    """A worker's pixels, or why it has none."""
    header = file_headers.read(data)
    if header is None:
        return "unknown_format"
    if header.format.upper() not in FORMATS:
        return "format"
    if (excess := find_excess(data, header, LIMITS)) is not None:
        return of_refusal(excess[0])
    try:
        return decode(data, header, LIMITS, flatten=flatten)
    except ImageRejected as refused:
        return of_refusal(refused.reason)


@pytest.fixture(scope="module")
def pictures(files: dict[str, bytes]) -> dict[str, Pixels]:
    """What the files show, each different picture once, by the name of a file that shows it."""
    found: dict[bytes, tuple[str, Pixels]] = {}
    for name, data in files.items():
        if not isinstance(pixels := decoded(data), str):
            key = hashlib.sha256(f"{pixels.shape}".encode() + pixels.tobytes()).digest()
            found.setdefault(key, (name, pixels))
    return dict(found.values())


def made(row: Family, pixels: Pixels) -> dict[str, torch.Tensor] | None:
    """All tensors of one picture, as /v1/preprocess sends them; None where its shape is refused."""
    spec = row.spec()
    try:
        geometry = spec.geometry(*pixels.shape[:2])
    except ValueError:
        return None
    if isinstance(spec, TileSpec):
        values = tiles.prepare(pixels, geometry, spec)
    else:
        values = tensors.prepare(pixels, geometry, spec)
    groups = tensor_layout.pieces([octets(values)], [geometry], spec)
    joined = bytearray(b"".join(part for group in groups for part in group))
    found: dict[str, torch.Tensor] = {}
    for name, shape in spec.values([geometry]).items():
        size = tensor_layout.ELEMENT_BYTES[spec.dtype] * math.prod(shape)
        found[name] = torch.frombuffer(joined[:size], dtype=KINDS[spec.dtype]).reshape(shape)
        joined = joined[size:]
    assert not joined
    for name, integers in spec.integers([geometry]).items():
        raw = bytearray(b"".join(part for group in tensor_layout.integers([integers]) for part in group))
        found[name] = torch.frombuffer(raw, dtype=KINDS[integers[0][0]]).reshape(integers[0][1])
    return found


def processed(row: Family, processor: Any, pixels: Pixels) -> dict[str, torch.Tensor] | None:
    """The processor's tensors of what the engine loaded; None where it refuses the shape."""
    try:
        found = theirs(row, torch.from_numpy(pixels).permute(2, 0, 1), processor=processor)
    except (ValueError, RuntimeError, ZeroDivisionError):
        return None
    return {name: torch.as_tensor(value) for name, value in found.items()}


def test_each_file_is_decoded_as_by_the_engine(files: dict[str, bytes]) -> None:
    """Its pixels, or its refusal, or a reason to pass: nothing that the engine opens is refused for another one.

    For a request, where transparent images pass, too; what is then decoded has the same pixels.
    """
    outcomes, wrong = Counter[str](), []
    for name, data in files.items():
        ours, opaque = decoded(data), decoded(data, flatten=False)
        wanted = None if isinstance(ours, str) and ours in PASSING else engine(data)
        if isinstance(ours, str):
            outcomes[ours] += 1
            is_right = ours in PASSING or wanted is None
        else:
            outcomes["pixels"] += 1
            is_right = wanted is not None and np.array_equal(ours, wanted)
        if isinstance(opaque, str):
            is_right &= opaque == "transparent" or opaque == ours
        else:
            is_right &= not isinstance(ours, str) and np.array_equal(opaque, ours)
        if not is_right:
            wrong.append(name)
    print(Image.__version__, len(files), dict(outcomes))
    assert not wrong
    assert set(outcomes) <= {"pixels", *PASS_REASONS} and outcomes["pixels"] > 500


@pytest.mark.parametrize("name", ROWS)
def test_each_picture_gives_the_processors_tensors(pictures: dict[str, Pixels], name: str) -> None:
    """Bit for bit, all tensors; refused only where the processor refuses the shape.

    And where a resized picture may go to an engine in the place of its file, the processor makes the same of it.
    """
    row = ROWS[name]
    processor, spec, compared, replaced, wrong = row.processor(), row.spec(), 0, 0, []
    for file, pixels in pictures.items():
        wanted, ours = processed(row, processor, pixels), made(row, pixels)
        if wanted is None or ours is None:
            is_right = wanted is ours or (wanted is None and min(pixels.shape[:2]) < ODD_SIDE)
        else:
            compared += 1
            is_right = same_tensors(ours, wanted, all_names=isinstance(spec, TileSpec))
            geometry = spec.geometry(*pixels.shape[:2])
            if spec.keeps(geometry):
                replaced += 1
                again = processed(row, processor, tensors.resize(pixels, geometry, spec))
                is_right &= again is not None and same_tensors(again, wanted, all_names=True)
        if not is_right:
            wrong.append(file)
    print(name, compared, "compared,", replaced, "replaced")
    assert not wrong
    assert compared > 300 and (replaced > 300) == spec.inline


def same_tensors(ours: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor], *, all_names: bool) -> bool:
    """Whether ours are among the processor's, bit for bit; a row of patches may have another shape."""
    if all_names and set(ours) != set(wanted):
        return False
    return all(
        torch.equal(tensor.flatten(1), wanted[name].to(tensor.dtype).flatten(1))
        if name == "pixel_values"
        else tensor.shape == wanted[name].shape and torch.equal(tensor, wanted[name].to(tensor.dtype))
        for name, tensor in ours.items()
    )


@pytest.fixture
def worker_server(start_server: Callable[..., Server]) -> Iterator[Server]:
    yield start_server(image_workers=1, image_max_pixels=LIMITS.max_pixels)


async def test_real_workers_survive_each_file(files: dict[str, bytes], worker_server: Server) -> None:
    """Served by one confined worker, one after the other: no file ends it, and each outcome is one of those above."""
    spec = families.from_config(QWEN2_VL)
    assert spec is not None
    images = ImageService(worker_server.path, worker_server.settings, spec)
    await images.tensors([(next(data for name, data in files.items() if name.endswith("hopper.jpg")), False)])
    before = worker_server.workers()
    for name, data in files.items():
        expected = decoded(data)
        try:
            found = (await images.tensors([(data, False)]))[0].prepared.outcome
        except BadImage as refused:
            found = of_refusal(refused.reason)
        assert found not in ("failed", "deadline"), name
        if isinstance(expected, str):  # a worker has no bound of Pillow's own, and may say why more exactly
            assert found != "ok" and (expected not in PASSING or found in PASSING), (name, found)
        else:
            assert found in ("ok", "aspect"), (name, found)
    assert worker_server.workers() == before
