"""Decoders of one image on one core: simplejpeg, Pillow and torchvision, which give the same pixels.

    python benchmarks/decoders.py [--rounds N] [--write]

Rules: as in images.py: one core and one thread, the decoders of a file alternate in every round, freed memory is kept,
and nothing is timed that does not give Pillow's pixels. `--write` puts the table into benchmarks/results/.
"""

from __future__ import annotations

import argparse
import datetime
import io
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import PIL
import simplejpeg
import torchvision
from one_core import cpu_name, measure, pin
from PIL import Image, features

from sidecar.tools import synthetic_photos
from tests.images import by_torch

SIZES = {"720p": (1280, 720), "1080p": (1920, 1080), "12 MP": (4000, 3000)}
FILES: dict[str, tuple[str, dict[str, Any]]] = {
    "JPEG 4:2:0": ("JPEG", {"quality": 90}),
    "JPEG 4:4:4 progressive": ("JPEG", {"quality": 90, "subsampling": 0, "progressive": True}),
    "WebP, lossy": ("WEBP", {"quality": 80, "method": 2}),
}
SIMPLEJPEG, PILLOW, TORCHVISION = "simplejpeg", "Pillow", "torchvision"


def by_pillow(data: bytes) -> Any:
    """As decode.py does."""
    image = Image.open(io.BytesIO(data))
    image.load()
    return np.asarray(image if image.mode == "RGB" else image.convert("RGB"))


def decoders(data: bytes, format: str) -> dict[str, Callable[[], Any]]:
    """The decoders of one file."""
    todo: dict[str, Callable[[], Any]] = {
        PILLOW: lambda: by_pillow(data),
        TORCHVISION: lambda: by_torch.decode(data, format.lower()),
    }
    if format == "JPEG":
        todo[SIMPLEJPEG] = lambda: simplejpeg.decode_jpeg(data, "RGB", fastdct=False, fastupsample=False)
    wanted = todo[PILLOW]()
    assert np.array_equal(by_torch.rows(todo[TORCHVISION]()), wanted), "not exact: nothing is timed"
    assert SIMPLEJPEG not in todo or np.array_equal(todo[SIMPLEJPEG](), wanted), "not exact: nothing is timed"
    return todo


def report(rounds: int) -> str:
    """The table as Markdown."""
    lines = [
        f"# Decoders, one core: {cpu_name()}, {datetime.datetime.now(datetime.UTC):%Y-%m-%d}",
        "",
        f"simplejpeg {simplejpeg.__version__}; Pillow {PIL.__version__}, its libjpeg-turbo "
        f"{features.version('libjpeg_turbo')}; torchvision {torchvision.__version__}; ms of CPU, median of {rounds} "
        "interleaved rounds.",
        "",
        f"| size | file | {SIMPLEJPEG} | {PILLOW} | {TORCHVISION} |",
        "|---|---|---|---|---|",
    ]
    for size, (width, height) in SIZES.items():
        pixels = Image.fromarray(synthetic_photos.pixels(width, height, 1))
        for name, (format, options) in FILES.items():
            file = io.BytesIO()
            pixels.save(file, format, **options)
            ms = measure(decoders(file.getvalue(), format), rounds)
            cells = (f"{ms[key]:.1f}" if key in ms else "" for key in (SIMPLEJPEG, PILLOW, TORCHVISION))
            lines.append(f"| {size} | {name} | {' | '.join(cells)} |")
    return "\n".join([*lines, ""])


def main() -> None:
    """Print the table; write it where asked."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--write", action="store_true")
    chosen = parser.parse_args()
    pin()
    text = report(chosen.rounds)
    print(text)
    if chosen.write:
        slug = re.sub(r"[^a-z0-9]+", "-", cpu_name().lower()).strip("-")
        folder = Path(__file__).parent / "results"
        (folder / f"decoders-{datetime.datetime.now(datetime.UTC):%Y-%m-%d}-{slug}.md").write_text(text)


if __name__ == "__main__":
    main()
