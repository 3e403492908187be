"""Images on one core: the sidecar's chain against decoding alone and Hugging Face's processors, of all families.

    python benchmarks/images.py [--rounds N] [--models NAMES] [--write] [--pillow-simd PYTHON] [--no-families]

Sizes are those that the models' published settings allow.

Rules: one core (affinity and one thread). The chains of a size alternate in every round; a row is the median over the
rounds, so that noise affects all alike. Before anything is timed, the sidecar's tensors are compared with the
torchvision processor's, and must be equal. The kernel alone is compared with the bytes that it must read and write at
the speed of copying. `--pillow-simd` names the interpreter of an environment like this one with Pillow-SIMD instead of
Pillow; a process of it, on the same core, alternates with the rest. `--write` puts the table into benchmarks/results/.
"""

from __future__ import annotations

import argparse
import datetime
import io
import platform
import re
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import PIL
import torch
import torchvision
import transformers
from families import report as families_report
from one_core import DECODE, cpu_name, decoded, measure, pin, screenshot
from PIL import Image
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
from transformers.models.qwen2_vl.image_processing_qwen2_vl import Qwen2VLImageProcessor

from sidecar.images.worker.tensors import prepare, resized_ppm
from sidecar.kernels import families, fused
from sidecar.kernels.grid import PatchSpec
from sidecar.tools import synthetic_photos
from tests.images import by_torch

SCREENSHOT = "1080p PNG"
SIZES = {"720p": (1280, 720), "1080p": (1920, 1080), "12 MP": (4000, 3000), SCREENSHOT: (1920, 1080)}
# as the models publish them
MODELS: dict[str, dict[str, Any]] = {
    "Qwen2.5-VL": {
        "image_processor_type": "Qwen2VLImageProcessor",
        "size": {"shortest_edge": 3136, "longest_edge": 12_845_056},
        "patch_size": 14,
        "merge_size": 2,
        "temporal_patch_size": 2,
        "image_mean": [0.48145466, 0.4578275, 0.40821073],
        "image_std": [0.26862954, 0.26130258, 0.27577711],
    },
    "Qwen3-VL": {
        "image_processor_type": "Qwen2VLImageProcessor",
        "size": {"shortest_edge": 65_536, "longest_edge": 16_777_216},
        "patch_size": 16,
        "merge_size": 2,
        "temporal_patch_size": 2,
        "image_mean": [0.5, 0.5, 0.5],
        "image_std": [0.5, 0.5, 0.5],
    },
}

PIXELS = "decode + resize + PPM"
BYTES, TENSORS = "decode + uint8 patches", "decode + fp32 patches"
HF_SIMD = "HF PIL processor with Pillow-SIMD"
HF_PIL, HF_TV = "HF PIL processor", "HF torchvision processor, PIL decode"
ATEN, KERNEL, COPY = "ATen resize + torch ops to fp32 patches", "our kernel to fp32 patches", "copy of as many bytes"


def processor(kind: Any, config: dict[str, Any]) -> Any:
    """Hugging Face's processor with these settings."""
    return kind(**{name: value for name, value in config.items() if name != "image_processor_type"})


def file_of(size: str) -> bytes:
    """A photograph, or a screenshot."""
    width, height = SIZES[size]
    return synthetic_photos.photo(width, height, seed=1) if size != SCREENSHOT else screenshot(width, height)


def chains(data: bytes, config: dict[str, Any], spec: PatchSpec) -> dict[str, Callable[[], Any]]:
    """What is compared, each from the file's bytes."""
    pil, torchv = (processor(kind, config) for kind in (Qwen2VLImageProcessorPil, Qwen2VLImageProcessor))

    def sized() -> tuple[Any, Any]:
        pixels = decoded(data)
        return pixels, spec.geometry(*pixels.shape[:2])

    pixels, geometry = sized()
    planes = by_torch.planes(pixels)
    moved = traffic(*pixels.shape[:2], geometry.height, geometry.width)
    source, target = torch.empty(moved // 2, dtype=torch.uint8), torch.empty(moved // 2, dtype=torch.uint8)

    def opened() -> Any:
        return Image.open(io.BytesIO(data)).convert("RGB")

    return {
        DECODE: lambda: decoded(data),
        PIXELS: lambda: resized_ppm(*sized(), spec),
        BYTES: lambda: fused.patches(decoded(data), geometry, spec, "uint8"),
        TENSORS: lambda: prepare(*sized(), spec),
        HF_PIL: lambda: pil(images=[opened()], return_tensors="pt")["pixel_values"],
        HF_TV: lambda: torchv(images=[opened()], return_tensors="pt")["pixel_values"],
        ATEN: lambda: by_torch.values(planes, geometry, spec),
        KERNEL: lambda: prepare(pixels, geometry, spec),
        COPY: lambda: target.copy_(source),
    }


def traffic(h: int, w: int, height: int, width: int) -> int:
    """Bytes that must be read and written at least: the pixels, and two temporal copies in fp32."""
    return 3 * h * w + 2 * 3 * 4 * height * width


class Simd:
    """The Pillow processor in an interpreter with Pillow-SIMD: a line with a size in, a line out when it is done."""

    def __init__(self, python: str, model: str) -> None:
        command = [python, __file__, "--serve", "--models", model]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1)
        self.version = self._answer()
        if ".post" not in self.version:
            raise SystemExit(f"--pillow-simd {python}: it has Pillow {self.version}, not Pillow-SIMD")

    def process(self, size: str) -> str:
        """Process the picture of one size there."""
        assert self._process.stdin is not None
        self._process.stdin.write(size + "\n")
        return self._answer()

    def _answer(self) -> str:
        assert self._process.stdout is not None
        line = self._process.stdout.readline().strip()
        if not line:
            raise SystemExit("--pillow-simd: its process ended; run it with --serve to see why")
        return line


def serve(model: str) -> None:
    """The other side of Simd."""
    pil = processor(Qwen2VLImageProcessorPil, MODELS[model])
    files = {name: file_of(name) for name in SIZES}
    print(PIL.__version__, flush=True)
    for line in sys.stdin:
        image = Image.open(io.BytesIO(files[line.strip()])).convert("RGB")
        pil(images=[image], return_tensors="pt")
        print("done", flush=True)


def report(model: str, rounds: int, simd: Simd | None) -> str:
    """One model's tables as Markdown."""
    spec = families.from_config(MODELS[model])
    assert isinstance(spec, PatchSpec)
    rows: dict[str, dict[str, float]] = {}
    sizes: dict[str, int] = {}
    moved: dict[str, int] = {}
    for name, (width, height) in SIZES.items():
        data = file_of(name)
        todo = chains(data, MODELS[model], spec)
        assert torch.equal(torch.from_numpy(todo[TENSORS]()), todo[HF_TV]()), "not exact: nothing is timed"
        if simd is not None:
            todo[HF_SIMD] = partial(simd.process, name)
            todo[HF_SIMD]()
        todo[HF_PIL]()  # warm
        sizes[name] = len(data)
        rows[name] = measure(todo, rounds, elsewhere={HF_SIMD})
        final = spec.geometry(height, width)
        moved[name] = traffic(height, width, final.height, final.width)
    lines = [
        f"# {model}'s images, one core: {cpu_name()}, {datetime.datetime.now(datetime.UTC):%Y-%m-%d}",
        "",
        f"torch {torch.__version__}, torchvision {torchvision.__version__}, Pillow {PIL.__version__}, "
        f"{f'Pillow-SIMD {simd.version}, ' if simd else ''}"
        f"transformers {transformers.__version__}, Python {platform.python_version()}, "
        f"ATen {torch.backends.cpu.get_cpu_capability()}, our kernel {fused.level()}; median of {rounds} "
        "interleaved rounds, ms of CPU per image; "
        f"at most {spec.max_pixels} pixels; our fp32 patches equal the torchvision processor's to the last bit.",
        "",
        "| size (bytes of the file) | " + " | ".join(rows["1080p"]) + " |",
        "|---" * (len(rows["1080p"]) + 1) + "|",
        *(
            f"| {name} ({sizes[name]}) | " + " | ".join(f"{ms:.1f}" for ms in row.values()) + " |"
            for name, row in rows.items()
        ),
        "",
        "| ratio | " + " | ".join(rows) + " |",
        "|---" * (len(rows) + 1) + "|",
        *(
            f"| {label} | " + " | ".join(f"{row[over] / row[under]:.2f}" for row in rows.values()) + " |"
            for label, over, under in (
                ("our pixels / decode alone", PIXELS, DECODE),
                ("our uint8 patches / decode alone", BYTES, DECODE),
                ("our fp32 patches / decode alone", TENSORS, DECODE),
                ("HF PIL processor / our fp32 patches", HF_PIL, TENSORS),
                ("HF PIL processor with Pillow-SIMD / our fp32 patches", HF_SIMD, TENSORS),
                ("HF torchvision processor / our fp32 patches", HF_TV, TENSORS),
                ("HF torchvision processor / our pixels", HF_TV, PIXELS),
                ("ATen + torch ops / our kernel", ATEN, KERNEL),
                ("our kernel / copy of the bytes that it reads and writes", KERNEL, COPY),
            )
            if over in rows["1080p"]
        ),
        *(
            f"| {label}, GB/s | "
            + " | ".join(f"{moved[size] / row[name] / 1e6:.1f}" for size, row in rows.items())
            + " |"
            for label, name in (("our kernel, bytes that it must read and write", KERNEL), ("copy, the limit", COPY))
        ),
        "",
    ]
    return "\n".join(lines)


def main() -> None:
    """Print the table; write it where asked."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--write", action="store_true")
    parser.add_argument("--pillow-simd", metavar="PYTHON")
    parser.add_argument("--no-families", action="store_true")
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--models", default=",".join(MODELS), help="separated by commas")
    chosen = parser.parse_args()
    pin()
    if chosen.serve:
        serve(chosen.models)
        return
    text = "\n".join(
        report(model, chosen.rounds, Simd(chosen.pillow_simd, model) if chosen.pillow_simd else None)
        for model in chosen.models.split(",")
    )
    if not chosen.no_families:
        text += "\n" + families_report(chosen.rounds)
    print(text)
    if chosen.write:
        slug = re.sub(r"[^a-z0-9]+", "-", cpu_name().lower()).strip("-")
        folder = Path(__file__).parent / "results"
        (folder / f"images-{datetime.datetime.now(datetime.UTC):%Y-%m-%d}-{slug}.md").write_text(text)


if __name__ == "__main__":
    main()
