"""vLLM's media connector for `sidecar-shm://FOLDER/NAME?h=H&w=W&o=OFFSET`: RGB pixels in a file in shared memory.

Rules: it imports neither torch nor the sidecar. A name is hexadecimal and cannot leave the folder; links are not
followed. A file is unlinked as soon as it is mapped, so it is read once. A mark file in the folder, locked while this
process runs, shows the sidecar that there is a reader; without it, images are sent inline. No failure here keeps vLLM
from starting.
"""

from __future__ import annotations

import asyncio
import fcntl
import json
import logging
import mmap
import os
import re
import struct
from pathlib import Path
from typing import Any

__version__ = "0.2.0"

SHM_FOLDER = Path("/dev/shm")  # mounted in both containers; the sidecar uses no other folder
URL_SCHEME = "sidecar-shm://"
CONNECTOR_NAME = "inference_sidecar"
MARK_PREFIX = "sidecar-plugin-"
URL_VERSION = 1
MARK_BYTES = 512  # constant, so that a new mark overwrites all of an old one
CAP_DAC_OVERRIDE = 1 << 1  # with it, a file's mode does not matter
URL_PATTERN = re.compile(
    r"sidecar-shm://(sidecar-images-[a-z0-9_]{1,32})/(out-[0-9a-f]{32})\?h=(\d{1,6})&w=(\d{1,6})&o=(\d{1,6})"
)


def register() -> None:
    """Register the connector for VLLM_MEDIA_CONNECTOR=inference_sidecar. vLLM calls this in each of its processes."""
    from vllm.multimodal.media import MEDIA_CONNECTOR_REGISTRY, MediaConnector

    if CONNECTOR_NAME in getattr(MEDIA_CONNECTOR_REGISTRY, "name2class", {}):
        return

    @MEDIA_CONNECTOR_REGISTRY.register(CONNECTOR_NAME)
    class SidecarConnector(MediaConnector):  # type: ignore[misc]
        """vLLM's own connector, plus shared memory."""

        def load_from_url(self, url: str, media_io: Any, **kwargs: Any) -> Any:
            return load(url) if url.startswith(URL_SCHEME) else super().load_from_url(url, media_io, **kwargs)

        async def load_from_url_async(self, url: str, media_io: Any, **kwargs: Any) -> Any:
            if url.startswith(URL_SCHEME):
                return await asyncio.get_running_loop().run_in_executor(None, load, url)
            return await super().load_from_url_async(url, media_io, **kwargs)

    leave_mark()


def leave_mark(folder: Path = SHM_FOLDER) -> None:
    """Write and lock the mark that shows a running vLLM with this plugin. The lock lasts until this process ends."""
    path = folder / f"{MARK_PREFIX}{os.geteuid()}"
    try:
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o644)
        fcntl.fcntl(fd, fcntl.F_OFD_SETLK, struct.pack("hhqqi", fcntl.F_RDLCK, os.SEEK_SET, 0, 0, 0))
        os.fchmod(fd, 0o644)  # regardless of the umask: it holds no secret
        os.pwrite(fd, encode_mark().ljust(MARK_BYTES), 0)
    except OSError as e:
        text = "the inference sidecar will send images inline: cannot write a mark into %s (%s)"
        logging.getLogger("vllm").warning(text, path.parent, e.strerror)


def encode_mark() -> bytes:
    """The content of the mark: what the sidecar must know about this process."""
    return json.dumps(
        {
            "form": URL_VERSION,
            "version": __version__,
            "pid": os.getpid(),
            "user": os.geteuid(),
            "reads_all": _can_read_all(),
            "connector": os.environ.get("VLLM_MEDIA_CONNECTOR", "")[:40],
        }
    ).encode()


def _can_read_all() -> bool:
    """True if this process may read another user's files of mode 0600; root without capabilities may not."""
    lines = Path("/proc/self/status").read_text().splitlines()
    effective = next((line.split()[1] for line in lines if line.startswith("CapEff:")), "0")
    return bool(int(effective, 16) & CAP_DAC_OVERRIDE)


def load(url: str, folder: Path = SHM_FOLDER) -> Any:
    """The image of a URL, as vLLM's loaders return it. Raises ValueError, to which vLLM responds with 400."""
    from PIL import Image
    from vllm.multimodal.media import MediaWithBytes

    found = URL_PATTERN.fullmatch(url)
    if found is None:
        raise ValueError("not a shared memory URL of the inference sidecar")
    height, width, offset = (int(found[i]) for i in (3, 4, 5))
    pixels = _map_file(folder / found[1] / found[2])
    if len(pixels) != offset + 3 * height * width:
        raise ValueError("the image in shared memory does not have the size given in its URL")
    image = Image.frombuffer("RGB", (width, height), memoryview(pixels)[offset:], "raw", "RGB", 0, 1)
    # without a uuid, vLLM's caches identify the image by these bytes: a file name is used only once
    return MediaWithBytes(image, found[2].encode())


def _map_file(path: Path) -> mmap.mmap:
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
