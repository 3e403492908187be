"""Any OpenAI-compatible server: only the API itself is assumed. Silence is judged by its responses alone.

Its /health might generate a token, as SGLang's does. The model list never does, and its rejection is a response, too.
"""

from __future__ import annotations

from typing import Final

from sidecar.engines.canary_rows import (
    BARE_EMBEDDINGS,
    BARE_RERANK,
    CHAT,
    CLASSIFY,
    COMPLETIONS,
    EMBEDDINGS,
    RERANK,
    TRANSCRIPTION,
)
from sidecar.engines.engine_type import MODELS, EngineKind

OPENAI: Final = EngineKind(
    "openai",
    canaries=(CHAT, COMPLETIONS, EMBEDDINGS, RERANK, TRANSCRIPTION, BARE_EMBEDDINGS, BARE_RERANK, CLASSIFY),
    reports_usage=False,
    model_paths=(MODELS, "/models"),  # Infinity has the second only
)
