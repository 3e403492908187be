"""The GPU kernels' machine code: an archive that compile_cubins.py makes from gpu.py, and which part fits a device.

Rules: standard library only. The archive's manifest has a hash of the sources; a test holds it against them.
"""

from __future__ import annotations

import hashlib
import json
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Final

PATH: Final = Path(__file__).with_name("cubins.zip")
MANIFEST: Final = "manifest.json"
SOURCES: Final = ("gpu.py", "ragged.py", "gpu_jpeg.py", "ragged_jpeg.py", "jpeg_reference.py")
# Compute capabilities without the point. Code runs on devices of the same generation with an equal or higher minor
# number: that of 8.0 on 8.6 too, of 10.0 on 10.3, of 12.0 on 12.1.
ARCHITECTURES: Final = (80, 89, 90, 100, 120)
ACROSS: Final = "across"
INVERSE, COLOUR = "inverse", "colour"
DOWN: Final = {1: "down_1", 2: "down_2", 4: "down_4"}  # by the bytes of a value
NAMES: Final = (ACROSS, *DOWN.values(), INVERSE, COLOUR)


@dataclass(frozen=True, slots=True)
class Kernel:
    """One kernel's machine code. `parameters` counts all of them; those after ours are Triton's own, null for us."""

    code: bytes
    parameters: int
    threads: int
    shared_bytes: int


def architecture_for(major: int, minor: int) -> int | None:
    """The shipped architecture that runs on a device of this compute capability; None if none does."""
    fitting = [a for a in ARCHITECTURES if a // 10 == major and a % 10 <= minor]
    return max(fitting, default=None)


def source_hash() -> str:
    """SHA-256 of the sources of the kernels."""
    digest = hashlib.sha256()
    for name in SOURCES:
        digest.update(Path(__file__).with_name(name).read_bytes())
    return digest.hexdigest()


def entry(name: str, architecture: int) -> str:
    """A kernel's name in the archive."""
    return f"sm_{architecture}/{name}.cubin"


class Archive:
    """The shipped archive, or another. Raises OSError, zipfile.BadZipFile or KeyError if it is not whole."""

    def __init__(self, file: Path | BinaryIO = PATH) -> None:
        self._zip = zipfile.ZipFile(file)
        self.manifest: dict[str, Any] = json.loads(self._zip.read(MANIFEST))

    def code(self, name: str, architecture: int) -> bytes:
        """Machine code of one kernel."""
        return self._zip.read(entry(name, architecture))

    def kernels(self, architecture: int) -> dict[str, Kernel]:
        """All kernels of one architecture, by name."""
        made = {}
        for name in NAMES:
            facts = self.manifest["kernels"][name][str(architecture)]
            made[name] = Kernel(
                self.code(name, architecture),
                facts["parameters"],
                facts["threads"],
                facts["shared_bytes"],
            )
        return made
