"""Image workers and bodies with images, for tests of the relay."""

from __future__ import annotations

import asyncio
from typing import Any

from sidecar.errors import BadImage, ImagesBusy
from sidecar.images.vllm_plugin import Handoffs


class Prepared:
    """What image work returns, for a test."""

    media_type, tokens, content_hash, format, outcome, seconds = "image/bmp", 77, "h0", "png", "ok", 0.5
    stages, bytes_in, bytes_out, url, reason, parameter = (("decode", 0.1),), 3, 9, "", "", ""

    def __init__(self, base64: bytes | None) -> None:
        self.base64 = base64


class Workers:
    """Test image workers: the base64 text selects the answer."""

    def __init__(self) -> None:
        self.gpu = False
        self.handed_over: list[bool] = []
        self.running = 0
        self.started = asyncio.Event()
        self.cancelled = asyncio.Event()

    def allow_gpu(self, allowed: bool) -> None:
        self.gpu = allowed

    async def hand_over(
        self,
        data: memoryview,
        where: str,
        tenant: str,
        request: str,
        handoffs: Handoffs,
        is_base64: bool,
        max_small_chars: int,
    ) -> Prepared:
        self.handed_over.append(handoffs.pixels)
        match bytes(data):
            case b"BAD/":
                raise BadImage(f"{where} is no image", "image_unknown_format")
            case b"DIES":
                raise BadImage(f"{where} could not be decoded", "image_failed")
            case b"SCAN":
                raise BadImage(f"{where} has too many scans", "image_too_many_scans")
            case b"BUSY":
                raise ImagesBusy("all image workers are busy")
            case b"HANG":
                self.started.set()
                try:
                    await asyncio.Event().wait()
                finally:
                    self.cancelled.set()
            case b"PASS":
                return Prepared(None)
        return Prepared(b"Qk0=")

    def passed(self, data: memoryview, reason: str, is_base64: bool = True) -> Prepared:
        came = Prepared(None)
        came.outcome, came.reason = "passed", reason
        return came

    def release(self, request: str) -> None:
        """Nothing was handed over."""


def pictures(*base64: str, **more: Any) -> dict[str, Any]:
    parts = [{"type": "image_url", "image_url": {"url": f"data:image/png;base64,{b}"}, **more} for b in base64]
    return {"model": "m", "messages": [{"role": "user", "content": parts}]}
