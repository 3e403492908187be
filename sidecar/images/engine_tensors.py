"""Finished tensors for a vLLM that offers to take them: the file in shared memory, and the URL that names it.

The client's own bytes stay in the request, as base64 text of a data URL with one more parameter (plugins/vllm): an
engine that cannot use the file processes them itself. So nothing here can fail a request.

Rules: the file's size follows from the header before a worker is asked. What vLLM's cache of processed images holds is
mirrored by size, and not made again: then the parameter names no file.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import replace
from typing import Final

from sidecar.images.header_geometry import predict
from sidecar.images.protocol import ImageDone
from sidecar.images.shm_cache import SharedFile
from sidecar.images.tensor_layout import ELEMENT_BYTES
from sidecar.images.vllm_plugin import TensorOffer
from sidecar.kernels.grid import Geometry, ProcessorSpec

URL_VERSION: Final = 1
PARAMETER: Final = "sidecar-tensors"
MAX_REMEMBERED: Final = 4096  # images, about 1 kB each


def spec_for(spec: ProcessorSpec, dtype: str) -> ProcessorSpec:
    """The processor whose `pixel_values` have this dtype: bytes where the engine normalises on its device."""
    if dtype == "U8":
        return replace(spec, do_rescale=False, do_normalize=False)
    return replace(spec, half="" if dtype == "F32" else dtype)


def bytes_of(spec: ProcessorSpec, geometry: Geometry) -> int:
    """The bytes of one image's `pixel_values`."""
    rows, columns = spec.pixels([geometry])
    return rows * columns * ELEMENT_BYTES[spec.dtype]


def file_bytes(spec: ProcessorSpec, height: int, width: int) -> int:
    """The bytes of the `pixel_values` of an image of this size, or turned by 90 degrees; 0 if it will be refused."""
    found = [predict(spec, *size) for size in ((height, width), (width, height))]
    return max((bytes_of(spec, geometry) for geometry in found if geometry is not None), default=0)


def parameter(done: ImageDone, dtype: str, file: SharedFile | None) -> str:
    """The parameter of a data URL by which vLLM's plugin finds an image's tensors."""
    place = f"{file.folder}.{file.name}" if file is not None else "0.0"
    (height, width), (_, grid_h, grid_w) = done.original, done.grid
    return f"{PARAMETER}={URL_VERSION}.{place}.{height}.{width}.{grid_h}.{grid_w}.{dtype}"


class SentTensors:
    """The images whose tensors this relay process has sent to an engine, as far as its cache is likely to hold them."""

    def __init__(self) -> None:
        self._offer: TensorOffer | None = None
        self._images: OrderedDict[str, tuple[ImageDone, int]] = OrderedDict()
        self._bytes = 0

    def find(self, key: str, offer: TensorOffer) -> ImageDone | None:
        """What was sent under this key to the engine that makes this offer; None if nothing."""
        if offer != self._offer:
            self._offer, self._bytes = offer, 0
            self._images.clear()
        if (found := self._images.get(key)) is None:
            return None
        self._images.move_to_end(key)
        return found[0]

    def add(self, key: str, offer: TensorOffer, done: ImageDone, size: int) -> None:
        """Remember what was sent."""
        if not key or offer != self._offer:
            return
        _, earlier = self._images.pop(key, (None, 0))
        self._images[key] = done, size
        self._bytes += size - earlier
        while self._images and (self._bytes > offer.cache_bytes or len(self._images) > MAX_REMEMBERED):
            self._bytes -= self._images.popitem(last=False)[1][1]
