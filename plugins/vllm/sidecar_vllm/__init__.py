"""vLLM's side of the sidecar: the steps of its core (steps.py), and images through shared memory: RGB pixels, or
finished tensors (tensors.py).

Pixels come as `sidecar-shm://FOLDER/NAME?h=H&w=W&o=OFFSET`.

Rules: it imports nothing of the sidecar, and torch only where vLLM has loaded it. A name is hexadecimal and cannot
leave the folder; links are not followed. A file is unlinked as soon as it is mapped, so it is read once. A mark file in
the folder, locked while this process runs, shows the sidecar that there is a reader; without it, images are sent
inline. No failure here keeps vLLM from starting.
"""

from __future__ import annotations

import asyncio
import dataclasses
import json
import logging
import os
import re
from pathlib import Path
from typing import Any

from sidecar_vllm import steps
from sidecar_vllm.locked_file import open_locked
from sidecar_vllm.tensors import IMAGE_PROCESSOR, Offer, TensorHandoff, map_file

__version__ = "0.4.0"

SHM_FOLDER = Path("/dev/shm")  # mounted in both containers; the sidecar uses no other folder
URL_SCHEME = "sidecar-shm://"
CONNECTOR_NAME = "inference_sidecar"
MARK_PREFIX = "sidecar-plugin-"
OFFER_PREFIX = "sidecar-tensors-"
CONNECTOR_VARIABLE = "VLLM_MEDIA_CONNECTOR"
SAID_VARIABLE = "INFERENCE_SIDECAR_SAID"
TENSORS_MARK = ";sidecar-tensors="
TENSORS_HEAD_CHARS = 64  # of a data URL: its media type
URL_VERSION = 1
MARK_BYTES = 2048  # constant, so that a new mark overwrites all of an old one
MAX_GROUPS = 32  # of this process, in the mark
CAP_DAC_OVERRIDE = 1 << 1  # with it, a file's mode does not matter
URL_PATTERN = re.compile(
    r"sidecar-shm://(sidecar-images-[a-z0-9_]{1,32})/(out-[0-9a-f]{32})\?h=(\d{1,6})&w=(\d{1,6})&o=(\d{1,6})"
)


def register() -> None:
    """Report steps, register the connector, and take tensors where this vLLM is known.

    vLLM calls this in each of its processes. Never raises: what is raised here would end vLLM.
    """
    try:
        if why := steps.install(lambda text: _say_once(text, "steps")):
            _say_once(f"the inference sidecar sees no steps of this engine: {why}", "steps")
    except Exception as e:  # noqa: BLE001
        _say_once(f"the inference sidecar sees no steps of this engine: {type(e).__name__}", "steps")
    try:
        _register()
    except Exception as e:  # noqa: BLE001
        _say_once(f"the inference sidecar's plug-in is not used: {type(e).__name__}")


def _register() -> None:
    from vllm.multimodal.media import MEDIA_CONNECTOR_REGISTRY, MediaConnector

    if CONNECTOR_NAME in getattr(MEDIA_CONNECTOR_REGISTRY, "name2class", {}):
        return
    handoff = TensorHandoff(leave_offer)

    @MEDIA_CONNECTOR_REGISTRY.register(CONNECTOR_NAME)
    class SidecarConnector(MediaConnector):  # type: ignore[misc]
        """vLLM's own connector, plus shared memory."""

        def load_from_url(self, url: str, media_io: Any, **kwargs: Any) -> Any:
            if url.startswith(URL_SCHEME):
                return load(url)
            made = handoff.load(url, media_io, SHM_FOLDER) if TENSORS_MARK in url[:TENSORS_HEAD_CHARS] else None
            return made if made is not None else super().load_from_url(url, media_io, **kwargs)

        async def load_from_url_async(self, url: str, media_io: Any, **kwargs: Any) -> Any:
            if url.startswith(URL_SCHEME):
                return await asyncio.get_running_loop().run_in_executor(None, load, url)
            if TENSORS_MARK in url[:TENSORS_HEAD_CHARS]:
                loop = asyncio.get_running_loop()
                made = await loop.run_in_executor(None, handoff.load, url, media_io, SHM_FOLDER)
                if made is not None:
                    return made
            return await super().load_from_url_async(url, media_io, **kwargs)

    if why := handoff.install():  # then only who names the connector gets it
        _say_once(f"the inference sidecar hands no tensors over: {why}")
    else:
        os.environ.setdefault(CONNECTOR_VARIABLE, CONNECTOR_NAME)
    leave_mark()


def _say_once(text: str, of: str = "images") -> None:
    """Log a warning in the first of vLLM's processes only: the others inherit its environment."""
    said = os.environ.get(SAID_VARIABLE, "").split()
    if of not in said:
        os.environ[SAID_VARIABLE] = " ".join([*said, of])
        logging.getLogger("vllm").warning(text)


def leave_offer(offer: Offer, folder: Path = SHM_FOLDER) -> None:
    """Write and lock the mark that shows which tensors this vLLM takes."""
    fields = {"processor": IMAGE_PROCESSOR, **dataclasses.asdict(offer)}
    _lock_mark(folder / f"{OFFER_PREFIX}{os.geteuid()}", encode_mark(**fields), "no tensors")


def leave_mark(folder: Path = SHM_FOLDER) -> None:
    """Write and lock the mark that shows a running vLLM with this plugin. The lock lasts until this process ends."""
    _lock_mark(folder / f"{MARK_PREFIX}{os.geteuid()}", encode_mark(), "images inline")


def _lock_mark(path: Path, content: bytes, consequence: str) -> None:
    try:
        os.pwrite(open_locked(path), content.ljust(MARK_BYTES), 0)  # it stays open: the lock is its
    except OSError as e:
        text = "the inference sidecar will send %s: cannot write a mark into %s (%s)"
        logging.getLogger("vllm").warning(text, consequence, path.parent, e.strerror)


def encode_mark(**more: Any) -> bytes:
    """The content of a mark: what the sidecar must know about this process."""
    mark = {
        "form": URL_VERSION,
        "version": __version__,
        "pid": os.getpid(),
        "user": os.geteuid(),
        "reads_all": _can_read_all(),
        "groups": sorted({os.getegid(), *os.getgroups()})[:MAX_GROUPS],
        "connector": os.environ.get(CONNECTOR_VARIABLE, "")[:40],
    }
    return json.dumps(mark | more).encode()


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
    pixels = map_file(folder / found[1] / found[2])
    if len(pixels) != offset + 3 * height * width:
        raise ValueError("the image in shared memory does not have the size given in its URL")
    image = Image.frombuffer("RGB", (width, height), memoryview(pixels)[offset:], "raw", "RGB", 0, 1)
    # without a uuid, vLLM's caches identify the image by these bytes: a file name is used only once
    return MediaWithBytes(image, found[2].encode())
