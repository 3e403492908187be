"""Which hand-off of an image costs engine and sidecar together the least CPU time: pure.

Each way of an image is a sum of steps, and each step costs what it was measured to cost on this machine
(worker/calibration.py): the engine's steps with the libraries that engines use, the sidecar's with its own.

    way      the sidecar                                  the engine
    pass     -                                            text, decode, process at full size
    inline   decode, resize, base64                       text of plain pixels, process without a resize
    shm      decode, resize, write                        process without a resize
    tensors  decode, resize and patches into shared       text of the original
             memory

Rules: an image passes unless another way costs clearly less. Unknown costs decide nothing: then only the bounds of
header_geometry.py hold. What both ways share, such as the transport of tensors inside the engine, is left out.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Final

PASS, INLINE, SHM, TENSORS = "pass", "inline", "shm", "tensors"
WAYS: Final = (PASS, INLINE, SHM, TENSORS)
# Of what passing costs. Measurements on a busy machine vary by some percent, and a way that gains nothing adds risk.
CLEARLY_LESS: Final = 0.95
# The unit costs, in nanoseconds of CPU time. Formats that are not measured are taken for JPEG.
STEPS: Final = (
    "decode_jpeg",  # the sidecar's decoder, per pixel of the original
    "decode_png",
    "decode_webp",
    "engine_decode_jpeg",  # Pillow, per pixel of the original
    "engine_decode_png",
    "engine_decode_webp",
    "resize_in",  # the sidecar's resize, per pixel of the original
    "resize_out",  # per pixel of the result
    "patches_out",  # what the patch layout adds, per pixel of the result
    "engine_resize_in",  # the processor's resize, per pixel of the original
    "engine_process_out",  # its patch layout and conversions, per pixel of the result
    "base64",  # the sidecar's, per byte of plain data
    "text",  # the engine's receiving, JSON and base64, per character
    "write",  # to new shared memory, per byte
)
TEMPORAL: Final = 2  # copies of each pixel in Qwen's patches


@dataclass(frozen=True, slots=True)
class UnitCosts:
    """Nanoseconds by step. Raises KeyError if one is missing."""

    by_step: Mapping[str, float]

    def __post_init__(self) -> None:
        if set(self.by_step) != set(STEPS) or not all(cost >= 0 for cost in self.by_step.values()):
            raise KeyError("not the steps of this version")

    def decode(self, format: str, *, engine: bool = False) -> float:
        """Per pixel of the original."""
        prefix = "engine_decode_" if engine else "decode_"
        return self.by_step.get(prefix + format, self.by_step[prefix + "jpeg"])


@dataclass(frozen=True, slots=True)
class ImageSize:
    """What is known of an image from its header: pixels as stored and as the model sees them, base64 characters."""

    format: str
    pixels_in: int
    pixels_out: int
    client_chars: int
    element_bytes: int = 1  # of a tensor's value

    @property
    def is_resized(self) -> bool:
        return self.pixels_in != self.pixels_out


def milliseconds(image: ImageSize, costs: UnitCosts) -> dict[str, float]:
    """CPU time of engine and sidecar by way."""
    unit, size_in, size_out = costs.by_step, image.pixels_in, image.pixels_out
    plain = 3 * size_out  # bytes of plain pixels
    scaled = image.is_resized
    client_text = unit["text"] * image.client_chars
    own_decode = costs.decode(image.format) * size_in + unit["base64"] * image.client_chars * 3 / 4
    own_resize = (unit["resize_in"] * size_in + unit["resize_out"] * size_out) if scaled else 0.0
    process = unit["engine_process_out"] * size_out
    made = {
        PASS: client_text
        + costs.decode(image.format, engine=True) * size_in
        + (unit["engine_resize_in"] * size_in if scaled else 0.0)
        + process,
        INLINE: own_decode + own_resize + unit["base64"] * plain + unit["text"] * plain * 4 / 3 + process,
        SHM: own_decode + own_resize + unit["write"] * plain + process,
        TENSORS: client_text
        + own_decode
        + own_resize
        + unit["patches_out"] * size_out
        + unit["write"] * plain * TEMPORAL * image.element_bytes,
    }
    return {way: nanoseconds / 1e6 for way, nanoseconds in made.items()}


def choose(image: ImageSize, offered: Collection[str], costs: UnitCosts | None) -> str:
    """The cheapest of the ways that the engine takes and that the bounds allow; PASS unless it is clearly cheaper."""
    if costs is None:
        return next((way for way in (TENSORS, SHM, INLINE) if way in offered), PASS)
    spent = milliseconds(image, costs)
    best = min((way for way in WAYS if way in offered or way == PASS), key=spent.__getitem__)
    return best if spent[best] <= CLEARLY_LESS * spent[PASS] else PASS
