"""Ollama: server/routes.go, server/sched.go, api/types.go, 2026.

- It has no metrics page, no priorities and no pause. /v1/models lists all models that it could load; /api/ps those that
  are loaded, with the context that each was loaded with.
- A request with another context than the loaded one makes it load the model again (sched.go, needsReload): a canary
  asks for the one that is loaded. A user who chooses num_gpu, num_thread or num_batch is not seen there.
- A request restarts the model's time to live, and its prompt takes the place of a user's in the cache of a slot, of
  which there is one by default (OLLAMA_NUM_PARALLEL). So canaries are sent only into a suspicion.
"""

from __future__ import annotations

from typing import Final

from sidecar.engines.canary_rows import OLLAMA_EMBED, OLLAMA_GENERATE
from sidecar.engines.engine_type import MODELS, EngineKind, KindMark

LOADED_MODELS: Final = "/api/ps"

OLLAMA: Final = EngineKind(
    "ollama",
    contact_path="/api/version",
    canaries=(OLLAMA_GENERATE, OLLAMA_EMBED),
    canary_disturbs=True,
    reports_usage=False,
    model_paths=(LOADED_MODELS,),
    identity_paths=(MODELS, "/api/version"),
    marks=(KindMark(LOADED_MODELS, {"models": None}),),
)
