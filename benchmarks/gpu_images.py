"""The GPU's resize against its memory's speed: one command that builds nothing.

    python benchmarks/gpu_images.py [--rounds N] [--write]
    python benchmarks/gpu_images.py --check nvjpeg     its error and speed only
    python benchmarks/gpu_images.py --interpret        a smoke test without a GPU: bits only, small images, no figures

Needs a CUDA machine with torch >= 2.8 (its CPU build of ATen is the reference) and Triton. Before any timing, every
size and kind of value is compared with ATen's uint8 resize and torch's own operations on the CPU, and must be equal to
the last bit. Each round is one batch, both launches, timed by CUDA events on cold caches (emptied by writing more than
they hold); a row is the median over the rounds. Bytes moved are the necessary ones (kernels/ragged.py): sources, tables
and results once, the scratch out and in. They are compared with the speed of copying on the same device, measured here,
and with its data sheet if that is known. A second table is nvJPEG's (gpu_decode.py): its speed and its error. `--write`
puts both into benchmarks/results/.
"""

from __future__ import annotations

import argparse
import datetime
import os
import re
import statistics
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # so that a checkout is enough

SIZES = {"720p": (720, 1280), "1080p": (1080, 1920), "12 MP": (3000, 4000)}
SMALL = {"tiny": (60, 90), "flat": (40, 150)}
BATCHES = (1, 8, 64)
CONFIG = {
    "image_processor_type": "Qwen2VLImageProcessor",
    "min_pixels": 3136,
    "max_pixels": 1_003_520,  # the class's own bounds
    "patch_size": 14,
    "merge_size": 2,
    "temporal_patch_size": 2,
}
FLUSH = 512 << 20  # bytes: more than any second-level cache
KINDS = ("uint8", "bfloat16", "float32")


@dataclass(frozen=True, slots=True)
class Row:
    """One line of the table: `seconds` for one batch."""

    size: str
    kind: str
    batch: int
    seconds: float
    moved: int


class Work:
    """One batch of equal images on the device, ready to be launched."""

    def __init__(self, device: str, pixels: Any, spec: Any, kind: str, count: int) -> None:
        import torch

        from sidecar.images.worker.tensors import table
        from sidecar.kernels import gpu
        from sidecar.kernels.ragged import RaggedImage

        height, width = pixels.shape[:2]
        self.geometry = spec.geometry(height, width)
        batch = gpu.lay_out([RaggedImage(height, width, self.geometry, spec.resample, spec)] * count)
        dtype = getattr(torch, kind)
        self.moved = batch.moved(dtype.itemsize)
        self._sources = torch.zeros(batch.source_bytes, dtype=torch.uint8, device=device)
        for at in batch.sources:
            self._sources[at : at + pixels.numel()] = pixels.reshape(-1).to(device)
        self._scratch = torch.empty(batch.scratch_bytes, dtype=torch.uint8, device=device)
        self._values = None if kind == "uint8" else torch.from_numpy(table(spec))[None].to(dtype).to(device)
        self._out = torch.empty(batch.values, dtype=dtype, device=device)
        self._loaded, self._launch = gpu.load(batch, device), gpu.launch

    def run(self) -> None:
        self._launch(self._loaded, self._sources, self._scratch, self._values, self._out)

    def result(self, index: int) -> Any:
        """One image's patches on the CPU, flat."""
        at, wanted = self._loaded.batch.outs[index], 3 * self.geometry.height * self.geometry.width * 2
        return self._out[at : at + wanted].cpu()


def picture(height: int, width: int) -> Any:
    """Noise over a gradient, with flat parts that make sums overshoot: (height, width, 3)."""
    import torch

    generator = torch.Generator().manual_seed(1)
    image = torch.randint(0, 256, (height, width, 3), dtype=torch.uint8, generator=generator)
    image[: height // 3, : width // 2] = 255
    image[height // 2 :, width // 3 :] //= 255
    return image


def processor() -> Any:
    from sidecar.kernels import families

    return families.from_config(CONFIG)


def check(device: str, sizes: dict[str, tuple[int, int]]) -> None:
    """Every size, filter and kind of value against ATen and torch's operations. Raises AssertionError."""
    import torch

    from tests.images import by_torch

    for height, width in sizes.values():
        pixels = picture(height, width)
        for resample in (1, 2, 3):
            spec = replace(processor(), resample=resample)
            geometry = spec.geometry(height, width)
            resized = by_torch.resize(pixels.permute(2, 0, 1), geometry, spec)
            floats = by_torch.patches(resized, geometry, spec)
            octets = by_torch.patches(resized, geometry, replace(spec, do_normalize=False, do_rescale=False))
            for kind in KINDS:
                work = Work(device, pixels, spec, kind, 2)
                work.run()
                wanted = (octets if kind == "uint8" else floats).to(getattr(torch, kind)).reshape(-1)
                assert torch.equal(work.result(1), wanted), f"not exact: {height}x{width}, filter {resample}, {kind}"


def timed(run: Any, rounds: int) -> float:
    """Median seconds on the device, each round on emptied caches."""
    import torch

    flush = torch.empty(FLUSH, dtype=torch.uint8, device="cuda")
    taken = []
    for turn in range(rounds + 3):  # the first ones compile and warm up
        flush.fill_(turn)
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        run()
        end.record()
        end.synchronize()
        taken.append(start.elapsed_time(end) / 1e3)
    return statistics.median(taken[3:])


def copy_speed(rounds: int) -> float:
    """Bytes read and written per second by a copy of 1 GiB within the device."""
    import torch

    source, target = (torch.empty(1 << 30, dtype=torch.uint8, device="cuda") for _ in range(2))
    return 2 * source.numel() / timed(lambda: target.copy_(source), rounds)


def measure(rounds: int) -> list[Row]:
    """Every size, kind and batch."""
    rows = []
    for name, (height, width) in SIZES.items():
        pixels = picture(height, width)
        for kind in KINDS:
            for count in BATCHES:
                work = Work("cuda", pixels, processor(), kind, count)
                rows.append(Row(name, kind, count, timed(work.run, rounds), work.moved))
    return rows


def peak(name: str) -> float | None:
    """The device's memory bandwidth by its data sheet."""
    from sidecar.load.gpu_specs import find_gpu

    found = find_gpu(name)
    return None if found is None else found.bandwidth * 1e9


def report(rows: list[Row], copy: float, rounds: int) -> str:
    """The whole table as Markdown."""
    import torch
    import triton

    name = torch.cuda.get_device_name(0)
    sheet = peak(name)
    lines = [
        f"# Images on a GPU: {name}, {datetime.datetime.now(datetime.UTC):%Y-%m-%d}",
        "",
        f"torch {torch.__version__}, Triton {triton.__version__}; Qwen2-VL patches, bicubic, at most 1003520 "
        "pixels; pixels are on the device already "
        f"(after decode); median of {rounds} rounds on cold caches, launches included; all three filters and "
        "kinds equal ATen's bits. "
        f"Copying moves {copy / 1e9:.0f} GB/s" + (f"; the data sheet says {sheet / 1e9:.0f} GB/s." if sheet else "."),
        "",
        "| size | values | batch | us per image | images/s | MB moved per image | GB/s | of copying | of the "
        "data sheet |",
        "|---" * 9 + "|",
    ]
    for row in rows:
        speed = row.moved / row.seconds
        lines.append(
            f"| {row.size} | {row.kind} | {row.batch} | {row.seconds / row.batch * 1e6:.1f} | "
            f"{row.batch / row.seconds:,.0f} "
            f"| {row.moved / row.batch / 1e6:.1f} | {speed / 1e9:.0f} | {speed / copy:.0%} | "
            f"{f'{speed / sheet:.0%}' if sheet else '-'} |"
        )
    return "\n".join(lines) + "\n"


def nvjpeg(rounds: int, *, interpret: bool = False) -> str:
    """The table of gpu_decode.py; with `interpret` it only runs, with the CPU's decoder in nvJPEG's place."""
    import gpu_decode

    if interpret:
        gpu_decode.report(SMALL, (1,), processor(), 2, "cpu")
        return "the benchmark of nvJPEG runs, with the CPU's decoder in its place: no figures"
    return gpu_decode.report(SIZES, BATCHES, processor(), rounds, "cuda")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--write", action="store_true")
    parser.add_argument("--interpret", action="store_true", help="Triton's interpreter on the CPU: no figures")
    parser.add_argument("--check", choices=("bits", "nvjpeg"), help="only this, and no figures")
    args = parser.parse_args()
    if args.interpret:
        os.environ["TRITON_INTERPRET"] = "1"
    import torch

    if not args.interpret and not torch.cuda.is_available():
        print("no CUDA device is visible; --interpret checks the bits without one", file=sys.stderr)
        return 1
    if args.check == "nvjpeg":
        print(nvjpeg(args.rounds, interpret=args.interpret))
        return 0
    check(*(("cpu", SMALL) if args.interpret else ("cuda", SIZES | SMALL)))
    if args.interpret or args.check:
        print("equal to ATen's bits" + (", in Triton's interpreter" if args.interpret else ""))
        return 0
    text = report(measure(args.rounds), copy_speed(args.rounds), args.rounds) + "\n" + nvjpeg(args.rounds)
    print(text)
    if args.write:
        device = re.sub(r"[^a-z0-9]+", "-", torch.cuda.get_device_name(0).lower()).strip("-")
        path = ROOT / f"benchmarks/results/gpu-images-{datetime.datetime.now(datetime.UTC):%Y-%m-%d}-{device}.md"
        path.write_text(text)
        print(f"written: {path.relative_to(ROOT)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
