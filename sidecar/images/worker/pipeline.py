"""Run one image job: a payload in, ImageDone or ImageRefused and a payload out. No sockets, no processes.

Rules: never raises for what a client sent. Errors name the limit and the remedy, never the content.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Final

import numpy as np
import pybase64

from sidecar.images import file_headers, stored_image
from sidecar.images.decode_bounds import find_excess
from sidecar.images.header_geometry import base64_chars, is_worth_resizing, predict
from sidecar.images.protocol import COSTS, INLINE, LAYOUT, PIXELS, Data, ImageDone, ImageJob, ImageRefused
from sidecar.images.tensor_layout import ELEMENT_BYTES
from sidecar.images.worker import calibration, tiles
from sidecar.images.worker.decode import FORMATS, ImageRejected, check_size, decode, orientation, turned
from sidecar.images.worker.gpu_channel import GpuChannel, GpuRequest
from sidecar.images.worker.tensors import Pixels, ppm, prepare, resize, resized_ppm
from sidecar.kernels import families
from sidecar.kernels.grid import Geometry, PatchSpec, ProcessorSpec, Size, TileSpec
from sidecar.kernels.jpeg import JpegFile, open_jpeg

Answer = tuple[ImageDone | ImageRefused, Data]
OnSize = Callable[[int], None]

PPM_MEDIA_TYPE: Final = "image/x-portable-pixmap"
BINARY_MEDIA_TYPE: Final = "application/octet-stream"
UNKNOWN_PIXELS: Final = 8 << 20  # what an image whose header has no size is taken for
UNKNOWN_FORMAT: Final = "it is in no known format; send JPEG, PNG, WebP, GIF, BMP or TIFF"


@dataclass(slots=True)
class StageTimer:
    """Measures the seconds of each stage of one job, in order."""

    taken: list[tuple[str, float]] = field(default_factory=list)
    _since: float = field(default_factory=time.perf_counter)

    def end(self, stage: str) -> None:
        """End `stage` and begin the next one."""
        now = time.perf_counter()
        self.taken.append((stage, now - self._since))
        self._since = now


@dataclass(frozen=True, slots=True)
class DecodedImage:
    """An image of a known size; `geometry` is its target.

    A JPEG for the GPU was opened as `jpeg`, and not decoded; nor was an image of which only the layout is wanted.
    """

    pixels: Pixels | None
    jpeg: JpegFile | None
    size: Size
    geometry: Geometry
    header: file_headers.Header
    hash: str
    bytes_in: int
    stages: StageTimer


def run_job(
    job: ImageJob,
    payload: Data,
    into: memoryview | None = None,
    *,
    gpu: GpuChannel | None = None,
    on_size: OnSize = lambda _: None,
) -> Answer:
    """Run one job; `into` is the memory of the file that came with it, which then receives the answer's payload."""
    if job.want == COSTS:
        return ImageDone("ok", "", "", 0, 0, (0, 0, 0), 0, "", calibration.measure(), 0), b""
    answer, made = prepare_image(job, payload, gpu, on_size, into)
    if into is None or not isinstance(answer, ImageDone) or answer.outcome != "ok":
        return answer, made
    if len(made) > len(into):
        return ImageRefused("image_failed", "it is larger than its header says", answer.format), b""
    if not _is_same_memory(made, into):
        into[: len(made)] = memoryview(made)
    return answer, b""


def _is_same_memory(made: Data, into: memoryview) -> bool:
    """True if `made` was written to `into` in the first place."""
    return np.frombuffer(made, np.uint8).ctypes.data == np.frombuffer(into, np.uint8).ctypes.data


def prepare_image(
    job: ImageJob,
    payload: Data,
    gpu: GpuChannel | None = None,
    on_size: OnSize = lambda _: None,
    into: memoryview | None = None,
) -> Answer:
    """Run one job; resize on `gpu` if there is one and the job allows it, else here. Patches may be made in `into`.

    `on_size` is called with the number of pixels to decode and to make, before either.
    """
    spec = families.from_json(job.spec)
    name = "unknown"
    try:
        image = open_image(job, payload, spec, on_size, for_gpu=_is_for_gpu(job, gpu))
        if isinstance(image, ImageDone):
            return image, b""
        if image.pixels is not None:
            name = image.header.format
        if job.want == LAYOUT:
            return _done(image, ""), b""
        geometry, inline = image.geometry, job.want in INLINE
        # the GPU's kernel makes one resized copy of an image: views are made on the CPU
        may_use_gpu = job.gpu and (inline or not geometry.views)
        if gpu is not None and may_use_gpu and (answer := _on_gpu(gpu, job, image, spec)) is not None:
            return answer
        pixels = image.pixels
        if pixels is None:
            pixels = decode(_unpack(job, payload), image.header, job.limits, flatten=not inline)
            name = image.header.format
            image.stages.end("decode")
        if job.want == PIXELS:
            made: Any = resized_ppm(pixels, geometry, spec)
        elif inline:
            made = resize(pixels, geometry, spec)
        elif isinstance(spec, TileSpec):
            made = tiles.prepare(pixels, geometry, spec)
        else:
            size = _tensor_bytes(geometry, spec)
            made = prepare(pixels, geometry, spec, None if into is None or len(into) < size else into[:size])
        image.stages.end("resize")
        return _encode(job, image, made) if inline else (_done(image, BINARY_MEDIA_TYPE), octets(made))
    except ImageRejected as e:
        return ImageRefused(e.reason, str(e), name), b""
    except MemoryError:
        return ImageRefused("image_failed", "it needs more memory than one image may use", name), b""


def _on_gpu(gpu: GpuChannel, job: ImageJob, image: DecodedImage, spec: ProcessorSpec) -> Answer | None:
    """The GPU's answer, or None."""
    inline, (height, width) = job.want in INLINE, image.geometry.size
    if image.size == (image.geometry.height, image.geometry.width) and inline:
        return None  # nothing to resize
    size = 3 * height * width if inline else _tensor_bytes(image.geometry, spec)
    request = GpuRequest(*image.size, job.spec, inline)
    if image.jpeg is not None:
        tables = tuple(tuple(table) for table in image.jpeg.tables.tolist())
        request = replace(request, sampling=image.jpeg.layout.sampling, tables=tables)
        made = gpu.process(partial(_write_coefficients, image.jpeg), 2 * image.jpeg.layout.coefficients, request, size)
    else:
        assert image.pixels is not None
        made = gpu.process(partial(_write_rows, image.pixels), image.pixels.nbytes, request, size)
    if made is None:
        return None
    image.stages.end("resize_gpu")
    if inline:
        pixels = np.frombuffer(made, np.uint8).reshape(height, width, 3)
        return _encode(job, image, ppm(pixels) if job.want == PIXELS else pixels)
    return _done(image, BINARY_MEDIA_TYPE), made


def _is_for_gpu(job: ImageJob, gpu: GpuChannel | None) -> bool:
    return job.gpu and gpu is not None and job.want != LAYOUT


def _write_coefficients(file: JpegFile, to: memoryview) -> bool:
    return file.decode(np.frombuffer(to, np.int16))


def _write_rows(pixels: Pixels, to: memoryview) -> bool:
    to[:] = pixels.reshape(-1).data
    return True


def _tensor_bytes(geometry: Geometry, spec: ProcessorSpec) -> int:
    """Bytes of one image's `pixel_values`."""
    height, width = geometry.size
    copies = spec.temporal_patch_size if isinstance(spec, PatchSpec) else 1
    return 3 * height * width * copies * ELEMENT_BYTES[spec.dtype]


def open_image(
    job: ImageJob, payload: Data, spec: ProcessorSpec, on_size: OnSize = lambda _: None, *, for_gpu: bool = False
) -> DecodedImage | ImageDone:
    """Unpack, check and decode; ImageDone if the image must pass through untouched. Raises ImageRejected.

    With `for_gpu`, a JPEG that the GPU decodes exactly is only opened. For its layout, an image is not decoded if its
    header says all.
    """
    stages = StageTimer()
    data = _unpack(job, payload)
    header = file_headers.read(data)
    if header is None:
        raise ImageRejected("image_unknown_format", UNKNOWN_FORMAT)
    check_size(header.height, header.width, job.limits)
    if (excess := find_excess(data, header, job.limits)) is not None:
        raise ImageRejected(*excess)
    on_size(_pixels(header.height, header.width, spec))
    client_chars = base64_chars(payload, job.base64)
    if job.want in INLINE and (
        not spec.inline or (job.want == PIXELS and _is_passed_early(header, spec, client_chars))
    ):
        stages.end("unpack")
        size = turned(header.height, header.width, orientation(data) if header.tagged else 1)
        reason = "not_smaller" if spec.inline else "processor"
        return _passed(job, reason, header, "", len(data), stages, predict(spec, *size))
    digest = hashlib.blake2b(data, digest_size=16, key=spec.fingerprint.encode()).hexdigest()
    stages.end("unpack")
    if header.format.upper() not in FORMATS:
        return _passed(job, "format", header, digest, len(data), stages)
    file = _open_for_gpu(data, header) if for_gpu else None
    by_header = _size_by_header(data) if job.want == LAYOUT else None
    pixels = None
    if file is None and by_header is None:
        pixels = decode(data, header, job.limits, flatten=job.want not in INLINE)
    height, width = (by_header or (header.height, header.width)) if pixels is None else pixels.shape[:2]
    if pixels is not None:
        stages.end("decode")
    try:
        geometry = spec.geometry(height, width)
    except ValueError as e:
        raise ImageRejected("image_aspect", f"{e}; the model does not accept such an image") from None
    for size in _made_sizes(geometry):
        check_size(*size, job.limits)
    too_large = job.want == PIXELS and not is_worth_resizing(height * width, geometry, client_chars)
    if too_large or (job.want in INLINE and not spec.keeps(geometry)):
        return _passed(job, "not_smaller" if too_large else "processor", header, digest, len(data), stages, geometry)
    return DecodedImage(pixels, file, (height, width), geometry, header, digest, len(data), stages)


def _size_by_header(data: bytes) -> Size | None:
    """The size of an image once rotated; None if its header does not say it for certain."""
    try:
        stored = stored_image.read(data)
    except stored_image.Unclear:
        return None
    return stored.height, stored.width


def _open_for_gpu(data: bytes, header: file_headers.Header) -> JpegFile | None:
    """A JPEG whose pixels the GPU gives as libjpeg-turbo does; None for any other image, and for one to be turned."""
    if not header.plain or (header.tagged and orientation(data) != 1):
        return None
    file = open_jpeg(data)
    is_whole = file is not None and (file.layout.height, file.layout.width) == (header.height, header.width)
    return file if is_whole else None


def _made_sizes(geometry: Geometry) -> Iterator[Size]:
    """All sizes in which a copy of the image is made; 0 x 0 for none."""
    yield geometry.height, geometry.width
    yield geometry.padded
    for view in geometry.views:
        yield view.canvas
        yield from view.before


def _encode(job: ImageJob, image: DecodedImage, made: Any) -> Answer:
    """The answer of an inline job: a PPM as base64 text, for a data URL, or resized pixels as RGB rows."""
    as_text = job.want == PIXELS
    payload = pybase64.b64encode(made) if as_text else octets(made)
    image.stages.end("encode")
    return _done(image, PPM_MEDIA_TYPE if as_text else BINARY_MEDIA_TYPE), payload


def octets(array: Any) -> memoryview:
    """An array's memory."""
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8).data


def _unpack(job: ImageJob, payload: Data) -> bytes:
    try:
        data = pybase64.b64decode(payload, validate=True) if job.base64 else bytes(payload)
    except ValueError:
        raise ImageRejected("image_base64", "its base64 text is damaged") from None
    if not data:
        raise ImageRejected("image_empty", "it is empty")
    if len(data) > job.limits.max_bytes:
        raise ImageRejected("image_too_large", f"it has {len(data)} bytes and the limit is {job.limits.max_bytes}")
    return data


def _pixels(height: int, width: int, spec: ProcessorSpec) -> int:
    """The pixels to decode and those to make, as far as the header tells."""
    geometry = predict(spec, height, width)
    if geometry is None:
        return height * width or UNKNOWN_PIXELS
    sizes = [view.canvas for view in geometry.views] or [(geometry.height, geometry.width)]
    return height * width + sum(height * width for height, width in sizes)


def _is_passed_early(header: file_headers.Header, spec: ProcessorSpec, client_chars: int) -> bool:
    """True if the header shows that preparing the image inline costs more than it saves."""
    geometry = predict(spec, header.height, header.width)
    return geometry is not None and not is_worth_resizing(header.height * header.width, geometry, client_chars)


def _done(image: DecodedImage, media_type: str) -> ImageDone:
    """The answer for an image that was prepared."""
    g, stages = image.geometry, tuple(image.stages.taken)
    grid = (g.grid_t, g.grid_h, g.grid_w)
    return ImageDone(
        "ok", image.header.format, media_type, *g.size, grid, g.tokens, image.hash, stages, image.bytes_in, image.size
    )


def _passed(
    job: ImageJob,
    reason: str,
    header: file_headers.Header,
    digest: str,
    size: int,
    stages: StageTimer,
    made: Geometry | None = None,
) -> ImageDone:
    """The reply for an image that the engine gets untouched; raises ImageRejected for jobs that need its pixels."""
    if job.want not in INLINE:
        raise ImageRejected("image_unsupported", f"{header.format} is not supported here; send JPEG, PNG or WebP")
    g = made or Geometry(0, 0)
    grid = (g.grid_t, g.grid_h, g.grid_w)
    taken = tuple(stages.taken)
    return ImageDone("passed", header.format, "", *g.size, grid, g.tokens, digest, taken, size, reason=reason)
