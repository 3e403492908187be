"""Text Generation Inference 3.3: router/src/server.rs, backends/v3/src/backend.rs and queue.rs.

- Series: token counts are sums of per-request histograms: they move when a request ends. Only tgi_batch_inference_count
  moves with each forward pass. It has no KV gauge, no start time and no ranks.
- /v1/models names the model itself as its owner, so /info identifies the engine. Both are open even with an API key.
- /health may query the shards, so it can hang with them; /info needs the router only.
- `model` names a LoRA adapter, except "tgi" (router/src/server.rs), which canaries use.
- It has no priorities, no sleep and no pause.
"""

from __future__ import annotations

from typing import Final

from sidecar.engines.canary_rows import CHAT, COMPLETIONS
from sidecar.engines.engine_type import EngineKind, KindMark, Series, plain

TGI: Final = EngineKind(
    "tgi",
    {
        **plain(
            running="tgi_batch_current_size",
            waiting="tgi_queue_size",
            prompt_tokens="tgi_request_input_length_sum",
            finished="tgi_request_success",
            iterations="tgi_batch_inference_count",
        ),
        "generation_tokens": (Series("tgi_request_generated_tokens_sum", at_end=True),),
    },
    contact_path="/info",
    is_fcfs=True,
    canary_model="tgi",
    canaries=(COMPLETIONS, CHAT),
    identity_paths=("/info",),
    prefix="tgi_",
    marks=(KindMark("/info", {"router": "text-generation-router"}),),
)
