"""The folders of vLLM's plug-in in the state directory."""

from __future__ import annotations

from typing import Final

PLUGIN_FOLDER: Final = "vllm-plugin"  # what PYTHONPATH names
STEPS_FOLDER: Final = "vllm-steps"  # where an engine of the sidecar's user writes its steps
