"""Why an image of a request goes to the engine as it came: the `reason` of sidecar_images_total, in words.

Those of a whole engine are in engines/image_loading.py. Passing costs no client a request: the engine does the work
that it would do without a sidecar, and it alone refuses what is broken.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from sidecar.engines.image_loading import ENGINE_REASONS

IMAGE_REASONS: Final[Mapping[str, str]] = {
    "not_smaller": "it would not lose half of its pixels, or its prepared form would be far larger than the file",
    "costs_more": "no other way would cost engine and sidecar clearly less CPU time, as measured at startup",
    "too_many_bytes": "256 MiB of prepared text are in flight in this relay process",
    "processor": "tiles or grid depend on the original's size, or the processor would change the prepared form again",
    "count": "the request has more images than are prepared for one request",
    "own_options": "its part, or the request, sets its own processing options",
    "place": "it is not in a part of a chat or response, the places where it could be replaced",
    "transparent": "the engine's settings or version decide what is put behind it",
    "format": "it is in a format that is not decoded here",
    "unknown_format": "its format is not known here",
    "base64": "its base64 text is damaged",
    "empty": "it is empty",
    "broken": "it is cut off or damaged",
    "aspect": "the model's processor does not accept its shape",
    "too_large": "it has more bytes than --image-max-bytes",
    "too_many_pixels": "it has more pixels than --image-max-pixels",
    "too_long": "one of its sides is too long",
    "too_many_scans": "it is a progressive JPEG with so many scans that decoding takes seconds",
    "too_many_parts": "it has so many chunks, blocks, strips or run lengths that decoding takes seconds",
    "deadline": "a worker did not finish it in time",
    "failed": "its worker died, or needed more memory than one image may use",
    "workers_busy": "no image worker was free in time",
    "workers_away": "no image worker is available: they are starting, or cannot be started",
    "shm_full": "there is no room in shared memory",
    "refused": "the engine refused a prepared image and accepted the original",
}
PASS_REASONS: Final[Mapping[str, str]] = {**IMAGE_REASONS, **ENGINE_REASONS}


def of_refusal(code: str) -> str:
    """The reason for which an image passes that `/v1/preprocess` would refuse with this code."""
    return "format" if code == "image_unsupported" else code.removeprefix("image_")
