"""Load what libraries load on their first use, before a worker's files are out of reach.

Rules: the pictures are made here, so no byte comes from outside. What is missing in an installation stays missing: its
images are refused later, as ever.
"""

from __future__ import annotations

import contextlib
import importlib
import io
from typing import Final

from PIL import Image

from sidecar.images.protocol import TENSORS, ImageJob, ImageLimits
from sidecar.images.worker.worker import PrepareImage
from sidecar.kernels.families.single_view import ClipSpec
from sidecar.kernels.grid import BICUBIC

# What Pillow imports within functions, and Python's codecs that it names.
MODULES: Final = (
    "PIL.ImageCms", "PIL.ImageColor", "PIL.ImageFilter", "PIL.ImagePalette", "PIL.MpoImagePlugin",
    "PIL.TiffImagePlugin", "PIL.TiffTags", "copy", "defusedxml.ElementTree", "mmap", "tempfile",
    "xml.etree.ElementTree", "encodings.ascii", "encodings.latin_1", "encodings.utf_8", "encodings.utf_16",
)  # fmt: skip
# File format and mode: each decoder, and each way to RGB.
PICTURES: Final = (
    ("JPEG", "RGB"), ("JPEG", "CMYK"), ("PNG", "RGBA"), ("PNG", "P"), ("PNG", "I;16"), ("WEBP", "RGB"),
    ("WEBP", "RGBA"), ("GIF", "P"), ("BMP", "RGB"), ("TIFF", "LAB"), ("TIFF", "RGB"),
)  # fmt: skip
SIDE: Final = 32
WARM_UP_TIMEOUT_S: Final = 60.0
CLIP: Final = ClipSpec(
    resample=BICUBIC,
    do_rescale=True,
    rescale_factor=1 / 255,
    do_normalize=True,
    image_mean=(0.5, 0.5, 0.5),
    image_std=(0.5, 0.5, 0.5),
    shortest=24,
    crop_height=24,
    crop_width=24,
)


def preimport() -> None:
    """Import MODULES, as far as they are installed."""
    for name in MODULES:
        with contextlib.suppress(ImportError):
            importlib.import_module(name)


def run(prepare: PrepareImage, limits: ImageLimits) -> None:
    """Prepare small pictures of every kind."""
    for format, mode in PICTURES:
        job = ImageJob(TENSORS, CLIP.to_json(), False, limits, WARM_UP_TIMEOUT_S)
        prepare(job, _picture(format, mode), None)


def _picture(format: str, mode: str) -> bytearray:
    """A black file; empty if this Pillow cannot write the format."""
    out = io.BytesIO()
    with contextlib.suppress(OSError, KeyError):
        Image.new(mode, (SIDE, SIDE)).save(out, format)
    return bytearray(out.getvalue())
