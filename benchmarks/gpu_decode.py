"""nvJPEG, through torchvision, against the exact decode: its speed and its error.

Part of gpu_images.py; the service does not use nvJPEG. Rules: from the file's bytes in CPU memory to pixels on the
device, by the clock, with the device's work done. A row is the median over the rounds. Pixels are compared as decoded,
and as the model would get them, both resized by the exact path on the CPU. 4:2:0 is what cameras write; 4:4:4 needs no
chroma upsampling, which shows how much of the difference that causes.
"""

from __future__ import annotations

import io
import statistics
import time
from typing import Any, Final

import numpy as np

MODES: Final = {"4:2:0": 2, "4:4:4": 0}  # Pillow's numbers
CELLS: Final = "pixels that differ | mean, levels | max, levels | PSNR, dB"


def error(one: Any, other: Any) -> str:
    """Table cells: share of pixels that differ, mean and largest difference in grey levels, PSNR."""
    apart = np.abs(one.astype(np.int16) - other)
    mean_square = float((apart.astype(np.float64) ** 2).mean())
    decibels = f"{10 * np.log10(255**2 / mean_square):.1f}" if mean_square else "-"
    return f"{(apart.max(axis=-1) > 0).mean():.0%} | {apart.mean():.2f} | {apart.max()} | {decibels}"


def jpeg(height: int, width: int, subsampling: int) -> bytes:
    """A photograph's likeness."""
    from PIL import Image

    from sidecar.tools import synthetic_photos

    out = io.BytesIO()
    Image.fromarray(synthetic_photos.pixels(width, height, 1)).save(out, "JPEG", quality=90, subsampling=subsampling)
    return out.getvalue()


def decoded(files: list[Any], device: str) -> list[Any]:
    """Pixels of a batch on the device."""
    import torch
    from torchvision.io import ImageReadMode, decode_jpeg

    pixels = decode_jpeg(files, mode=ImageReadMode.RGB, device=device)
    if device == "cuda":
        torch.cuda.synchronize()
    return list(pixels)


def speed(data: Any, device: str, count: int, rounds: int) -> float:
    """Images per second in batches of `count`."""
    taken = []
    for _ in range(rounds + 2):  # the first ones make the decoder's state
        start = time.perf_counter()
        decoded([data] * count, device)
        taken.append(time.perf_counter() - start)
    return count / statistics.median(taken[2:])


def off(data: Any, spec: Any, device: str) -> tuple[str, str]:
    """Table cells of one file: as decoded, and resized."""
    from sidecar.images import file_headers
    from sidecar.images.protocol import ImageLimits
    from sidecar.images.worker.decode import decode
    from tests.images import by_torch

    raw = data.numpy().tobytes()
    header = file_headers.read(raw)
    assert header is not None
    exact = by_torch.planes(decode(raw, header, ImageLimits(1 << 30, 1 << 30)))
    (near,) = (pixels.cpu() for pixels in decoded([data], device))
    geometry = spec.geometry(*exact.shape[-2:])
    resized = [by_torch.resize(pixels, geometry, spec) for pixels in (near, exact)]
    pairs = [[pixels.permute(1, 2, 0).numpy() for pixels in pair] for pair in ([near, exact], resized)]
    whole, small = (error(*pair) for pair in pairs)
    return whole, small


def report(sizes: dict[str, tuple[int, int]], batches: tuple[int, ...], spec: Any, rounds: int, device: str) -> str:
    """The table as Markdown; one line where this torchvision has no nvJPEG."""
    import torch
    import torchvision

    lines = [
        f"## nvJPEG through torchvision {torchvision.__version__}: not exact, and not used by the service",
        "",
        f"| JPEG | {' | '.join(f'images/s, batch {n}' for n in batches)} | {CELLS} | resized: {CELLS} |",
        "|---" * (9 + len(batches)) + "|",
    ]
    for name, (height, width) in sizes.items():
        for mode, subsampling in MODES.items():
            data = torch.frombuffer(bytearray(jpeg(height, width, subsampling)), dtype=torch.uint8)
            try:
                speeds = [f"{speed(data, device, count, rounds):,.0f}" for count in batches]
                whole, small = off(data, spec, device)
            except RuntimeError as e:
                return f"nvJPEG: not measured: {str(e).partition(chr(10))[0]}\n"
            lines.append(f"| {name} {mode} | {' | '.join(speeds)} | {whole} | {small} |")
    return "\n".join(lines) + "\n"
