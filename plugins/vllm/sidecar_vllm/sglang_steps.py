"""The steps of SGLang's scheduler, in the same file as vLLM's (steps.py), by SGLang's own plug-in hooks.

Rules: SGLang loads plug-ins in each scheduler process and calls the hook before each batch. Of the processes that share
a batch (tensor and pipeline parallel) one writes, or its tokens would count several times. The loop that finds nothing
to run is at rest, whatever waits for a grammar or a transfer.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

from sidecar_vllm import steps

# Versions whose scheduler is tested: tests/vllm/test_sglang_steps.py.
KNOWN_VERSIONS = ("0.5.23",)
SCHEDULER = "sglang.srt.managers.scheduler.Scheduler"


def register() -> None:
    """Have the scheduler write its steps. SGLang calls this in each of its processes. Never raises."""
    say = logging.getLogger("sglang").warning
    try:
        why = install(say)
    except Exception as e:  # noqa: BLE001 - what is raised here would be logged with a traceback in each process
        why = type(e).__name__
    if why:
        say(f"the inference sidecar sees no steps of this engine: {why}")


def install(say: Callable[[str], None], plugin: Path = steps.PLUGIN) -> str:
    """Register the hooks with SGLang. Returns why not, or ""."""
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType
    from sglang.version import __version__

    if not __version__.startswith(KNOWN_VERSIONS):
        return f"SGLang {__version__} is not known to this plug-in"
    writer = steps.StepWriter(plugin, say, count, lambda *_: True)

    def begin(scheduler: Any, batch: Any, *args: Any, **kwargs: Any) -> None:
        if is_first():
            writer.begin(scheduler, batch)

    def rest(scheduler: Any, *args: Any, **kwargs: Any) -> None:
        writer.rest(scheduler)

    HookRegistry.register(f"{SCHEDULER}.run_batch", begin, HookType.BEFORE)
    HookRegistry.register(f"{SCHEDULER}.on_idle", rest, HookType.BEFORE)
    return ""


@functools.cache
def is_first() -> bool:
    """Whether this process is the first of those that compute the same batch. Asked when it steps: before, no rank is
    known."""
    from sglang.srt.runtime_context import get_parallel

    place = get_parallel()
    return bool(place.pp_rank == 0 and place.attn_tp_rank == 0)


def count(scheduler: Any, batch: Any) -> tuple[int, int, int]:
    """Tokens of a batch, and requests that run and wait.

    A decode has a token for each of its requests; its `extend_num_tokens` is still that of the prefill before. So is
    that of a speculative one, which counts as an extension.
    """
    requests, mode = len(batch.reqs), batch.forward_mode
    joined = batch is scheduler.running_batch or mode.is_mixed()
    running = requests if joined else requests + len(scheduler.running_batch.reqs)
    tokens = batch.extend_num_tokens if mode.is_extend() and not mode.is_target_verify() else requests
    return tokens, running, len(scheduler.waiting_queue)
