"""Whether the engine gets prepared images: what it is (engines/image_loading.py), and what its image canary showed.

Until both are known, and again for each process of the engine, images pass as they came.
"""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Final

import aiohttp

from sidecar.engines.image_loading import (
    ENGINE_REASONS,
    ENGINE_UNKNOWN,
    RUST_FRONT_END,
    SIZE_UNCHECKED,
    ImageModel,
    row_of,
    tokenizer_mode,
)
from sidecar.kernels import families
from sidecar.kernels.grid import ProcessorSpec
from sidecar.readings import EngineIdentity
from sidecar.signals.image_canary import check_images

MAX_CONFIG_BYTES: Final = 16 << 20
# Between image canaries that had no answer: doubles up to the latter.
RETRY_INTERVAL_S: Final = 5.0
MAX_RETRY_INTERVAL_S: Final = 300.0

_log = logging.getLogger(__name__)


class ImageSupport:
    """Why images pass unprepared to the engine, as far as it is known: `reason` is a code of ENGINE_REASONS, or ""."""

    def __init__(self, directory: str) -> None:
        self._directory = directory
        self.reason = ENGINE_UNKNOWN

    def forget(self) -> None:
        """The engine is another process."""
        self.reason = ENGINE_UNKNOWN

    async def run(
        self,
        session: aiohttp.ClientSession,
        engine: str,
        headers: dict[str, str],
        model: str,
        kind: str,
        identity: EngineIdentity,
        resting: Callable[[], str],
    ) -> None:
        """Find out for one process of the engine."""
        files, spec = await asyncio.to_thread(read_model, self._directory)
        reason, needs_check = engine_reason(kind, identity, files)
        if not needs_check or spec is None or not spec.inline:  # nothing is prepared inline then
            self._decide(reason, "")
            return
        pause = RETRY_INTERVAL_S
        while True:
            if not resting():  # it would be woken, or would not answer
                check = await check_images(session, engine, headers, model or next(iter(identity.models), ""), spec)
                self._decide(check.reason, check.detail)
                if check.is_final:
                    return
            await asyncio.sleep(pause)
            pause = RETRY_INTERVAL_S if resting() else min(2 * pause, MAX_RETRY_INTERVAL_S)

    def _decide(self, reason: str, detail: str) -> None:
        """Log a new reason, and each image canary that was answered."""
        if reason != self.reason:
            self.reason = reason
            if reason:
                level = logging.INFO if reason == SIZE_UNCHECKED else logging.WARNING
                _log.log(level, "images pass as they came: %s", text_of(reason, detail))
            else:
                _log.info("images are prepared: the engine opens and resizes them as the sidecar does")


def engine_reason(kind: str, identity: EngineIdentity, model: ImageModel) -> tuple[str, bool]:
    """Why images pass to this engine, or ""; and whether an image canary must show that sizes agree."""
    if not identity.prepared:
        return RUST_FRONT_END, False
    row = row_of(kind, identity.engine, model)
    return row.reason, row.is_checked and not row.reason


def text_of(reason: str, detail: str = "") -> str:
    """A reason in words."""
    return ENGINE_REASONS[reason] + (f" ({detail})" if detail else "")


def read_model(directory: str) -> tuple[ImageModel, ProcessorSpec | None]:
    """What a model's directory says of image loading; nothing if it cannot be read."""
    try:
        names = [path.name for path in Path(directory).iterdir()]
    except OSError:
        return ImageModel(), None
    architectures = _read(Path(directory) / "config.json").get("architectures")
    processor = _read(Path(directory) / "preprocessor_config.json").get("image_processor_type")
    architecture = architectures[0] if isinstance(architectures, list) and architectures else ""
    return ImageModel(tokenizer_mode(names), str(architecture), str(processor or "")), families.from_dir(directory)


def _read(path: Path) -> dict[str, object]:
    try:
        with path.open("rb") as file:
            content = json.loads(file.read(MAX_CONFIG_BYTES))
    except (OSError, ValueError, RecursionError):
        return {}
    return content if isinstance(content, dict) else {}
