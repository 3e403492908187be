"""Run one video job: a payload in, VideoDone or ImageRefused and a payload out. No sockets, no processes.

Rules: as in pipeline.py. What is made is bounded before a frame is decoded: pixels of a frame, frames, pixels of all
frames that must be decoded, bytes of the result.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Iterable
from typing import Final

import numpy as np
import pybase64

from sidecar.images import file_headers, video_headers
from sidecar.images.decode_bounds import find_excess
from sidecar.images.protocol import LAYOUT, Data, ImageRefused, VideoDone, VideoJob
from sidecar.images.tensor_budget import MAX_TENSOR_BYTES
from sidecar.images.tensor_layout import ELEMENT_BYTES
from sidecar.images.worker import video_decode, videos
from sidecar.images.worker.decode import ImageRejected, Pixels, check_size, decode
from sidecar.kernels import families, video_sampling
from sidecar.kernels.families.videos import MAX_FRAMES, VideoSpec
from sidecar.kernels.grid import Geometry
from sidecar.kernels.video_sampling import VideoSource

Answer = tuple[VideoDone | ImageRefused, Data]
OnSize = Callable[[int], None]
LIST_FPS: Final = 1.0  # vLLM's, of a list of JPEGs


def run_job(job: VideoJob, payload: Data, on_size: OnSize = lambda _: None) -> Answer:
    """Run one job. `on_size` is called with the number of pixels to decode and to make, before either."""
    spec = families.from_json(job.spec)
    assert isinstance(spec, VideoSpec)
    try:
        return _jpegs(job, payload, spec, on_size) if job.jpegs else _file(job, payload, spec, on_size)
    except ImageRejected as e:
        return ImageRefused(e.reason, str(e)), b""
    except MemoryError:
        return ImageRefused("image_failed", "it needs more memory than one job may use"), b""


def _file(job: VideoJob, payload: Data, spec: VideoSpec, on_size: OnSize) -> Answer:
    """A video in a container."""
    started = time.perf_counter()
    data = _unpack(job, payload)
    header = video_headers.read(data)
    if header is None:
        raise ImageRejected("video_unknown_format", "it is in no known container; send MP4, WebM, Matroska or AVI")
    check_size(header.height, header.width, job.limits)
    video = video_decode.open_video(data, job.limits)
    indices = _sample(job, spec, video.source)
    video_decode.check_length(indices, video.height, video.width)
    geometry = _geometry(spec, len(indices), video.height, video.width)
    on_size((max(indices) + 1) * video.height * video.width + _pixels(geometry, spec))
    frames = video_decode.frames(video, indices) if job.want != LAYOUT else ()
    size = video.height, video.width
    return _made(
        job,
        spec,
        video_headers.format_of(data),
        data,
        frames,
        indices,
        video.source,
        size,
        geometry,
        started,
        video_decode.put_rgb,
    )


def _jpegs(job: VideoJob, payload: Data, spec: VideoSpec, on_size: OnSize) -> Answer:
    """A list of JPEGs, as base64 texts with commas between them."""
    started = time.perf_counter()
    if len(payload) > job.limits.max_bytes * 3 // 2:
        raise ImageRejected("image_too_large", f"it has more bytes than the limit, which is {job.limits.max_bytes}")
    most = job.count if job.count > 0 else video_sampling.DEFAULT_COUNT
    texts = bytes(payload).split(b",", most)[:most]
    files = [_decoded(text) for text in texts]
    headers = [file_headers.read(file) for file in files]
    sizes = {(header.height, header.width) for header in headers if header is not None}
    if None in headers or len(sizes) != 1 or (0, 0) in sizes:
        raise ImageRejected("video_broken", "its frames are not JPEGs of one size")
    (size,) = sizes
    check_size(*size, job.limits)
    source = VideoSource(len(files), job.fps or LIST_FPS)
    geometry = _geometry(spec, len(files), *size)
    on_size(len(files) * size[0] * size[1] + _pixels(geometry, spec))

    def frames() -> Iterable[Pixels]:
        for file, header in zip(files, headers, strict=True):
            assert header is not None
            if (excess := find_excess(file, header, job.limits)) is not None:
                raise ImageRejected(*excess)
            pixels = decode(file, header, job.limits)
            if pixels.shape[:2] != size:
                raise ImageRejected("video_broken", "its frames are not JPEGs of one size")
            yield pixels

    made = frames() if job.want != LAYOUT else ()
    return _made(job, spec, "jpegs", b"".join(files), made, range(len(files)), source, size, geometry, started)


def _sample(job: VideoJob, spec: VideoSpec, source: VideoSource) -> list[int]:
    """The frames to take, at most MAX_FRAMES. Raises ImageRejected."""
    if source.frames > video_headers.MAX_FRAMES:
        raise ImageRejected("video_too_long", f"it says that it has {source.frames} frames")
    try:
        taken = spec.sampled(source, job.count, job.fps) if job.by_processor else spec.sampled_by_vllm(source, job.fps)
    except ValueError as e:
        raise ImageRejected("video_frames", f"{e}; the model does not accept such a video") from None
    if not 0 < len(taken) <= MAX_FRAMES:
        text = f"{len(taken)} frames would be taken of it and the limit is {MAX_FRAMES}"
        raise ImageRejected("video_frames", f"{text}; ask for fewer by num_frames or fps")
    return taken


def _geometry(spec: VideoSpec, frames: int, height: int, width: int) -> Geometry:
    """The target. Raises ImageRejected if the processor refuses it, or it would be too large."""
    try:
        geometry = spec.video(frames, height, width)
    except ValueError as e:
        raise ImageRejected("video_frames", f"{e}; the model does not accept such a video") from None
    size = ELEMENT_BYTES[spec.dtype] * _pixels(geometry, spec) * 3
    if size > MAX_TENSOR_BYTES:
        text = f"its tensors would have {size} bytes and the limit is {MAX_TENSOR_BYTES}"
        raise ImageRejected("tensors_too_large", f"{text}; ask for fewer frames, or values=uint8")
    return geometry


def _pixels(geometry: Geometry, spec: VideoSpec) -> int:
    """Pixels of all frames as they are laid out."""
    return geometry.grid_t * spec.temporal_patch_size * geometry.height * geometry.width


def _made(
    job: VideoJob,
    spec: VideoSpec,
    format: str,
    data: bytes,
    frames: Iterable[Pixels],
    indices: list[int] | range,
    source: VideoSource,
    size: tuple[int, int],
    geometry: Geometry,
    started: float,
    put: videos.Put = np.copyto,
) -> Answer:
    opened = time.perf_counter()
    made: Data = b"" if job.want == LAYOUT else videos.lay_out(frames, geometry, spec, put).reshape(-1).view("u1").data
    stages = ("open", opened - started), ("frames", time.perf_counter() - opened)
    digest = hashlib.blake2b(data, digest_size=16, key=spec.fingerprint.encode()).hexdigest()
    fps = source.fps if source.fps > 0 else video_sampling.UNKNOWN_FPS
    return VideoDone(
        format=format,
        height=geometry.height,
        width=geometry.width,
        grid=(geometry.grid_t, geometry.grid_h, geometry.grid_w),
        tokens=geometry.tokens,
        content_hash=digest,
        stages=stages,
        bytes_in=len(data),
        original=size,
        indices=tuple(indices),
        total_frames=source.frames,
        fps=fps,
        timestamps=tuple(spec.timestamps(indices, fps)) if spec.whole else (),
        second_per_grid=0.0 if spec.whole else spec.second_per_grid(indices, VideoSource(source.frames, fps)),
    ), made


def _unpack(job: VideoJob, payload: Data) -> bytes:
    data = _decoded(payload) if job.base64 else bytes(payload)
    if len(data) > job.limits.max_bytes:
        raise ImageRejected("image_too_large", f"it has {len(data)} bytes and the limit is {job.limits.max_bytes}")
    if not data:
        raise ImageRejected("image_empty", "it is empty")
    return data


def _decoded(text: Data) -> bytes:
    try:
        return pybase64.b64decode(text, validate=True)
    except ValueError:
        raise ImageRejected("image_base64", "its base64 text is damaged") from None
