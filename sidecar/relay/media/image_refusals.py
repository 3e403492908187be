"""Whether the engine gets prepared images: what its load report states, and how it answers one.

Rules: before the first load report nothing is known of the engine, and images pass. A prepared body that is larger
than any that the engine accepted is a trial, and the original is kept until the answer begins. If a refusal mentions
formats or size, the engine gets the original, once. If it accepts that, images pass unprepared from then on, until the
engine is another process. The text of a refusal is matched and never logged.
"""

from __future__ import annotations

import logging
import re
from typing import Final

from sidecar.engines.image_loading import ENGINE_UNKNOWN
from sidecar.events import LoadReport
from sidecar.relay import response
from sidecar.relay.engine_io import BodyPayload
from sidecar.relay.http.engine import Answer, EngineError

# How engines refuse an image format that they do not know: its name, the errors of Pillow, of Rust's `image` and of
# stb, media types, URLs. A false match costs one more attempt.
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
        self._reason = ENGINE_UNKNOWN  # why the engine gets none, by its load report
        self._refused = False  # it refused one, and accepted the original
        self._accepted: dict[str, int] = {}  # by form: bytes of the largest prepared body that it accepted
        self._process: int | None = None

    @property
    def passing(self) -> str:
        """Why images pass unprepared; "" if they need not."""
        return "refused" if self._refused else self._reason

    def is_trial(self, form: str, size: int) -> bool:
        """Whether a prepared body in this form, of `size` bytes, is a trial, whose original is kept."""
        return size > self._accepted.get(form, -1)

    def on_load_report(self, load: LoadReport) -> None:
        """Take from a load report which process the engine is, and whether its kind takes prepared images."""
        self._reason = load.images_pass
        if load.process != self._process:
            if self._refused:
                _log.info("the engine restarted: it gets prepared images again")
            self._process, self._refused, self._accepted = load.process, False, {}

    async def is_refusal(self, answer: Answer, data: BodyPayload) -> bool:
        """Whether `answer` refuses `data` for the form of its images; an acceptance is remembered."""
        if data.original is None:
            return False
        if answer.ok:
            self._accepted[data.form] = max(data.size, self._accepted.get(data.form, 0))
            return False
        if answer.status in (413, 415):  # too large, media type
            return True
        if response.is_stream(answer) or not response.can_change(answer):
            return False
        try:
            return _FORMAT_REFUSAL.search(await answer.body.peek()) is not None
        except EngineError:
            return False  # the next read raises it

    def on_original(self, status: int, answer: Answer) -> None:
        """The engine answered the original, after a refusal with `status`."""
        if answer.ok and not self._refused:
            self._refused = True
            _log.warning(
                "engine answered %d to a prepared image and accepted the original: images pass unprepared until it "
                "restarts; --images off avoids the trial",
                status,
            )
