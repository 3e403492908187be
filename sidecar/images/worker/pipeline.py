"""Run one image job: a payload in, ImageDone or ImageRefused and a payload out. No sockets, no processes.

Rules: never raises for what a client sent. Errors name the limit and the remedy, never the content.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, Final

import pybase64
import torch

from sidecar.images import file_headers, header_geometry
from sidecar.images.protocol import INLINE, LAYOUT, PIXELS, RAW, ImageDone, ImageJob, ImageRefused
from sidecar.images.worker import tiles
from sidecar.images.worker.decode import ImageRejected, check_size, decode, orientation, turned
from sidecar.images.worker.gpu_channel import GpuChannel, GpuRequest
from sidecar.images.worker.tensors import ppm, prepare, resize, resized_ppm, round_to_half, values
from sidecar.kernels import families
from sidecar.kernels.grid import Geometry, PatchSpec, ProcessorSpec, TileSpec

Payload = bytes | bytearray | memoryview
Answer = tuple[ImageDone | ImageRefused, Payload]

PPM_MEDIA_TYPE: Final = "image/x-portable-pixmap"
BINARY_MEDIA_TYPE: Final = "application/octet-stream"
UNKNOWN_FORMAT: Final = "it is in no known format; send JPEG, PNG, WebP, GIF, BMP or TIFF"


@dataclass(slots=True)
class StageTimer:
    """Measures the seconds of each stage of one job, in order."""

    now: Callable[[], float] = time.perf_counter
    taken: list[tuple[str, float]] = field(default_factory=list)
    _since: float = 0.0

    def __post_init__(self) -> None:
        self._since = self.now()

    def end(self, stage: str) -> None:
        """End `stage` and begin the next one."""
        now = self.now()
        self.taken.append((stage, now - self._since))
        self._since = now


@dataclass(frozen=True, slots=True)
class DecodedImage:
    """A decoded image; `geometry` is its target."""

    pixels: Any  # uint8 tensor (3, height, width)
    geometry: Geometry
    header: file_headers.Header
    hash: str
    bytes_in: int
    stages: StageTimer


def prepare_image(job: ImageJob, payload: Payload, gpu: GpuChannel | None = None) -> Answer:
    """Run one job; resize on `gpu` if there is one and the job allows it, else here."""
    spec = families.from_json(job.spec)
    name = "unknown"
    try:
        image = open_image(job, payload, spec)
        if isinstance(image, ImageDone):
            return image, b""
        name = image.header.format
        if job.want == LAYOUT:
            return done(image, ""), b""
        # the GPU's kernel makes one resized copy of an image: views are made on the CPU
        if (
            gpu is not None
            and job.gpu
            and (job.want in INLINE or not image.geometry.views)
            and (answer := _on_gpu(gpu, job, image, spec)) is not None
        ):
            return answer
        if job.want == PIXELS:
            file = resized_ppm(image.pixels, image.geometry, spec)
            image.stages.end("resize")
            return _as_text(image, file)
        if job.want in INLINE:
            pixels = resize(image.pixels, image.geometry, spec)
            image.stages.end("resize")
            return finish(job, image, pixels, spec)
        tensor = _tensor(image.pixels, image.geometry, spec)
        image.stages.end("resize")
        return done(image, BINARY_MEDIA_TYPE), octets(tensor)
    except ImageRejected as e:
        return ImageRefused(e.reason, str(e), name), b""
    except MemoryError:
        return ImageRefused("image_failed", "it needs more memory than one image may use", name), b""


def _on_gpu(gpu: GpuChannel, job: ImageJob, image: DecodedImage, spec: ProcessorSpec) -> Answer | None:
    """The GPU's answer, or None."""
    rows = image.pixels.permute(1, 2, 0).contiguous().numpy()
    inline, (height, width) = job.want in INLINE, image.geometry.size
    if rows.shape[:2] == (image.geometry.height, image.geometry.width) and inline:
        return None  # nothing to resize
    size = 3 * height * width if inline else tensor_bytes(image.geometry, spec)
    octets = gpu.process(rows.reshape(-1).data, GpuRequest(rows.shape[0], rows.shape[1], job.spec, inline), size)
    if octets is None:
        return None
    image.stages.end("resize_gpu")
    if not inline:
        return done(image, BINARY_MEDIA_TYPE), _to_half(octets, spec)
    return finish(job, image, torch.frombuffer(octets, dtype=torch.uint8).view(height, width, 3).permute(2, 0, 1), spec)


def _to_half(floats: Payload, spec: ProcessorSpec) -> Payload:
    """The GPU's float32 result, in half precision if `spec` requires it."""
    return octets(round_to_half(torch.frombuffer(floats, dtype=torch.float32), spec)) if spec.half else floats


def _tensor(pixels: Any, geometry: Geometry, spec: ProcessorSpec) -> Any:
    if isinstance(spec, TileSpec):
        return round_to_half(tiles.prepare(pixels, geometry, replace(spec, half="")), spec)
    return prepare(pixels, geometry, spec)


def tensor_bytes(geometry: Geometry, spec: ProcessorSpec) -> int:
    """Bytes of one image's `pixel_values`."""
    height, width = geometry.size
    copies = spec.temporal_patch_size if isinstance(spec, PatchSpec) else 1
    return 3 * height * width * copies * (4 if spec.floats else 1)


def open_image(job: ImageJob, payload: Payload, spec: ProcessorSpec) -> DecodedImage | ImageDone:
    """Unpack, check and decode; ImageDone if the image must pass through untouched. Raises ImageRejected."""
    stages = StageTimer()
    data = _unpack(job, payload)
    header = file_headers.read(data)
    if header is None:
        raise ImageRejected("image_unknown_format", UNKNOWN_FORMAT)
    client_chars = header_geometry.base64_chars(payload, job.base64)
    if job.want in INLINE and (
        not spec.inline or (job.want == PIXELS and _is_passed_early(header, spec, client_chars))
    ):
        check_size(header.height, header.width, job.limits)
        stages.end("unpack")
        return _passed(job, header, "", len(data), stages, _predict_geometry(data, header, spec))
    digest = hashlib.blake2b(data, digest_size=16, key=spec.fingerprint.encode()).hexdigest()
    stages.end("unpack")
    if header.format not in file_headers.DECODED_FORMATS:
        return _passed(job, header, digest, len(data), stages)
    pixels = decode(data, header, job.limits)
    height, width = pixels.shape[-2:]
    stages.end("decode")
    geometry = _geometry(spec, height, width)
    for size in ((geometry.height, geometry.width), *(view.canvas for view in geometry.views)):
        check_size(*size, job.limits)
    too_large = job.want == PIXELS and not header_geometry.is_worth_resizing(height * width, geometry, client_chars)
    if too_large or (job.want in INLINE and not spec.keeps(geometry)):
        return _passed(job, header, digest, len(data), stages, geometry)
    return DecodedImage(pixels, geometry, header, digest, len(data), stages)


def finish(job: ImageJob, image: DecodedImage, pixels: Any, spec: ProcessorSpec) -> Answer:
    """Encode resized pixels as the job requires."""
    if job.want == PIXELS:
        return _as_text(image, ppm(pixels))
    payload = octets(pixels.permute(1, 2, 0) if job.want == RAW else values(pixels, image.geometry, spec))
    image.stages.end("encode")
    return done(image, BINARY_MEDIA_TYPE), payload


def _as_text(image: DecodedImage, file: memoryview) -> Answer:
    """A PPM as base64 text, for a data URL."""
    payload = pybase64.b64encode(file)
    image.stages.end("encode")
    return done(image, PPM_MEDIA_TYPE), payload


def octets(tensor: Any) -> memoryview:
    """A tensor's memory."""
    view: memoryview = tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data
    return view


def done(image: DecodedImage, media_type: str) -> ImageDone:
    """The answer for an image that was prepared."""
    g = image.geometry
    return ImageDone(
        "ok",
        image.header.format,
        media_type,
        *g.size,
        (g.grid_t, g.grid_h, g.grid_w),
        g.tokens,
        image.hash,
        tuple(image.stages.taken),
        image.bytes_in,
        tuple(image.pixels.shape[-2:]),
    )


def _unpack(job: ImageJob, payload: Payload) -> bytes:
    try:
        data = pybase64.b64decode(payload, validate=True) if job.base64 else bytes(payload)
    except ValueError:
        raise ImageRejected("image_base64", "its base64 text is damaged") from None
    if not data:
        raise ImageRejected("image_empty", "it is empty")
    if len(data) > job.limits.max_bytes:
        raise ImageRejected("image_too_large", f"it has {len(data)} bytes and the limit is {job.limits.max_bytes}")
    return data


def _is_passed_early(header: file_headers.Header, spec: ProcessorSpec, client_chars: int) -> bool:
    """True if the header shows that preparing the image inline costs more than it saves."""
    try:
        geometry = spec.geometry(header.height, header.width)
    except ValueError:
        return False  # unknown until it is decoded, or an aspect that is refused then
    return not header_geometry.is_worth_resizing(header.height * header.width, geometry, client_chars)


def _predict_geometry(data: bytes, header: file_headers.Header, spec: ProcessorSpec) -> Geometry | None:
    """The geometry, for its tokens, of an image that is not decoded here; None if its header has no size."""
    try:
        return spec.geometry(*turned(header.height, header.width, orientation(data) if header.tagged else 1))
    except ValueError:
        return None


def _geometry(spec: ProcessorSpec, height: int, width: int) -> Geometry:
    try:
        return spec.geometry(height, width)
    except ValueError as e:
        raise ImageRejected("image_aspect", f"{e}; the model does not accept such an image") from None


def _passed(
    job: ImageJob,
    header: file_headers.Header,
    digest: str,
    size: int,
    stages: StageTimer,
    geometry: Geometry | None = None,
) -> ImageDone:
    """The reply for an image that the engine gets untouched; raises ImageRejected for jobs that need its pixels."""
    if job.want not in INLINE:
        raise ImageRejected("image_unsupported", f"{header.format} is not supported here; send JPEG, PNG or WebP")
    g = geometry or Geometry(0, 0)
    return ImageDone(
        "passed",
        header.format,
        "",
        *g.size,
        (g.grid_t, g.grid_h, g.grid_w),
        g.tokens,
        digest,
        tuple(stages.taken),
        size,
    )
