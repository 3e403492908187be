"""Whether the engine takes prepared images: what it says of itself, and what it answers to one.

Rules: a prepared body that is larger than any that the engine took is a trial: the one as it came is kept until the
answer begins. A refusal that speaks of formats, or of size, gets that body, once; where it fares better, images pass
from then on, until the engine is another process. The text of a refusal is looked at and never logged.
"""

from __future__ import annotations

import logging
import re
from typing import Final

import aiohttp

from sidecar.events import LoadReport
from sidecar.relay import client_io, response
from sidecar.relay.engine_io import BodyPayload

_TOO_LARGE_STATUS, _MEDIA_TYPE_STATUS = 413, 415
# What engines say of a picture in a form that they do not know: its name, Pillow's words, those of Rust's `image` and of
# stb, media types, URLs. A match that means something else costs one more attempt.
_FORMAT_REFUSAL: Final = re.compile(
    rb"\bp[bgpn]m\b|portable.?(any|pix)map|netpbm|cannot identify image|unidentifiedimage"
    rb"|\b(image|media|mime|content)[-_. ]?(format|type)|image.{0,80}\b(unsupported|not supported|invalid)"
    rb"|\b(unsupported|unknown|unrecogni[sz]ed|invalid).{0,40}image|(decod|load|identify|open|process)\w*.{0,40}image"
    rb"|sidecar-shm|\burl\b.{0,40}\bscheme",
    re.IGNORECASE | re.DOTALL,
)

_log = logging.getLogger(__name__)


class Refusals:
    """What one relay process knows of the engine that it sends prepared images to."""

    def __init__(self) -> None:
        self._takes_none = False  # by what it says of itself, the engine takes none
        self._refused = False  # it refused one, and took the original
        self._accepted: dict[str, int] = {}  # by form: bytes of the largest prepared body that it took
        self._process: int | None = None

    @property
    def passing(self) -> bool:
        """Whether images go on as they came."""
        return self._takes_none or self._refused

    def is_trial(self, form: str, size: int = 0) -> bool:
        """Whether a prepared body in this form, of so many bytes, is a trial, of which the original is kept."""
        return size > self._accepted.get(form, -1)

    def on_load_report(self, load: LoadReport) -> None:
        """A load report: which process the engine is, and what is known of its kind."""
        self._takes_none = not load.prepared
        if load.process != self._process:
            if self._refused:
                _log.info("the engine is another process: it gets prepared images again")
            self._process, self._refused, self._accepted = load.process, False, {}

    async def is_refusal(self, answer: aiohttp.ClientResponse, data: BodyPayload) -> bool:
        """Whether `answer` refuses `data` for the form of its images; what it says else is remembered."""
        if data.original is None:
            return False
        if answer.ok:
            self._accepted[data.form] = max(data.size or 0, self._accepted.get(data.form, 0))
            return False
        if answer.status in (_TOO_LARGE_STATUS, _MEDIA_TYPE_STATUS):
            return True
        if not (response.is_plain(answer) and response.is_short(answer)):
            return False
        try:
            return _FORMAT_REFUSAL.search(await answer.read()) is not None
        except client_io.ENGINE_ERRORS:
            return False  # its next reader finds out

    def on_original(self, status: int, answer: aiohttp.ClientResponse) -> None:
        """What came of the original, after a refusal with `status`."""
        if answer.ok and not self._refused:
            self._refused = True
            _log.warning(
                "the engine answered %d to a prepared image and took the original: images pass as they came from now on, "
                "until the engine is another process; --images off saves the trial",
                status,
            )
