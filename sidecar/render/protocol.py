"""The frames between a process and its render workers: all that a worker sees.

A frame is two lengths of four bytes, then a head (JSON) and a body. The first one brings the settings, each further one
a request to render.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

CHAT, COMPLETIONS = "chat", "completions"
PATHS: Final = {"/v1/chat/completions/render": CHAT, "/v1/completions/render": COMPLETIONS}
LENGTHS: Final = struct.Struct("<II")


@dataclass(frozen=True, slots=True)
class RenderSettings:
    """What a renderer is made from. `model` is a directory; `chat_template` a file, or "" for the model's own."""

    model: str
    chat_template: str = ""
    hash_algorithm: str = "blake3"


@dataclass(frozen=True, slots=True)
class RenderCall:
    """How one request is rendered, and for which engine.

    `engine_model`: the model as the engine's command line names it. `names`: those that requests may give it; none:
    any. `max_model_len`: 0 if it is not known. `layout`: with each image's format, final size, grid and tokens.
    `whole`: only if the answer equals the engine's in every member; else a prompt that is exact is enough.
    """

    api: str
    request_id: str = ""
    engine_model: str = ""
    names: Sequence[str] = ()
    max_model_len: int = 0
    layout: bool = False
    whole: bool = False


def frame(head: dict[str, Any], body: bytes) -> tuple[bytes, bytes]:
    """A frame in two pieces."""
    text = json.dumps(head).encode()
    return LENGTHS.pack(len(text), len(body)) + text, body
