"""The images of one request, prepared concurrently, and the changes to its body."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import time
from collections.abc import Awaitable, Callable, Coroutine, Iterable
from typing import TYPE_CHECKING, Any, Final, TypeVar

from sidecar.errors import BadImage, ImagesBusy, RequestError
from sidecar.events import Event, ImagePrepared
from sidecar.images import pass_reasons
from sidecar.images.header_geometry import MAX_SMALL_CHARS, base64_chars
from sidecar.images.protocol import Data
from sidecar.images.vllm_plugin import Handoffs
from sidecar.load.found import MAX_PARTS
from sidecar.relay.admission import Admission
from sidecar.relay.media.fetch import MAX_CONCURRENT_FETCHES
from sidecar.relay.request_body import ImagePart, ParsedBody

if TYPE_CHECKING:  # a relay without images does not load them
    from sidecar.images.service import ImageService, PreparedImage

Fetch = Callable[[str, str], Awaitable[Data]]  # a link and the part that has it -> the image
T = TypeVar("T")

# Images that are prepared for one request; further ones pass, those behind links as they were fetched. All are prepared
# at once, and four such requests fill the queue of the workers.
MAX_IMAGES: Final = 16
# Links of one request that are followed at once: half of what a relay process follows, so that others have theirs.
MAX_LINKS_AT_ONCE: Final = MAX_CONCURRENT_FETCHES // 2
UNKNOWN_MEDIA_TYPE: Final = "application/octet-stream"  # of fetched bytes in no known format

# While an engine starts it measures the GPU's memory, and fails if another process's use changes. A stalled or dead
# engine will start again.
GPU_VERDICTS: Final = ("idle", "progressing", "quiet", "suspect")


async def prepare(
    images: ImageService,
    body: ParsedBody,
    emit: Callable[[Event], None],
    admission: Admission,
    *,
    handoffs: Handoffs,
    fetch: Fetch | None,
    passing: str,
    on_fetched: Callable[[int], None],
) -> list[PreparedImage]:
    """The images of a request, in order; what cannot be prepared passes, with the reason.

    `handoffs`: what the engine takes through shared memory; `fetch`: for those behind links, which are kept for
    `originals`; `passing`: why they are only fetched and counted; `on_fetched` receives the base64 characters of all
    that were fetched, and may refuse them. Raises RequestError for a link that cannot be fetched, and cancels the
    others: the sidecar was made the only one that follows links.
    """
    parts = body.images
    check_links(body)
    id, following, fetched_chars = admission.id, asyncio.Semaphore(MAX_LINKS_AT_ONCE), 0
    max_small_chars = MAX_SMALL_CHARS // max(len(parts), 1)  # all of them together stay within it

    async def prepare_one(index: int, part: ImagePart) -> PreparedImage:
        nonlocal fetched_chars
        started = time.monotonic()
        fetched: tuple[tuple[str, float], ...] = ()
        try:
            data: Data = part.data
            if part.link and fetch is not None:
                async with following:
                    data = await fetch(part.link, part.where)
                fetched_chars += base64_chars(data, is_base64=False)
                on_fetched(fetched_chars)
                fetched = (("fetch", time.monotonic() - started),)
            reason = passing or part.pass_reason or ("count" if index >= MAX_IMAGES else "")
            if reason:
                image = images.passed(data, reason, not part.link)
            else:
                image = await _try(images, data, part, admission, handoffs, max_small_chars)
        except RequestError as e:
            emit(failure(id, e, started, len(part.data) * 3 // 4))
            raise
        now, stages = time.monotonic(), (*fetched, *image.stages)
        seconds = now - started if fetched else image.seconds
        sizes = image.bytes_in, image.bytes_out
        emit(ImagePrepared(id, now, image.format, image.outcome, seconds, stages, *sizes, image.reason))
        if part.link:
            part.data = memoryview(await asyncio.to_thread(base64.b64encode, data))
        return image

    if len(parts) == 1:  # the usual request needs no task
        return [await prepare_one(0, parts[0])]
    return await all_of(prepare_one(index, part) for index, part in enumerate(parts))


async def _try(
    images: ImageService, data: Data, part: ImagePart, admission: Admission, handoffs: Handoffs, max_small_chars: int
) -> PreparedImage:
    """One image, prepared; as it came where that is not possible: the engine can prepare or refuse it itself."""
    id, tenant, is_base64 = admission.id, admission.tenant, not part.link
    try:
        return await images.hand_over(data, part.where, tenant, id, handoffs, is_base64, max_small_chars)
    except ImagesBusy as e:
        return images.passed(data, e.why, is_base64)
    except BadImage as e:
        return images.passed(data, pass_reasons.of_refusal(e.reason), is_base64)


async def all_of(work: Iterable[Coroutine[Any, Any, T]]) -> list[T]:
    """The results, in order. Raises the first RequestError, and cancels the others."""
    try:
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(one) for one in work]
    except* RequestError as failed:
        raise failed.exceptions[0] from None
    return [task.result() for task in tasks]


def failure(id: str, error: RequestError, started: float, bytes_in: int) -> ImagePrepared:
    """The event of images that could not be prepared."""
    now, outcome = time.monotonic(), "rejected" if isinstance(error, BadImage) else "failed"
    return ImagePrepared(id, now, "unknown", outcome, now - started, (), bytes_in, 0)


def check_count(count: int) -> None:
    """Raises BadImage if a request has too many images for `/v1/preprocess`."""
    if count > MAX_IMAGES:
        raise BadImage(f"{count} images in one request; at most {MAX_IMAGES} are accepted", "image_count")


def check_links(body: ParsedBody) -> None:
    """Raises BadImage if a request has links behind so many images that their places are not kept.

    The engine would follow them, which the sidecar was configured to prevent.
    """
    unseen = body.link_count - sum(bool(part.link) for part in body.images)
    if unseen > 0:
        text = (
            f"{unseen} links behind the first {MAX_PARTS} images of the request are not fetched (--image-urls); send "
            "fewer images, or those as data URLs"
        )
        raise BadImage(text, "image_count")


def replacements(
    parts: list[ImagePart], prepared: list[PreparedImage], name: Callable[[str], str] | None
) -> dict[int, tuple[str, Data]]:
    """Replacements of originals, for `request_body.rebuild`. `name`: content hash -> `uuid`, by which vLLM caches."""
    replaced: dict[int, tuple[str, Data]] = {}
    for index, (part, image) in enumerate(zip(parts, prepared, strict=True)):
        if image.url:
            replaced[index] = ("", image.url.encode())
        elif image.parameter:
            replaced[index] = (f"image/{image.format};{image.parameter}", part.data)
        elif image.base64 is not None:
            replaced[index] = (image.media_type, image.base64)
        elif part.link:  # the engine need not fetch it again
            replaced[index] = (_media_type(image), part.data)
            continue
        else:
            continue
        if name is not None and not part.is_named:
            part.name = name(image.content_hash)
    return replaced


def form_of(prepared: list[PreparedImage]) -> str:
    """The form in which a request's images were prepared: "inline", "shm" or "tensors"; "" if all pass."""
    if any(image.parameter for image in prepared):
        return "tensors"
    if any(image.url for image in prepared):
        return "shm"
    return "inline" if any(image.base64 is not None for image in prepared) else ""


def originals(parts: list[ImagePart], prepared: list[PreparedImage]) -> dict[int, tuple[str, Data]]:
    """Replacements that restore all images, those behind links as fetched. Removes the names from `replacements`."""
    for part in parts:
        part.name = ""
    pairs = enumerate(zip(parts, prepared, strict=True))
    return {index: (_media_type(image), part.data) for index, (part, image) in pairs if part.link}


def _media_type(image: PreparedImage) -> str:
    """The media type of a fetched image as it came."""
    return UNKNOWN_MEDIA_TYPE if image.format == "unknown" else f"image/{image.format}"


def cache_name(key: bytes, tenant: str, content_hash: str) -> str:
    """The `uuid` of an image.

    vLLM takes it for the image itself. So no one without the key may be able to compute the `uuid` of another tenant's
    image and store a different one under it.
    """
    return hashlib.blake2b(f"{tenant}\0{content_hash}".encode(), key=key, digest_size=16).hexdigest()
