"""Compiles the stub as the library that NVML's users look for."""

from __future__ import annotations

import subprocess
from pathlib import Path

SOURCE = Path(__file__).with_name("nvml_stub.c")


def build(gcc: Path, into: Path, *flags: str) -> Path:
    """The folder `into`, made if need be, with the library in it."""
    into.mkdir(exist_ok=True)
    target = into / "libnvidia-ml.so.1"
    subprocess.run(
        [gcc, "-shared", "-fPIC", "-Wall", "-Wextra", "-Werror", *flags, "-o", target, SOURCE], check=True, timeout=60
    )
    return into
