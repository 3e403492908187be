"""vLLM's media connector for `sidecar-shm://FOLDER/NAME?h=H&w=W&o=OFFSET`: RGB pixels in a file in shared memory.

Rules: neither torch nor the sidecar is imported; a name is hexadecimal and cannot leave the folder; links are not followed; the
file is removed as soon as it is mapped, so that it is read once.
"""

from __future__ import annotations

import asyncio
import mmap
import os
import re
from pathlib import Path
from typing import Any

SCHEME = "sidecar-shm://"
NAME = "inference_sidecar"
URL = re.compile(
    r"sidecar-shm://(sidecar-images-[a-z0-9_]{1,32})/(out-[0-9a-f]{32})\?h=(\d{1,6})&w=(\d{1,6})&o=(\d{1,6})"
)


def register() -> None:
    """Make the connector known under VLLM_MEDIA_CONNECTOR=inference_sidecar. vLLM calls this in each of its processes."""
    from vllm.multimodal.media import MEDIA_CONNECTOR_REGISTRY, MediaConnector

    if NAME in getattr(MEDIA_CONNECTOR_REGISTRY, "name2class", {}):
        return

    @MEDIA_CONNECTOR_REGISTRY.register(NAME)
    class SidecarConnector(MediaConnector):  # type: ignore[misc]
        """vLLM's own connector, and shared memory."""

        def load_from_url(self, url: str, media_io: Any, **more: Any) -> Any:
            return load(url) if url.startswith(SCHEME) else super().load_from_url(url, media_io, **more)

        async def load_from_url_async(self, url: str, media_io: Any, **more: Any) -> Any:
            if url.startswith(SCHEME):
                return await asyncio.get_running_loop().run_in_executor(None, load, url)
            return await super().load_from_url_async(url, media_io, **more)


def load(url: str) -> Any:
    """The image of a URL, as vLLM's loaders give it. Raises ValueError, which vLLM answers with 400."""
    from PIL import Image
    from vllm.multimodal.media import MediaWithBytes

    found = URL.fullmatch(url)
    if found is None:
        raise ValueError("not a shared memory URL of the inference sidecar")
    folder, name = found[1], found[2]
    height, width, offset = (int(found[i]) for i in (3, 4, 5))
    pixels = _read(Path(os.environ.get("SIDECAR_SHM_DIR", "/dev/shm")) / folder / name)
    if len(pixels) != offset + 3 * height * width:
        raise ValueError("the image in shared memory does not have the size that its URL says")
    image = Image.frombuffer("RGB", (width, height), memoryview(pixels)[offset:], "raw", "RGB", 0, 1)
    # The bytes name the image in vLLM's caches where no uuid does: a file's name is used once, so nothing is mistaken for another.
    return MediaWithBytes(image, name.encode())


def _read(path: Path) -> mmap.mmap:
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except PermissionError:
        raise ValueError(
            "the image in shared memory may not be read: run vLLM as root or as the sidecar's user"
        ) from None
    except OSError:
        raise ValueError("the image is not in shared memory: is the same folder mounted in both containers?") from None
    try:
        return mmap.mmap(fd, 0, prot=mmap.PROT_READ)
    finally:
        os.close(fd)
        path.unlink(missing_ok=True)
