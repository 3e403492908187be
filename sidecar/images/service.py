"""The relay's access to the image workers.

Rules: no torch and no pixels here: bytes go to a worker and come back, through worker_queue.py. Waits are bounded, and
errors say what was wrong. With a cache, a result is kept for the tenant that sent the image.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace

from sidecar.engines.image_loading import SIZE_DIFFERS
from sidecar.errors import BadImage, ImagesBusy
from sidecar.images import cost_rule, engine_tensors, file_headers, header_geometry
from sidecar.images.cost_rule import INLINE, SHM, ImageSize, UnitCosts
from sidecar.images.engine_tensors import SentTensors
from sidecar.images.protocol import (
    COSTS,
    PIXELS,
    RAW,
    TENSORS,
    Data,
    ImageDone,
    ImageJob,
    ImageLimits,
    VideoDone,
    VideoJob,
)
from sidecar.images.protocol import INLINE as INLINE_JOBS
from sidecar.images.shm_cache import ImageCache, SharedFile
from sidecar.images.shm_handoff import ShmHandoff
from sidecar.images.tensor_budget import Reserve, TensorBudget
from sidecar.images.tensor_layout import ELEMENT_BYTES
from sidecar.images.vllm_plugin import Handoffs, TensorOffer
from sidecar.images.worker import gpu_channel
from sidecar.images.worker_queue import WorkerQueue
from sidecar.kernels.families.videos import VideoSpec
from sidecar.kernels.grid import Geometry, ProcessorSpec
from sidecar.settings import Settings

# Hashing this much takes 0.3 ms. More is hashed in a thread, which costs 0.1 ms, and more on busy cores.
MAX_HASHED_ON_LOOP_BYTES = 512 * 1024
MAX_INLINE_BYTES = 256 << 20  # of plain pixels as text in flight in one relay; images that come then pass
CALIBRATION_RETRY_S = (5.0, 10.0, 20.0, 40.0, 60.0)  # an image server needs about 5 s to load its libraries
MAX_CACHE_WRITES = 4  # at once; further results are not cached


@dataclass(frozen=True, slots=True)
class PreparedImage(ImageDone):
    """One prepared image. Sizes and tokens are 0 if unknown.

    Outcome "passed": the client's own bytes go on untouched, `base64` and `url` are empty. Outcome "cached": the image
    had been prepared before. `url` locates its pixels in shared memory. `parameter` is that of a data URL of the
    client's own bytes by which the engine finds finished tensors.
    """

    seconds: float = 0.0
    bytes_out: int = 0
    base64: Data | None = None
    url: str = ""
    parameter: str = ""


@dataclass(frozen=True, slots=True)
class PreparedTensors:
    """One image as the processor's output: `values` is its part of `pixel_values`, or empty."""

    prepared: PreparedImage
    values: Data


@dataclass(frozen=True, slots=True)
class SentVideo:
    """A video: a file's bytes or base64 text, or a list of JPEGs as base64 texts with commas between them."""

    data: Data
    is_base64: bool = False
    is_list: bool = False


@dataclass(frozen=True, slots=True)
class FrameChoice:
    """Which frames of a video are taken: `count` or at `fps`, 0 as usual; by the processor, else by vLLM's loader."""

    count: int = 0
    fps: float = 0.0
    by_processor: bool = False


class ImageService:
    """Prepares images on the workers behind the Unix socket `socket_path`."""

    def __init__(
        self,
        socket_path: str,
        settings: Settings,
        spec: ProcessorSpec,
        cache: ImageCache | None = None,
        *,
        queue: WorkerQueue | None = None,
    ) -> None:
        self.spec = spec
        self._workers = queue or WorkerQueue(socket_path, settings)
        self._limits = ImageLimits(settings.image_max_bytes, settings.image_max_pixels)
        self._spec_json = spec.to_json()
        self._path = socket_path
        self._may_use_gpu: bool | None = None  # not known yet
        self._cache = cache
        self._cache_writes: set[asyncio.Task[None]] = set()
        self._handoff = ShmHandoff(cache) if cache is not None else None
        self.tensor_budget = TensorBudget()
        self._sent = SentTensors()
        self.costs: UnitCosts | None = None
        self.inline_bytes = 0  # base64 text of plain pixels that is in flight
        self._held: dict[str, int] = {}

    def allow_gpu(self, allowed: bool) -> None:
        """Whether a GPU may be used from now on. When it may not any longer, the GPU process is asked to end.

        An engine that is starting fails if another process holds its memory, or changes how much it holds.
        """
        if not allowed and self._may_use_gpu is not False:
            gpu_channel.release(self._path)
        self._may_use_gpu = allowed

    async def inline(
        self,
        data: Data,
        where: str,
        tenant: str = "",
        handoff_request: str = "",
        is_base64: bool = True,
        max_small_chars: int = header_geometry.MAX_SMALL_CHARS,
    ) -> PreparedImage:
        """Prepare one image, base64 text or bytes, as a resized lossless image. Raises BadImage or ImagesBusy.

        `where` names the image in errors. An image that would cost more than it saves passes through, see
        header_geometry.is_worth_resizing. `handoff_request`: the request whose engine reads the pixels from shared
        memory; call `release` with it when it ends. `max_small_chars`: what is sent whatever the size of the original.
        """
        if not handoff_request or self._handoff is None:
            if (passed := self._pass_early(data, is_base64, max_small_chars)) is not None:
                return passed
            prepared, payload, _ = await self._prepare(PIXELS, data, where, is_base64, tenant)
            return replace(prepared, base64=payload) if payload else prepared
        prepared, payload, key = await self._prepare(RAW, data, where, is_base64, tenant)
        if not payload:
            return prepared
        file = await self._handoff.pixels(handoff_request, payload, key)
        return replace(prepared, url=file.url(prepared.height, prepared.width))

    async def calibrate(self) -> None:
        """Have a worker measure what each way of an image costs on this machine; until then, bounds alone decide."""
        job = ImageJob(COSTS, self._spec_json, False, self._limits, self._workers.deadline_s)
        for pause in CALIBRATION_RETRY_S:
            try:
                done, _ = await self._workers.run(job, b"", "calibration")
                self.costs = UnitCosts(dict(done.stages))
                return
            except (ImagesBusy, BadImage, KeyError):  # its workers are loading, or one was stopped
                await asyncio.sleep(pause)

    async def hand_over(
        self,
        data: Data,
        where: str,
        tenant: str,
        request: str,
        handoffs: Handoffs,
        is_base64: bool = True,
        max_small_chars: int = header_geometry.MAX_SMALL_CHARS,
    ) -> PreparedImage:
        """One image of a request for an engine that takes `handoffs`, in the way that costs least.

        What it holds is held until `release(request)`. Raises BadImage or ImagesBusy.
        """
        way, reason = self._choose_way(data, handoffs, is_base64, max_small_chars)
        if way == cost_rule.PASS:
            return self.passed(data, reason, is_base64)
        if way == cost_rule.TENSORS and handoffs.tensors is not None:
            made = await self.engine_tensors(data, where, tenant, request, handoffs.tensors, is_base64)
            return made or self.passed(data, "processor", is_base64)
        image = await self.inline(data, where, tenant, request if way == SHM else "", is_base64, max_small_chars)
        if image.base64 is not None:
            self.inline_bytes += len(image.base64)
            self._held[request] = self._held.get(request, 0) + len(image.base64)
        return image

    def _choose_way(self, data: Data, handoffs: Handoffs, is_base64: bool, max_small_chars: int) -> tuple[str, str]:
        """How an image had best reach an engine that takes `handoffs`, by its header and the costs; why it passes."""
        if handoffs.passes:
            return cost_rule.PASS, SIZE_DIFFERS
        other = SHM if handoffs.pixels and self._handoff is not None else INLINE
        header, client_chars = header_geometry.read_size(data, is_base64), header_geometry.base64_chars(data, is_base64)
        known = header is not None and header.format in file_headers.DECODED_FORMATS
        if header is None or not known or not self._allowed(header.height, header.width, client_chars):
            return other, ""  # a worker says what it is
        geometry = header_geometry.predict(self.spec, header.height, header.width)
        if geometry is None:
            return other, ""
        pixels, (height, width) = header.height * header.width, geometry.size
        offered = {SHM} if other == SHM and self.spec.inline else set()
        if handoffs.tensors is not None and self._handoff is not None:
            offered.add(cost_rule.TENSORS)
        is_smaller = header_geometry.is_worth_resizing(pixels, geometry, client_chars, max_small_chars)
        if self.spec.inline and is_smaller and self.inline_bytes < MAX_INLINE_BYTES:
            offered.add(INLINE)
        element_bytes = ELEMENT_BYTES[handoffs.tensors.dtype] if handoffs.tensors is not None else 1
        size = ImageSize(header.format, pixels, height * width, client_chars, element_bytes)
        reason = "costs_more" if offered else "processor" if not self.spec.inline else "not_smaller"
        if not offered and self.spec.inline and is_smaller:
            reason = "too_many_bytes"
        return cost_rule.choose(size, offered, self.costs), reason

    async def engine_tensors(
        self, data: Data, where: str, tenant: str, request: str, offer: TensorOffer, is_base64: bool = True
    ) -> PreparedImage | None:
        """Finished tensors of one image in a file for an engine, until `release(request)`; None if it gets none.

        Raises BadImage or ImagesBusy.
        """
        start = time.monotonic()
        spec = engine_tensors.spec_for(self.spec, offer.dtype)
        header, client_chars = header_geometry.read_size(data, is_base64), header_geometry.base64_chars(data, is_base64)
        if self._handoff is None or header is None or not self._allowed(header.height, header.width, client_chars):
            return None
        size = engine_tensors.file_bytes(spec, header.height, header.width)
        if not size:
            return None
        key = await self._key(data, TENSORS, str(is_base64), spec.to_json(), tenant) if offer.cache_bytes else ""
        if key and (sent := self._sent.find(key, offer)) is not None:
            prepared = _prepared_image(sent, b"", time.monotonic() - start, cached=True)
            return replace(prepared, parameter=engine_tensors.parameter(sent, offer.dtype, None))
        job = ImageJob(
            TENSORS, spec.to_json(), is_base64, self._limits, self._workers.deadline_s, bool(self._may_use_gpu), size
        )
        async with self._handoff.open_file(request, size) as (file, fd):
            done, _ = await self._workers.run(job, data, where, tenant=tenant, urgent=True, file=fd)
            made = engine_tensors.bytes_of(spec, spec.geometry(*done.original))
            if made < size:  # it was turned
                os.ftruncate(fd, made)
        self._sent.add(key, offer, done, made)
        prepared = _prepared_image(done, b"", time.monotonic() - start)
        return replace(prepared, bytes_out=made, parameter=engine_tensors.parameter(done, offer.dtype, file))

    def _pass_early(
        self, data: Data, is_base64: bool, max_small_chars: int = header_geometry.MAX_SMALL_CHARS
    ) -> PreparedImage | None:
        """The image as passed through if its header shows that preparing it costs more than it saves; else None."""
        start = time.monotonic()
        header, client_chars = header_geometry.read_size(data, is_base64), header_geometry.base64_chars(data, is_base64)
        if header is None or not self.spec.inline or not self._allowed(header.height, header.width, client_chars):
            return None
        geometry = header_geometry.predict(self.spec, header.height, header.width)
        # without one, the worker reports what is wrong with it
        pixels = header.height * header.width
        if geometry is None or header_geometry.is_worth_resizing(pixels, geometry, client_chars, max_small_chars):
            return None
        return _passed_image("not_smaller", header.format, geometry, client_chars, time.monotonic() - start)

    def passed(self, data: Data, reason: str, is_base64: bool = True) -> PreparedImage:
        """Any image as passed through; its tokens are taken from its header, 0 if that has no size."""
        start = time.monotonic()
        header, client_chars = header_geometry.read_size(data, is_base64), header_geometry.base64_chars(data, is_base64)
        known = header or (None if is_base64 else file_headers.read(bytes(data[: header_geometry.HEADER_BYTES[0]])))
        geometry = header_geometry.predict(self.spec, header.height, header.width) if header else None
        format = known.format if known else "unknown"
        return _passed_image(reason, format, geometry, client_chars, time.monotonic() - start)

    def _allowed(self, height: int, width: int, client_chars: int) -> bool:
        """True if an image of this size and of `client_chars` base64 characters is certainly within the limits."""
        limit = self._limits
        return (
            height * width <= limit.max_pixels
            and max(height, width) <= limit.max_side
            and client_chars * 3 // 4 <= limit.max_bytes
        )

    async def share(self, *pieces: Data) -> SharedFile | None:
        """Share `pieces` as a file that its reader unlinks; None without shared memory. Raises ImagesBusy."""
        return await self._handoff.tensors(*pieces) if self._handoff is not None else None

    def release(self, request: str) -> None:
        """Unlink the files of a request that has ended."""
        self.inline_bytes -= self._held.pop(request, 0)
        if self._handoff is not None:
            self._handoff.release(request)

    async def tensors(
        self,
        images: Sequence[tuple[Data, bool]],
        *,
        want: str = TENSORS,
        tenant: str = "",
        spec: ProcessorSpec | None = None,
        reserve: Reserve | None = None,
    ) -> list[PreparedTensors]:
        """Images, each with whether it is base64 text, as tensors in the same order. `want` may be LAYOUT: sizes only.

        `spec` replaces the model's processor, for example by one without its last steps. `reserve`, from
        `tensor_budget`, is called with each result's bytes.
        Raises BadImage or ImagesBusy for the first image that fails, and cancels the others.
        """
        try:
            async with asyncio.TaskGroup() as group:
                tasks = [
                    group.create_task(self._prepare(want, data, f"images[{i}]", is_base64, tenant, spec, reserve))
                    for i, (data, is_base64) in enumerate(images)
                ]
        except* (BadImage, ImagesBusy) as failed:
            raise failed.exceptions[0] from None
        return [PreparedTensors(*task.result()[:2]) for task in tasks]

    async def videos(
        self,
        videos: Sequence[SentVideo],
        spec: VideoSpec,
        frames: FrameChoice,
        *,
        want: str = TENSORS,
        tenant: str = "",
        reserve: Reserve,
    ) -> list[tuple[VideoDone, Data]]:
        """Videos as tensors in the same order, each with what was made of it. `want` may be LAYOUT: sizes only.

        None is cached. Raises BadImage or ImagesBusy for the first video that fails, and cancels the others.
        """
        try:
            async with asyncio.TaskGroup() as group:
                tasks = [
                    group.create_task(self._video(video, f"videos[{i}]", spec, frames, want, tenant, reserve))
                    for i, video in enumerate(videos)
                ]
        except* (BadImage, ImagesBusy) as failed:
            raise failed.exceptions[0] from None
        return [task.result() for task in tasks]

    async def _video(
        self,
        video: SentVideo,
        where: str,
        spec: VideoSpec,
        frames: FrameChoice,
        want: str,
        tenant: str,
        reserve: Reserve,
    ) -> tuple[VideoDone, Data]:
        if len(video.data) > (self._limits.max_bytes * 3 // 2 if video.is_base64 else self._limits.max_bytes):
            text = f"{where}: the video was refused: the limit is {self._limits.max_bytes} bytes"
            raise BadImage(text, "image_too_large")
        job = VideoJob(
            want,
            spec.to_json(),
            video.is_base64,
            self._limits,
            self._workers.deadline_s,
            jpegs=video.is_list,
            count=frames.count,
            fps=frames.fps,
            by_processor=frames.by_processor,
        )
        return await self._workers.run_video(job, video.data, where, reserve, tenant)

    async def close(self) -> None:
        """Accept no more images; jobs in progress end within their deadline."""
        self._workers.close()
        await asyncio.gather(*self._cache_writes, return_exceptions=True)

    async def _prepare(
        self,
        want: str,
        data: Data,
        where: str,
        is_base64: bool,
        tenant: str,
        spec: ProcessorSpec | None = None,
        reserve: Reserve | None = None,
    ) -> tuple[PreparedImage, Data, str]:
        """The image, its payload, and its cache key."""
        start = time.monotonic()
        # a bound on what is sent to a worker, which checks the real size
        if len(data) > (self._limits.max_bytes * 3 // 2 if is_base64 else self._limits.max_bytes):
            text = f"{where}: the image was refused: the limit is {self._limits.max_bytes} bytes"
            raise BadImage(text, "image_too_large")
        spec_json = spec.to_json() if spec is not None else self._spec_json
        key = await self._key(data, want, str(is_base64), spec_json, tenant)
        if self._cache is not None and (hit := self._cache.get(key)) is not None:
            done, payload = hit
            if reserve is not None:
                reserve(len(payload))
            return _prepared_image(done, payload, time.monotonic() - start, cached=True), payload, key
        job = self._job(want, spec_json, is_base64)
        # the engine can prepare an image of a request itself; `/v1/preprocess` has only the workers
        urgent = want in INLINE_JOBS
        answer, result = await self._workers.run(job, data, where, reserve, tenant=tenant, urgent=urgent)
        if answer.outcome == "ok":
            await self._keep(key, answer, result, at_once=want == RAW)
        return _prepared_image(answer, result, time.monotonic() - start), result, key

    def _job(self, want: str, spec_json: str, is_base64: bool) -> ImageJob:
        gpu = bool(self._may_use_gpu)
        return ImageJob(want, spec_json, is_base64, self._limits, self._workers.deadline_s, gpu)

    async def _key(self, data: Data, *parts: str) -> str:
        """The cache key of a result; "" without a cache."""
        if self._cache is None:
            return ""
        if len(data) <= MAX_HASHED_ON_LOOP_BYTES:
            return self._cache.key(data, *parts)
        return await asyncio.to_thread(self._cache.key, data, *parts)

    async def _keep(self, key: str, done: ImageDone, payload: Data, *, at_once: bool) -> None:
        """Cache a result in the background, or, `at_once`, before returning, if it is about to be handed over."""
        if self._cache is None or len(self._cache_writes) >= MAX_CACHE_WRITES:
            return
        task = asyncio.create_task(asyncio.to_thread(self._cache.put, key, done, payload))
        self._cache_writes.add(task)
        task.add_done_callback(self._cache_writes.discard)
        if at_once:
            await asyncio.wait((task,))  # continues if this request is cancelled


def _passed_image(
    reason: str, format: str, geometry: Geometry | None, client_chars: int, seconds: float
) -> PreparedImage:
    """An image that passes through untouched."""
    g = geometry or Geometry(0, 0)
    grid = (g.grid_t, g.grid_h, g.grid_w)
    bytes_in = client_chars * 3 // 4
    made = PreparedImage("passed", format, "", *g.size, grid, g.tokens, "", (), bytes_in, seconds=seconds)
    return replace(made, reason=reason)


def _prepared_image(done: ImageDone, payload: Data, seconds: float, *, cached: bool = False) -> PreparedImage:
    done = replace(done, outcome="cached", stages=()) if cached else done
    same = {field.name: getattr(done, field.name) for field in fields(ImageDone)}
    return PreparedImage(**same, seconds=seconds, bytes_out=len(payload))
