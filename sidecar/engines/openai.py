"""Any OpenAI-compatible server: only the API itself is assumed. Silence is judged by its responses alone.

Its /health might generate a token, as SGLang's does. The model list never does, and its rejection is a response, too.
"""

from __future__ import annotations

from typing import Final

from sidecar.engines.engine_type import CHAT, COMPLETIONS, EMBEDDINGS, EngineKind

OPENAI: Final = EngineKind("openai", canary_paths=(CHAT, COMPLETIONS, EMBEDDINGS), reports_usage=False)
