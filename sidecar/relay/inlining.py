"""The images of one request, prepared all at once, and what of its body changes by it."""

from __future__ import annotations

import asyncio
import hashlib
import time
from collections.abc import Callable
from typing import Protocol

from sidecar.errors import BadImage, RequestError
from sidecar.facts import Fact, Imaged
from sidecar.jobs import Data
from sidecar.relay.bodies import ImagePart


class Prepared(Protocol):
    """What image work returns; `base64` is None where the image passes untouched."""

    @property
    def media_type(self) -> str: ...
    @property
    def base64(self) -> Data | None: ...
    @property
    def url(self) -> str: ...
    @property
    def tokens(self) -> int: ...
    @property
    def content_hash(self) -> str: ...
    @property
    def format(self) -> str: ...
    @property
    def outcome(self) -> str: ...
    @property
    def seconds(self) -> float: ...
    @property
    def stages(self) -> tuple[tuple[str, float], ...]: ...
    @property
    def bytes_in(self) -> int: ...
    @property
    def bytes_out(self) -> int: ...


class ImageWork(Protocol):
    """The image workers, as a relay sees them."""

    async def inline(self, data: memoryview, where: str, tenant: str, hand_over: str) -> Prepared:
        """Prepare one image from its base64 text. Raises BadImage or ImagesBusy."""

    def release(self, request: str) -> None:
        """Nobody reads any more what was handed over for a request."""


async def prepare(
    images: ImageWork,
    parts: list[ImagePart],
    limit: int,
    emit: Callable[[Fact], None],
    id: str,
    tenant: str,
    *,
    shm: bool = False,
) -> list[Prepared]:
    """All images of `tenant`'s request `id`, in order; `shm`: handed over in shared memory. Raises BadImage or ImagesBusy; the other images are then given up."""
    if len(parts) > limit:
        raise BadImage(f"{len(parts)} images in one request; at most {limit} are accepted", "image_count")
    if len(parts) == 1:  # the usual request needs no task
        return [await _one(images, parts[0], emit, id, tenant, shm)]
    try:
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(_one(images, part, emit, id, tenant, shm)) for part in parts]
    except* RequestError as group_error:
        raise _first(group_error) from None
    return [task.result() for task in tasks]


def replacements(
    parts: list[ImagePart], prepared: list[Prepared], name: Callable[[str], str] | None
) -> dict[int, tuple[str, Data]]:
    """What to put in the place of which original, for bodies.join. `name`: content hash -> `uuid`, where vLLM caches by it."""
    replaced: dict[int, tuple[str, Data]] = {}
    for part, image in zip(parts, prepared, strict=True):
        if image.url:
            replaced[part.index] = ("", image.url.encode())
        elif image.base64 is not None:
            replaced[part.index] = (image.media_type, image.base64)
        else:
            continue
        if name is not None:
            part.part.setdefault("uuid", name(image.content_hash))
    return replaced


def cache_name(key: bytes, tenant: str, content_hash: str) -> str:
    """The `uuid` of an image. vLLM takes it for the image itself, so nobody who lacks our key may be able to compute the one of
    another tenant's image and put his own picture there."""
    return hashlib.blake2b(f"{tenant}\0{content_hash}".encode(), key=key, digest_size=16).hexdigest()


async def _one(
    images: ImageWork, part: ImagePart, emit: Callable[[Fact], None], id: str, tenant: str, shm: bool
) -> Prepared:
    started = time.monotonic()
    try:
        image = await images.inline(part.data, part.where, tenant, id if shm else "")
    except RequestError as e:
        now = time.monotonic()
        outcome = "rejected" if isinstance(e, BadImage) else "failed"
        emit(Imaged(id, now, "unknown", outcome, now - started, (), len(part.data) * 3 // 4, 0))
        raise
    emit(
        Imaged(
            id,
            time.monotonic(),
            image.format,
            image.outcome,
            image.seconds,
            image.stages,
            image.bytes_in,
            image.bytes_out,
        )
    )
    return image


def _first(group: BaseExceptionGroup[RequestError]) -> BaseException:
    error: BaseException = group
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error
