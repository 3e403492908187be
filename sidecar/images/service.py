"""Images in the relay: hand each to an image worker, wait within bounds, say clearly what was wrong.

Rules: no torch here, no pixels: bytes go to a worker and bytes come back, through the queue of imagequeue.py. What was prepared
once is kept for the tenant who sent it, where there is a cache.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace

from sidecar.errors import BadImage, ImagesBusy
from sidecar.images import file_headers, header_geometry
from sidecar.images.protocol import PIXELS, RAW, TENSORS, Data, ImageDone, ImageJob, ImageLimits
from sidecar.images.shm_cache import ImageCache, SharedFile
from sidecar.images.shm_handoff import ShmHandoff
from sidecar.images.tensor_budget import Reserve, TensorBudget
from sidecar.images.worker_queue import WorkerQueue
from sidecar.kernels.grid import Geometry, ProcessorSpec
from sidecar.settings import Settings

MAX_HASHED_ON_LOOP_BYTES = (
    512 * 1024
)  # bytes, 0.3 ms; hashing more takes a thread, which costs 0.1 ms, and more on busy cores
MAX_CACHE_WRITES = 4  # results on their way into the cache at once; more are not kept


@dataclass(frozen=True, slots=True)
class PreparedImage:
    """One prepared image. `base64` and `url` are empty where the client's own bytes must go on untouched (outcome "passed");
    `url` is where its pixels lie in shared memory.
    Outcome "cached": it had been prepared before.

    Sizes and tokens are what the model sees (0 where that is unknown); times are seconds.
    """

    media_type: str
    base64: Data | None
    width: int
    height: int
    tokens: int
    content_hash: str
    format: str
    outcome: str
    seconds: float
    stages: tuple[tuple[str, float], ...]
    bytes_in: int
    bytes_out: int
    grid: tuple[int, int, int] = (0, 0, 0)
    url: str = ""
    original: tuple[int, int] = (0, 0)


@dataclass(frozen=True, slots=True)
class PreparedTensors:
    """One image as the processor's output: `values` are the raw rows of `pixel_values`, empty where only sizes were asked."""

    prepared: PreparedImage
    values: Data


class ImageService:
    """The relay's way to the image workers behind the Unix socket `socket_path`; `queue`: by default that of the usual bounds."""

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
        self.gpu = False  # whether a GPU may be used now: a neighbour's use of memory ends the start of an engine
        self._cache = cache
        self._cache_writes: set[asyncio.Task[None]] = set()
        self._handoff = ShmHandoff(cache) if cache is not None else None
        self.tensor_budget = TensorBudget()

    async def inline(
        self, data: Data, where: str, tenant: str = "", handoff_request: str = "", is_base64: bool = True
    ) -> PreparedImage:
        """One image's base64 text, or its bytes, as a resized lossless image. Raises BadImage or ImagesBusy; `where` names it there.

        One that would cost more than it saves passes, mostly without any work: see glance.pays.
        `handoff_request`: the request whose engine takes the pixels from shared memory; `release` it when it has ended.
        """
        if not handoff_request or self._handoff is None:
            if (passed := self._pass_early(data, is_base64)) is not None:
                return passed
            prepared, payload, _ = await self._prepare(PIXELS, data, where, is_base64, tenant)
            return replace(prepared, base64=payload) if payload else prepared
        prepared, payload, key = await self._prepare(RAW, data, where, is_base64, tenant)
        if not payload:
            return prepared
        file = await self._handoff.pixels(handoff_request, payload, key)
        return replace(prepared, url=file.url(prepared.height, prepared.width))

    def _pass_early(self, data: Data, is_base64: bool) -> PreparedImage | None:
        """An image whose header tells that inline costs more than it saves: passed. None: a worker is to have it."""
        start = time.monotonic()
        header, client_chars = header_geometry.read_size(data, is_base64), header_geometry.base64_chars(data, is_base64)
        if header is None or not self.spec.inline or not self._allowed(header.height, header.width, client_chars):
            return None
        try:
            geometry = self.spec.geometry(header.height, header.width)
        except ValueError:
            return None  # the worker says what is wrong with it
        if header_geometry.is_worth_resizing(header.height * header.width, geometry, client_chars):
            return None
        return _passed_image(header.format, geometry, client_chars, time.monotonic() - start)

    def passed(self, data: Data, where: str, is_base64: bool = True) -> PreparedImage:
        """An image that goes on as it came, whatever it is: its tokens by its header, 0 where that does not tell.

        Raises BadImage for bytes that were fetched and are in no known format: they cannot be given a media type.
        """
        start = time.monotonic()
        header, client_chars = header_geometry.read_size(data, is_base64), header_geometry.base64_chars(data, is_base64)
        known = header or (None if is_base64 else file_headers.read(bytes(data[: header_geometry.HEADER_BYTES[0]])))
        if known is None and not is_base64:
            raise BadImage(f"{where}: the image was refused: it is in no known format", "image_unknown_format")
        try:
            geometry = self.spec.geometry(header.height, header.width) if header else Geometry(0, 0)
        except ValueError:
            geometry = Geometry(0, 0)
        return _passed_image(known.format if known else "unknown", geometry, client_chars, time.monotonic() - start)

    def _allowed(self, height: int, width: int, client_chars: int) -> bool:
        """Whether an image of this size, and of so many characters of base64, is surely within the limits."""
        limit = self._limits
        return (
            height * width <= limit.max_pixels
            and max(height, width) <= limit.max_side
            and client_chars * 3 // 4 <= limit.max_bytes
        )

    async def share(self, *pieces: Data) -> SharedFile | None:
        """`pieces` as a file in shared memory that its reader removes; None where there is no shared memory. Raises ImagesBusy."""
        return await self._handoff.tensors(*pieces) if self._handoff is not None else None

    def relink(self, request: str) -> bool:
        """What was handed over for a request lies there once more. False where it cannot."""
        return self._handoff is None or self._handoff.relink(request)

    def release(self, request: str) -> None:
        """A request has ended: nobody reads any more what was handed over for it."""
        if self._handoff is not None:
            self._handoff.release(request)

    async def tensors(
        self,
        images: Sequence[tuple[Data, bool]],
        *,
        want: str = TENSORS,
        where: str = "images",
        tenant: str = "",
        spec: ProcessorSpec | None = None,
        reserve: Reserve | None = None,
    ) -> list[PreparedTensors]:
        """Images, each with whether it is base64 text, as tensors in the same order. `want` may be LAYOUT: sizes only.

        `spec`: for another processor than the model's, such as the same one without its last steps. `reserve`: of `tensor_budget`.
        Raises BadImage or ImagesBusy for the first that fails, and gives up the others.
        """
        try:
            async with asyncio.TaskGroup() as group:
                tasks = [
                    group.create_task(self._prepare(want, data, f"{where}[{i}]", is_base64, tenant, spec, reserve))
                    for i, (data, is_base64) in enumerate(images)
                ]
        except* (BadImage, ImagesBusy) as failed:
            raise failed.exceptions[0] from None
        return [PreparedTensors(*task.result()[:2]) for task in tasks]

    async def close(self) -> None:
        """Take no more images; those under way end by themselves within their deadline."""
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
        """The image, its payload, and the key that this is kept under."""
        start = time.monotonic()
        self._check_size(data, where, is_base64)
        spec_json = spec.to_json() if spec is not None else self._spec_json
        key = await self._key(data, want, str(is_base64), spec_json, tenant)
        if self._cache is not None and (hit := self._cache.get(key)) is not None:
            done, payload = hit
            if reserve is not None:
                reserve(len(payload))
            return _prepared_image(done, payload, time.monotonic() - start, cached=True), payload, key
        job = ImageJob(want, spec_json, is_base64, self._limits, self._workers.deadline_s, self.gpu)
        answer, result = await self._workers.run(job, data, where, reserve)
        if answer.outcome == "ok":
            await self._keep(key, answer, result, at_once=want == RAW)
        return _prepared_image(answer, result, time.monotonic() - start), result, key

    async def _key(self, data: Data, *parts: str) -> str:
        """What the result is kept under; "" where nothing is kept."""
        if self._cache is None:
            return ""
        if len(data) <= MAX_HASHED_ON_LOOP_BYTES:
            return self._cache.key(data, *parts)
        return await asyncio.to_thread(self._cache.key, data, *parts)

    async def _keep(self, key: str, done: ImageDone, payload: Data, *, at_once: bool) -> None:
        """Keep a result: meanwhile, or `at_once` where it is about to be handed over."""
        if self._cache is None or len(self._cache_writes) >= MAX_CACHE_WRITES:
            return
        task = asyncio.create_task(asyncio.to_thread(self._cache.put, key, done, payload))
        self._cache_writes.add(task)
        task.add_done_callback(self._cache_writes.discard)
        if at_once:
            await asyncio.wait((task,))  # if we are cancelled, it goes on

    def _check_size(self, data: Data, where: str, is_base64: bool) -> None:
        """The worker checks the real size; this bounds what is sent to it at all."""
        limit = self._limits.max_bytes * 3 // 2 if is_base64 else self._limits.max_bytes
        if len(data) > limit:
            text = f"{where}: the image was refused: the limit is {self._limits.max_bytes} bytes"
            raise BadImage(text, "image_too_large")


def _passed_image(format: str, geometry: Geometry, client_chars: int, seconds: float) -> PreparedImage:
    """An image that passes, of so many characters of base64."""
    height, width = geometry.size
    return PreparedImage(
        media_type="", base64=None, width=width, height=height, tokens=geometry.tokens, content_hash="", format=format,
        outcome="passed", seconds=seconds, stages=(), bytes_in=client_chars * 3 // 4, bytes_out=0,
        grid=(geometry.grid_t, geometry.grid_h, geometry.grid_w),
    )  # fmt: skip


def _prepared_image(done: ImageDone, payload: Data, seconds: float, *, cached: bool = False) -> PreparedImage:
    return PreparedImage(
        media_type=done.media_type,
        base64=None,
        width=done.width,
        height=done.height,
        tokens=done.tokens,
        content_hash=done.content_hash,
        format=done.format,
        outcome="cached" if cached else done.outcome,
        seconds=seconds,
        stages=() if cached else done.stages,
        bytes_in=done.bytes_in,
        bytes_out=len(payload),
        grid=done.grid,
        original=done.original,
    )
