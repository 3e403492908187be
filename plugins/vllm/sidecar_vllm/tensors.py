"""Finished tensors for vLLM: the sidecar's `pixel_values` and grid in the place of the image processor's call.

An image comes as a data URL of the client's own bytes, with one more parameter that names a file in shared memory:

    data:image/jpeg;sidecar-tensors=1.FOLDER.NAME.HEIGHT.WIDTH.GRID_H.GRID_W.DTYPE;base64,...

For an image whose tensors this vLLM had before, FOLDER and NAME are 0: its cache is likely to hold them still.

Rules: what is handed over is an image like any other, which decodes itself if anyone asks for its pixels. Its tensors
are used only where each check holds: a known vLLM, a known processor, its settings as they were offered to the sidecar,
the grid that this processor gives such an image, dtype and size of the file. Where one does not hold, or the file is
gone, vLLM processes the original, which is in the same URL. No failure here fails a request that vLLM would serve.
"""

from __future__ import annotations

import functools
import logging
import mmap
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

# Versions whose `call_hf_processor`, processor classes and layout of patches are tested: tests/vllm/test_tensors.py.
KNOWN_VERSIONS = ("0.32.",)
MODEL_PROCESSORS = frozenset(
    {"Qwen2VLMultiModalProcessor", "Qwen2_5_VLMultiModalProcessor", "Qwen3VLMultiModalProcessor"}
)
IMAGE_PROCESSOR = "Qwen2VLImageProcessor"
SETTINGS = (
    *("do_resize", "do_convert_rgb", "do_rescale", "do_normalize", "rescale_factor", "resample"),
    *("image_mean", "image_std", "patch_size", "temporal_patch_size", "merge_size"),
)
OTHER_SCOPES = frozenset(
    {"images_kwargs", "videos_kwargs", "text_kwargs", "truncation", "size", "min_pixels", "max_pixels"}
)
DTYPES = {"U8": "uint8", "F32": "float32", "BF16": "bfloat16", "F16": "float16"}  # safetensors' names and torch's
ELEMENT_BYTES = {"U8": 1, "F32": 4, "BF16": 2, "F16": 2}
MAX_HEAD_CHARS = 256
URL_PATTERN = re.compile(
    r"data:[a-z0-9.+/-]{1,40};sidecar-tensors=1\.(?:(sidecar-images-[a-z0-9_]{1,32})\.(out-[0-9a-f]{32})|0\.0)"
    r"\.(\d{1,6})\.(\d{1,6})\.(\d{1,5})\.(\d{1,5})\.(U8|F32|BF16|F16);base64,"
)

_log = logging.getLogger("vllm")


@dataclass(frozen=True)
class Offer:
    """What this vLLM takes: its image processor's settings, and the dtype in which it wants `pixel_values`."""

    settings: Mapping[str, Any]
    dtype: str
    cache_bytes: int = 0  # of its cache of processed images; 0: it has none

    @property
    def columns(self) -> int:
        """Values of one patch."""
        return 3 * int(self.settings["temporal_patch_size"]) * int(self.settings["patch_size"]) ** 2

    def grid(self, height: int, width: int) -> tuple[int, int]:
        """The patches of an image of this size, by the processor's own function. Raises ValueError."""
        from transformers.models.qwen2_vl.image_processing_qwen2_vl import smart_resize

        s = self.settings
        side = int(s["patch_size"])
        new_height, new_width = smart_resize(
            height, width, side * int(s["merge_size"]), min_pixels=s["min_pixels"], max_pixels=s["max_pixels"]
        )
        return new_height // side, new_width // side


class PreparedImage(Image.Image):  # type: ignore[misc]
    """An RGB image whose tensor is at hand, and whose pixels are decoded only if they are asked for."""

    def __init__(self, size: tuple[int, int], grid: tuple[int, int], tensor: Any, decode: Callable[[], Image.Image]):
        super().__init__()
        self._mode, self._size = "RGB", size
        self.grid, self.tensor, self._decode = grid, tensor, decode

    def load(self) -> Any:
        """Decode the original, once."""
        if getattr(self, "_im", None) is None:
            decoded = self._decode()
            decoded.load()
            self.im = decoded.im
            self._mode, self._size = decoded.mode, decoded.size
        return super().load()


class TensorHandoff:
    """The state of one vLLM process. `publish` is called with each offer, for the sidecar to read."""

    def __init__(self, publish: Callable[[Offer], None]) -> None:
        self.offer: Offer | None = None
        self._publish = publish
        self._warned: set[str] = set()

    def install(self) -> str:
        """Put the hand-off in the place of the processor's call. Returns why not, or ""."""
        import vllm
        from vllm.multimodal.processing.context import InputProcessingContext
        from vllm.multimodal.processing.processor import BaseMultiModalProcessor

        if not vllm.__version__.startswith(KNOWN_VERSIONS):
            return f"vLLM {vllm.__version__} is not known to this plug-in"
        begin, call = BaseMultiModalProcessor.__init__, InputProcessingContext.call_hf_processor

        @functools.wraps(begin)
        def begin_and_offer(processor: Any, *args: Any, **kwargs: Any) -> None:
            begin(processor, *args, **kwargs)
            self._safely("offer", lambda: self._consider(processor))

        @functools.wraps(call)
        def call_or_take(context: Any, processor: Any, data: Mapping[str, Any], kwargs: Mapping[str, Any] = {}) -> Any:
            made = self._safely("tensors", lambda: self._take(context, processor, data, kwargs))
            return made if made is not None else call(context, processor, data, kwargs)

        BaseMultiModalProcessor.__init__ = begin_and_offer
        InputProcessingContext.call_hf_processor = call_or_take
        return ""

    def load(self, url: str, media_io: Any, folder: Path) -> Any:
        """The image of a URL with tensors; None where vLLM is to load it as it would without them. Never raises."""
        return self._safely("file", lambda: self._load(url, media_io, folder))

    def _consider(self, processor: Any) -> None:
        """Offer to take tensors, if this model's processor is known."""
        if type(processor).__name__ not in MODEL_PROCESSORS or not type(processor).__module__.startswith("vllm."):
            return
        context = processor.info.ctx
        settings = effective_settings(context, processor.info.get_hf_processor().image_processor, {})
        if settings is None:
            return
        floats = settings["do_rescale"] or settings["do_normalize"]
        made = str(context.model_config.dtype).removeprefix("torch.") if floats else "uint8"
        names = {torch_name: name for name, torch_name in DTYPES.items()}
        cache_bytes = int((context.get_mm_config().mm_processor_cache_gb or 0) * 2**30)
        if made in names and (offer := Offer(settings, names[made], cache_bytes)) != self.offer:
            self.offer = offer
            self._publish(offer)

    def _load(self, url: str, media_io: Any, folder: Path) -> Any:
        import pybase64
        import torch
        from vllm import envs
        from vllm.multimodal.media import MediaWithBytes

        offer, found = self.offer, URL_PATTERN.match(url[:MAX_HEAD_CHARS])
        if offer is None or found is None:
            return None
        height, width, rows, columns = (int(found[i]) for i in range(3, 7))
        if media_io.image_mode != "RGB" or media_io.kwargs or 0 < envs.VLLM_MAX_IMAGE_PIXELS < height * width:
            return None
        tensor = None
        if found[1]:
            content = map_file(folder / found[1] / found[2])
            size = rows * columns * offer.columns * ELEMENT_BYTES[offer.dtype]
            if found[7] != offer.dtype or (rows, columns) != offer.grid(height, width) or len(content) != size:
                raise ValueError("it does not have the dtype, grid or size that this vLLM's processor gives")
            tensor = torch.frombuffer(content, dtype=getattr(torch, DTYPES[offer.dtype])).view(-1, offer.columns)
        data = pybase64.b64decode(url[found.end() :], validate=True)
        image = PreparedImage((width, height), (rows, columns), tensor, lambda: media_io.load_bytes(data).media)
        return MediaWithBytes(image, data)

    def _take(self, context: Any, processor: Any, data: Mapping[str, Any], kwargs: Mapping[str, Any]) -> Any:
        images = data.get("images")
        if self.offer is None or not isinstance(images, list) or not images or set(data) - {"images", "text"}:
            return None
        if not all(isinstance(image, PreparedImage) and image.tensor is not None for image in images):
            return None
        if effective_settings(context, processor.image_processor, kwargs) != self.offer.settings:
            return None
        import torch
        from transformers.feature_extraction_utils import BatchFeature

        grids = torch.tensor([[1, *image.grid] for image in images], dtype=torch.long)
        parts = [image.tensor for image in images]
        return BatchFeature(
            {"pixel_values": parts[0] if len(parts) == 1 else torch.cat(parts), "image_grid_thw": grids}
        )

    def _safely(self, what: str, run: Callable[[], Any]) -> Any:
        """The result of `run`; None if it raises, which is logged once for each `what`."""
        try:
            return run()
        except Exception as e:  # noqa: BLE001  # vLLM goes on with its own processor
            if what not in self._warned:
                self._warned.add(what)
                text = "the inference sidecar's tensors are not used (%s: %s); vLLM processes such images itself"
                _log.warning(text, what, e if isinstance(e, (ValueError, OSError)) else type(e).__name__)
            return None


def effective_settings(context: Any, image_processor: Any, kwargs: Mapping[str, Any]) -> dict[str, Any] | None:
    """The settings with which vLLM would call the image processor; None if it is not a known one, or has others."""
    kind = type(image_processor)
    if kind.__name__.removesuffix("Fast") != IMAGE_PROCESSOR or not kind.__module__.startswith("transformers."):
        return None
    merged = context.get_merged_mm_kwargs(kwargs)
    scoped = merged.get("images_kwargs") or {}
    given = {**{name: merged[name] for name in merged if name not in OTHER_SCOPES}, **scoped}
    if set(given) - {*SETTINGS, "size", "min_pixels", "max_pixels"}:
        return None
    settings = {name: _plain(given.get(name, getattr(image_processor, name))) for name in SETTINGS}
    size = dict(image_processor.size)
    for source in (merged, scoped):
        size |= {edge: pixels for edge, pixels in (source.get("size") or {}).items() if pixels is not None}
        for edge, own in (("shortest_edge", "min_pixels"), ("longest_edge", "max_pixels")):
            if source.get(own) is not None:
                size[edge] = source[own]
    return settings | {"min_pixels": int(size["shortest_edge"]), "max_pixels": int(size["longest_edge"])}


def _plain(value: Any) -> Any:
    """A setting as JSON has it."""
    if isinstance(value, (list, tuple)):
        return [float(x) for x in value]
    return int(value) if isinstance(value, int) and not isinstance(value, bool) else value


def map_file(path: Path) -> mmap.mmap:
    """A file in shared memory, mapped and unlinked: it is read once. Raises ValueError."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except PermissionError:
        raise ValueError(
            "the image in shared memory may not be read: run vLLM as root or as the sidecar's user"
        ) from None
    except OSError:
        raise ValueError("the image is not in shared memory: is the same folder mounted in both containers?") from None
    try:
        # private: a tensor must be writable, and what is written to it stays in this process
        return mmap.mmap(fd, 0, flags=mmap.MAP_PRIVATE, prot=mmap.PROT_READ | mmap.PROT_WRITE)
    finally:
        os.close(fd)
        path.unlink(missing_ok=True)
