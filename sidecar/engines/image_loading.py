"""Which engines open and resize an image as the sidecar does: literal rows. To all others images pass as they came.

Rules: the first row that fits decides; where none fits, or a value is not known, images pass. "Imitate" is written only
where tests/vllm/test_image_loading.py has compared pixels with that engine's own loading code and the Hugging Face
processor behind it; "pass" where that code was seen to differ, or was not run. A vLLM that is newer than the newest one
tested passes until its row is.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Final

ENGINE_UNKNOWN: Final = "engine_unknown"
SIZE_UNCHECKED: Final = "size_unchecked"
SIZE_DIFFERS: Final = "size_differs"
RUST_FRONT_END: Final = "rust_front_end"

# Why images pass to a whole engine, in words.
ENGINE_REASONS: Final[Mapping[str, str]] = {
    ENGINE_UNKNOWN: "the engine, or its version, is not known yet, or not one whose image loading was compared",
    "engine_version": "this version loads images differently, or has not been compared",
    "engine_loading": "the engine opens or resizes images differently, or has not been compared",
    "mistral_tokenizer": "the model's files make vLLM choose Mistral's tokenizer, which resizes differently",
    "architecture": "the engine runs this architecture with code that has not been compared",
    RUST_FRONT_END: "vLLM's Rust front end does not read the form in which prepared images are sent",
    SIZE_UNCHECKED: "the engine has not yet been seen to resize as the model's files say",
    SIZE_DIFFERS: "the engine was started with other image sizes than the model's files say",
}

Version = tuple[int, ...]
ANY_VERSION: Final = (1 << 30,)  # before this

# Files by which vLLM chooses Mistral's tokenizer (tokenizers/registry.py). It also looks for consolidated weights, and
# can be started with --tokenizer-mode mistral without; that is not visible from outside.
MISTRAL_FILES: Final = re.compile(r"tekken\.json|tokenizer\.model\.v\w+")


@dataclass(frozen=True, slots=True)
class ImageLoadingRow:
    """How one kind of engine loads images. `reason`: why images pass; "": the sidecar imitates it.

    Versions: from `since`, before `before`. "*" stands for any. `is_checked`: a canary image compares sizes first.
    """

    kind: str
    since: Version = ()
    before: Version = ANY_VERSION
    tokenizer: str = "*"  # "hf", "mistral"
    architecture: str = "*"
    processor: str = "*"
    reason: str = ""
    is_checked: bool = True

    @property
    def versions(self) -> str:
        """The versions, as text."""
        since = [f">={_text(self.since)}"] if self.since else []
        before = [f"<{_text(self.before)}"] if self.before < ANY_VERSION else []
        return ",".join(since + before) or "*"


ROWS: Final = (
    # The scripted engine has no pixels; it stands for a vLLM in tests.
    ImageLoadingRow("scripted", is_checked=False),
    # No EXIF turn, and transparent parts lose their alpha (multimodal/image.py, 0.23.0).
    ImageLoadingRow("vllm", before=(0, 24), reason="engine_version"),
    # mistral_common: cv2, bicubic, without antialiasing.
    ImageLoadingRow("vllm", tokenizer="mistral", reason="mistral_tokenizer"),
    # Not among vLLM's own models (model_executor/models/registry.py, 0.32).
    ImageLoadingRow("vllm", architecture="VipLlavaForConditionalGeneration", reason="architecture"),
    ImageLoadingRow("vllm", since=(0, 24), before=(0, 34), tokenizer="hf"),
    ImageLoadingRow("vllm", since=(0, 34), reason="engine_version"),
    # No EXIF turn, alpha is dropped, and nvJPEG decodes on CUDA (srt/utils/common.py, 0.5.23).
    ImageLoadingRow("sglang", reason="engine_loading"),
    # stb_image reads no EXIF and drops alpha; a resize of its own (tools/mtmd/clip.cpp).
    ImageLoadingRow("llamacpp", reason="engine_loading"),
    ImageLoadingRow("ollama", reason="engine_loading"),
    # Not compared.
    ImageLoadingRow("tgi", reason="engine_loading"),
    ImageLoadingRow("tei", reason="engine_loading"),
)
UNKNOWN_ROW: Final = ImageLoadingRow("*", reason=ENGINE_UNKNOWN)


@dataclass(frozen=True, slots=True)
class ImageModel:
    """What a model's directory says of how an engine loads its images; "" where it says nothing."""

    tokenizer: str = ""  # "hf", "mistral"
    architecture: str = ""
    processor: str = ""


def tokenizer_mode(names: Iterable[str]) -> str:
    """Which tokenizer vLLM may choose for a model with these files."""
    return "mistral" if any(MISTRAL_FILES.fullmatch(name) for name in names) else "hf"


def row_of(kind: str, version: str, model: ImageModel) -> ImageLoadingRow:
    """The row for an engine that serves a model."""
    found = parse_version(version)
    return next((row for row in ROWS if _fits(row, kind, found, model)), UNKNOWN_ROW)


def parse_version(text: str) -> Version:
    """The numbers that a version begins with, at most three; () if it has none."""
    match = re.match(r"v?(\d{1,6})\.(\d{1,6})(?:\.(\d{1,6}))?", text)
    return tuple(int(number) for number in match.groups() if number is not None) if match else ()


def _fits(row: ImageLoadingRow, kind: str, version: Version, model: ImageModel) -> bool:
    if row.kind != kind or not all(
        wanted in ("*", given)
        for wanted, given in (
            (row.tokenizer, model.tokenizer),
            (row.architecture, model.architecture),
            (row.processor, model.processor),
        )
    ):
        return False
    if not row.since and row.before == ANY_VERSION:
        return True
    return bool(version) and row.since <= version < row.before


def _text(version: Version) -> str:
    return ".".join(map(str, version))
