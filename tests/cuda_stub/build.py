"""Compiles the stub as the library that CUDA's users look for."""

from __future__ import annotations

import subprocess
from pathlib import Path

SOURCE = Path(__file__).with_name("cuda_stub.c")


def build(gcc: Path, into: Path) -> Path:
    """The folder `into`, made if need be, with the library in it."""
    into.mkdir(exist_ok=True)
    target = into / "libcuda.so.1"
    flags = ("-O2", "-shared", "-fPIC", "-Wall", "-Wextra", "-Werror")
    subprocess.run([gcc, *flags, "-o", target, SOURCE], check=True, timeout=60)
    return into
