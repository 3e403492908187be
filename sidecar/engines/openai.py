"""Any OpenAI-compatible server: nothing is assumed but the API itself. Silence is judged by its answers alone.

Its /health might generate a token, as SGLang's does; the model list never does, and a refusal of it is an answer too.
"""

from __future__ import annotations

from typing import Final

from sidecar.engines.engine_type import CHAT, COMPLETIONS, EMBEDDINGS, EngineKind

OPENAI: Final = EngineKind("openai", canary_paths=(CHAT, COMPLETIONS, EMBEDDINGS), tells_usage=False)
