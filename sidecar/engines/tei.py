"""Text Embeddings Inference 1.9: router/src/http/server.rs, router/src/lib.rs, core/src/queue.rs.

- Series: a batch is counted when it is taken from the queue, a request when it is answered. It has no gauge of what
  runs, no KV cache, no start time and no ranks. A series appears when it is used first.
- It has no model list and serves one model; requests name none. /info identifies it; /metrics needs no key.
- /health asks the model, so it can hang with the engine; /info needs the router only.
- What its model cannot do is answered 424, as a failed inference is. It has no priorities, no sleep and no pause.
"""

from __future__ import annotations

from typing import Final

from sidecar.engines.canary_rows import TEI_EMBED, TEI_PREDICT, TEI_RERANK, TEI_SPARSE
from sidecar.engines.engine_type import EngineKind, KindMark, plain

TEI: Final = EngineKind(
    "tei",
    plain(
        waiting="te_queue_size",
        prompt_tokens="te_batch_next_tokens_sum",
        finished="te_request_success",
        iterations="te_batch_next_size_count",
    ),
    contact_path="/info",
    canary_model="tei",  # no request names it
    canaries=(TEI_EMBED, TEI_RERANK, TEI_PREDICT, TEI_SPARSE),
    model_paths=(),
    identity_paths=("/info",),
    prefix="te_",
    marks=(KindMark("/info", {"model_type": None, "tokenization_workers": None}),),
)
