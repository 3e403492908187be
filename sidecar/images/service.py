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
        self._keeping: set[asyncio.Task[None]] = set()
        self._handovers = ShmHandoff(cache) if cache is not None else None
        self.results = TensorBudget()

    async def inline(
        self, data: Data, where: str, tenant: str = "", hand_over: str = "", is_base64: bool = True
    ) -> PreparedImage:
        """One image's base64 text, or its bytes, as a resized lossless image. Raises BadImage or ImagesBusy; `where` names it there.

        One that would cost more than it saves passes, mostly without any work: see glance.pays.
        `hand_over`: the request whose engine takes the pixels from shared memory; `release` it when it has ended.
        """
        if not hand_over or self._handovers is None:
            if (passed := self._unpaid(data, is_base64)) is not None:
                return passed
            prepared, payload, _ = await self._prepare(PIXELS, data, where, is_base64, tenant)
            return replace(prepared, base64=payload) if payload else prepared
        prepared, payload, key = await self._prepare(RAW, data, where, is_base64, tenant)
        if not payload:
            return prepared
        handed = await self._handovers.pixels(hand_over, payload, key)
        return replace(prepared, url=handed.url(prepared.height, prepared.width))

    def _unpaid(self, data: Data, is_base64: bool) -> PreparedImage | None:
        """An image whose header tells that inline costs more than it saves: passed. None: a worker is to have it."""
        started = time.monotonic()
        header, client = (
            header_geometry.sized(data, is_base64),
            len(data) if is_base64 else header_geometry.text(len(data)),
        )
        if header is None or not self.spec.inline or not self._allowed(header.height, header.width, client):
            return None
        try:
            geometry = self.spec.geometry(header.height, header.width)
        except ValueError:
            return None  # the worker says what is wrong with it
        if header_geometry.pays(header.height * header.width, geometry, client):
            return None
        return _as_it_came(header.format, geometry, client, time.monotonic() - started)

    def passed(self, data: Data, where: str, is_base64: bool = True) -> PreparedImage:
        """An image that goes on as it came, whatever it is: its tokens by its header, 0 where that does not tell.

        Raises BadImage for bytes that were fetched and are in no known format: they cannot be given a media type.
        """
        started = time.monotonic()
        header, client = (
            header_geometry.sized(data, is_base64),
            len(data) if is_base64 else header_geometry.text(len(data)),
        )
        known = header or (None if is_base64 else file_headers.read(bytes(data[: header_geometry.HEADS[0]])))
        if known is None and not is_base64:
            raise BadImage(f"{where}: the image was refused: it is in no known format", "image_unknown_format")
        try:
            geometry = self.spec.geometry(header.height, header.width) if header else Geometry(0, 0)
        except ValueError:
            geometry = Geometry(0, 0)
        return _as_it_came(known.format if known else "unknown", geometry, client, time.monotonic() - started)

    def _allowed(self, height: int, width: int, client: int) -> bool:
        """Whether an image of this size, and of so many characters of base64, is surely within the limits."""
        most = self._limits
        return (
            height * width <= most.max_pixels
            and max(height, width) <= most.max_side
            and client * 3 // 4 <= most.max_bytes
        )

    async def share(self, *pieces: Data) -> SharedFile | None:
        """`pieces` as a file in shared memory that its reader removes; None where there is no shared memory. Raises ImagesBusy."""
        return await self._handovers.tensors(*pieces) if self._handovers is not None else None

    def release(self, request: str) -> None:
        """A request has ended: nobody reads any more what was handed over for it."""
        if self._handovers is not None:
            self._handovers.release(request)

    async def tensors(
        self,
        images: Sequence[tuple[Data, bool]],
        *,
        want: str = TENSORS,
        where: str = "images",
        tenant: str = "",
        spec: ProcessorSpec | None = None,
        take: Reserve | None = None,
    ) -> list[PreparedTensors]:
        """Images, each with whether it is base64 text, as tensors in the same order. `want` may be LAYOUT: sizes only.

        `spec`: for another processor than the model's, such as the same one without its last steps. `take`: of `results`, told of the bytes.
        Raises BadImage or ImagesBusy for the first that fails, and gives up the others.
        """
        try:
            async with asyncio.TaskGroup() as group:
                tasks = [
                    group.create_task(self._prepare(want, data, f"{where}[{i}]", is_base64, tenant, spec, take))
                    for i, (data, is_base64) in enumerate(images)
                ]
        except* (BadImage, ImagesBusy) as failed:
            raise failed.exceptions[0] from None
        return [PreparedTensors(*task.result()[:2]) for task in tasks]

    async def close(self) -> None:
        """Take no more images; those under way end by themselves within their deadline."""
        self._workers.close()
        await asyncio.gather(*self._keeping, return_exceptions=True)

    async def _prepare(
        self,
        want: str,
        data: Data,
        where: str,
        is_base64: bool,
        tenant: str,
        spec: ProcessorSpec | None = None,
        take: Reserve | None = None,
    ) -> tuple[PreparedImage, Data, str]:
        """The image, its payload, and the key that this is kept under."""
        started = time.monotonic()
        self._check_size(data, where, is_base64)
        spec_json = spec.to_json() if spec is not None else self._spec_json
        key = await self._key(data, want, str(is_base64), spec_json, tenant)
        if self._cache is not None and (hit := self._cache.get(key)) is not None:
            done, payload = hit
            if take is not None:
                take(len(payload))
            return _prepared(done, payload, time.monotonic() - started, cached=True), payload, key
        answer, fresh = await self._do(want, spec_json, data, where, is_base64, take=take)
        if answer.outcome == "ok":
            await self._keep(key, answer, fresh, at_once=want == RAW)
        return _prepared(answer, fresh, time.monotonic() - started), fresh, key

    async def _key(self, data: Data, *parts: str) -> str:
        """What the result is kept under; "" where nothing is kept."""
        if self._cache is None:
            return ""
        if len(data) <= MAX_HASHED_ON_LOOP_BYTES:
            return self._cache.key(data, *parts)
        return await asyncio.to_thread(self._cache.key, data, *parts)

    async def _keep(self, key: str, done: ImageDone, payload: Data, *, at_once: bool) -> None:
        """Keep a result: meanwhile, or `at_once` where it is about to be handed over."""
        if self._cache is None or len(self._keeping) >= MAX_CACHE_WRITES:
            return
        task = asyncio.create_task(asyncio.to_thread(self._cache.put, key, done, payload))
        self._keeping.add(task)
        task.add_done_callback(self._keeping.discard)
        if at_once:
            await asyncio.wait((task,))  # if we are cancelled, it goes on

    async def _do(
        self,
        want: str,
        spec_json: str,
        data: Data,
        where: str,
        is_base64: bool,
        take: Reserve | None = None,
    ) -> tuple[ImageDone, bytearray]:
        job = ImageJob(want, spec_json, is_base64, self._limits, self._workers.seconds, self.gpu)
        return await self._workers.do(job, data, where, take)

    def _check_size(self, data: Data, where: str, is_base64: bool) -> None:
        """The worker checks the real size; this bounds what is sent to it at all."""
        most = self._limits.max_bytes * 3 // 2 if is_base64 else self._limits.max_bytes
        if len(data) > most:
            text = f"{where}: the image was refused: the limit is {self._limits.max_bytes} bytes"
            raise BadImage(text, "image_too_large")


def _as_it_came(format: str, geometry: Geometry, client: int, seconds: float) -> PreparedImage:
    """An image that passes, of so many characters of base64."""
    height, width = geometry.size
    return PreparedImage(
        media_type="", base64=None, width=width, height=height, tokens=geometry.tokens, content_hash="", format=format,
        outcome="passed", seconds=seconds, stages=(), bytes_in=client * 3 // 4, bytes_out=0,
        grid=(geometry.grid_t, geometry.grid_h, geometry.grid_w),
    )  # fmt: skip


def _prepared(done: ImageDone, payload: Data, seconds: float, *, cached: bool = False) -> PreparedImage:
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
