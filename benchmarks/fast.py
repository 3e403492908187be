"""`--images-decode fast` against the exact way, one core: how far off its pixels are, and what it saves.

    python benchmarks/fast.py [--rounds N] [--photos FOLDER] [--margins] [--write]

Rules: as in images.py. Pixels are compared as the model would get them, resized by our kernel. `--photos` adds the JPEGs of a folder
(those turned by EXIF 2 to 8 are the same pictures and left out where their name ends so); `--margins` prints instead how the error
depends on how much larger than its target an image stays, which is what shrunk.MARGIN was chosen by.
"""

from __future__ import annotations

import argparse
import datetime
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

import numpy as np
import PIL
from one_core import LIMITS, cpu_name, decoded, measure, pin

from sidecar.images import file_headers as headers
from sidecar.images.worker import fast_jpeg as shrunk
from sidecar.images.worker.decode import decode
from sidecar.images.worker.tensors import ppm, resize
from sidecar.kernels import families, fused
from sidecar.kernels.grid import BICUBIC, ProcessorSpec
from sidecar.tools import synthetic_photos as photos

SIZES: Final = {"720p": (1280, 720), "1080p": (1920, 1080), "12 MP": (4000, 3000)}
# what is made of an image -> its processor
TARGETS: Final[dict[str, dict[str, Any]]] = {
    "Qwen2-VL, 1003520 pixels": {"image_processor_type": "Qwen2VLImageProcessor", "max_pixels": 1_003_520},
    "Qwen2-VL, 448 * 448 pixels": {"image_processor_type": "Qwen2VLImageProcessor", "max_pixels": 448 * 448},
    "LLaVA-1.5, 336 * 336": {"image_processor_type": "CLIPImageProcessor", "size": {"shortest_edge": 336}, "crop_size": 336},
}  # fmt: skip
MARGINS: Final = (1.0, 1.25, 1.5, 1.75, 2.0, 3.0)


def pixels(data: bytes, spec: ProcessorSpec) -> tuple[Any, int]:
    """The resized image, (height, width, 3), and by how much it was shrunk before."""
    header = headers.read(data)
    assert header is not None
    small = shrunk.decode(data, header, LIMITS, spec) if spec.fast else None
    source = small[0] if small else decode(data, header, LIMITS)
    own = small[1] if small else tuple(source.shape[-2:])
    return resize(source, spec.geometry(*own), spec), own[0] // source.shape[-2]


def error(one: Any, other: Any) -> str:
    """Table cells: share of pixels that differ, mean and largest difference in grey levels, PSNR."""
    apart = np.abs(one.astype(np.int16) - other)
    mean_square = float((apart.astype(np.float64) ** 2).mean())
    decibels = f"{10 * np.log10(255**2 / mean_square):.1f}" if mean_square else "-"
    return f"{(apart.max(axis=-1) > 0).mean():.0%} | {apart.mean():.2f} | {apart.max()} | {decibels}"


def line(name: str, data: bytes, label: str, exact: ProcessorSpec, rounds: int) -> str:
    """One row of the table."""
    fast = replace(exact, fast=True)
    (one, _), (other, by) = pixels(data, exact), pixels(data, fast)
    if by == 1:
        return f"| {name} | {label} | not shrunk | 0% | 0 | 0 | - | - | - | - |"
    took = measure({w: lambda s=s: ppm(pixels(data, s)[0]) for w, s in (("exact", exact), ("fast", fast))}, rounds)
    saved = took["exact"] - took["fast"]
    off = error(*(image.permute(1, 2, 0).numpy() for image in (one, other)))
    return f"| {name} | {label} | 1/{by} | {off} | {took['exact']:.1f} | {took['fast']:.1f} | {saved:.1f} ({saved / took['exact']:.0%}) |"


def pictures(folder: str) -> dict[str, bytes]:
    """Name -> JPEG."""
    made = {name: photos.photo(*size, seed=1) for name, size in SIZES.items()}
    found = sorted(Path(folder).glob("*.jpg")) if folder else []
    return made | {
        file.stem: file.read_bytes() for file in found if file.stem[-2:] not in {f"_{n}" for n in range(2, 9)}
    }


def report(files: dict[str, bytes], rounds: int) -> str:
    """The whole table as Markdown."""
    specs = {label: families.from_config(config) for label, config in TARGETS.items()}
    lines = [
        f"{cpu_name()}, one core, {datetime.datetime.now(datetime.UTC):%Y-%m-%d}; Pillow {PIL.__version__}, our kernel {fused.level()}; "
        f"from the file's bytes to a PPM, median of {rounds} interleaved rounds, ms of CPU.",
        "",
        "| JPEG | becomes | decoded at | pixels that differ | mean, levels | max, levels | PSNR, dB | exact, ms | fast, ms | saved, ms |",
        "|---" * 10 + "|",
        *(line(name, data, label, spec, rounds) for name, data in files.items() for label, spec in specs.items() if spec is not None),
    ]  # fmt: skip
    return "\n".join(lines) + "\n"


def margins(files: dict[str, bytes]) -> str:
    """PSNR and largest difference by margin, as Markdown."""
    lines = [
        "| JPEG | decoded at | " + " | ".join(f"{m:g} x" for m in MARGINS) + " |",
        "|---" * (len(MARGINS) + 2) + "|",
    ]
    for name, data in files.items():
        whole = np.ascontiguousarray(decoded(data).permute(1, 2, 0).numpy())
        header = headers.read(data)
        assert header is not None
        for by in (b for b in shrunk.BY if not any(side % b for side in whole.shape[:2])):
            small = shrunk.pillow(data, header, by)
            assert small is not None
            rows = np.ascontiguousarray(small.permute(1, 2, 0).numpy())
            sizes = [tuple(int(side / m) for side in rows.shape[:2]) for m in MARGINS]
            cells = [
                error(fused.resize(rows, *size, BICUBIC), fused.resize(whole, *size, BICUBIC)).split(" | ")
                for size in sizes
            ]
            lines.append(f"| {name} | 1/{by} | " + " | ".join(f"{c[3]} dB, {c[2]}" for c in cells) + " |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--photos", default="", metavar="FOLDER")
    parser.add_argument("--margins", action="store_true")
    parser.add_argument("--write", action="store_true")
    chosen = parser.parse_args()
    files = pictures(chosen.photos)
    pin()
    text = margins(files) if chosen.margins else report(files, chosen.rounds)
    print(text)
    if chosen.write:
        what = "fast-margins" if chosen.margins else "fast"
        page = f"# Fast decoding, {datetime.date.today()}: {cpu_name()}\n\n{text}"
        (Path(__file__).parent / "results" / f"{what}-{datetime.date.today()}.md").write_text(page)


if __name__ == "__main__":
    main()
