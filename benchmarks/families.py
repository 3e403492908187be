"""Images of every known family on one core: the sidecar's images and tensors against Hugging Face's processors.

The second table of images.py. Rules: as there; nothing is timed that is not equal to the last bit.
"""

from __future__ import annotations

import contextlib
import datetime
import importlib
import io
from collections.abc import Callable
from typing import Any, Final

import torch
import transformers
from one_core import DECODE, cpu_name, decoded, measure
from PIL import Image

from sidecar.images.worker import tiles
from sidecar.images.worker.tensors import prepare, resize, resized_ppm
from sidecar.kernels import families, fused
from sidecar.kernels.grid import TileSpec
from sidecar.tools import synthetic_photos
from tests.images import by_torch

SIZES: Final = {"1080p": (1920, 1080), "12 MP": (4000, 3000)}
PIXELS, TENSORS, THEIRS, PILLOW = "pixels", "tensors", "HF torchvision, PIL decode", "HF PIL"
KERNEL, ATEN = "our resize and layout", "ATen + torch ops"

PATCHES: Final = {"patch_size": 14, "merge_size": 2, "temporal_patch_size": 2}

# family -> class and module in transformers, and the settings of a model of it
ROWS: Final[dict[str, tuple[str, str, dict[str, Any]]]] = {
    "Qwen2.5-VL": (
        "Qwen2VLImageProcessor",
        "qwen2_vl.image_processing_qwen2_vl",
        {"size": {"shortest_edge": 3136, "longest_edge": 12_845_056}, **PATCHES},
    ),
    "GLM-4V": (
        "Glm4vImageProcessor",
        "glm4v.image_processing_glm4v",
        {"size": {"shortest_edge": 12544, "longest_edge": 2_007_040}, **PATCHES},
    ),
    "LLaVA-1.5": (
        "CLIPImageProcessor",
        "clip.image_processing_clip",
        {"size": {"shortest_edge": 336}, "crop_size": {"height": 336, "width": 336}},
    ),
    "SigLIP": ("SiglipImageProcessor", "siglip.image_processing_siglip", {"size": {"height": 384, "width": 384}}),
    "Gemma 3": ("Gemma3ImageProcessor", "gemma3.image_processing_gemma3", {"size": {"height": 896, "width": 896}}),
    "Pixtral": (
        "PixtralImageProcessor",
        "pixtral.image_processing_pixtral",
        {"size": {"longest_edge": 1024}, "patch_size": {"height": 16, "width": 16}},
    ),
    "Idefics 3": (
        "Idefics3ImageProcessor",
        "idefics3.image_processing_idefics3",
        {"size": {"longest_edge": 1456}, "max_image_size": {"longest_edge": 364}},
    ),
    "InternVL": (
        "GotOcr2ImageProcessor",
        "got_ocr2.image_processing_got_ocr2",
        {"size": {"height": 448, "width": 448}, "crop_to_patches": True, "min_patches": 1, "max_patches": 12},
    ),
    "LLaVA-NeXT": (
        "LlavaNextImageProcessor",
        "llava_next.image_processing_llava_next",
        {
            "size": {"shortest_edge": 336},
            "crop_size": {"height": 336, "width": 336},
            "image_grid_pinpoints": [[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]],
        },
    ),
    "LLaVA-OneVision": (
        "LlavaOnevisionImageProcessor",
        "llava_onevision.image_processing_llava_onevision",
        {
            "size": {"height": 384, "width": 384},
            "image_grid_pinpoints": [[384 * y, 384 * x] for y in range(1, 7) for x in range(1, 7)],
        },
    ),
    "Llama 4": (
        "Llama4ImageProcessor",
        "llama4.image_processing_llama4",
        {"size": {"height": 336, "width": 336}, "max_patches": 16},
    ),
    "Gemma 4": (
        "Gemma4ImageProcessor",
        "gemma4.image_processing_gemma4",
        {"max_soft_tokens": 280, "patch_size": 16, "pooling_kernel_size": 3},
    ),
    "Kimi K2.5": (
        "Kimi_K25ImageProcessor",
        "kimi_k25.image_processing_kimi_k25",
        {"size": {"max_height": 512, "max_width": 512}, "patch_size": 14, "merge_size": 2, "max_patches": 16384},
    ),
    "MiniCPM-V 4.6": (
        "MiniCPMV4_6ImageProcessor",
        "minicpmv4_6.image_processing_minicpmv4_6",
        {"scale_resolution": 448, "patch_size": 14, "max_slice_nums": 9},
    ),
}


def chains(data: bytes, name: str, module: str, config: dict[str, Any]) -> dict[str, Callable[[], Any]]:
    """What is compared for one family, each from the file's bytes. Raises AssertionError where it is not exact."""
    spec = families.from_config({"image_processor_type": name, **config})
    assert spec is not None
    theirs = getattr(importlib.import_module(f"transformers.models.{module}"), name)(**config)

    def hf(image: Any) -> Any:
        return theirs(images=[image], return_tensors="pt")["pixel_values"]

    pixels = decoded(data)
    geometry = spec.geometry(*pixels.shape[:2])
    planes = by_torch.planes(pixels)
    wanted = hf(planes)
    todo: dict[str, Callable[[], Any]] = {DECODE: lambda: decoded(data)}
    if spec.inline:
        resized = by_torch.planes(resize(pixels, geometry, spec))
        assert torch.equal(hf(resized), wanted), f"{name}: the resized image is no fixed point"
        todo[PIXELS] = lambda: resized_ppm(decoded(data), geometry, spec)
    if isinstance(spec, TileSpec):
        made = by_torch.tensor(tiles.prepare(pixels, geometry, spec), spec.dtype).flatten()
        assert torch.equal(made, wanted.flatten()[: len(made)]), f"{name}: not exact"
        todo[TENSORS] = lambda: tiles.prepare(decoded(data), geometry, spec)
    elif spec.tensors:
        got = by_torch.tensor(prepare(pixels, geometry, spec), spec.dtype)
        assert torch.equal(got, wanted if wanted.ndim == 2 else wanted[0]), f"{name}: not exact"
        todo[TENSORS] = lambda: prepare(decoded(data), geometry, spec)
        todo[KERNEL] = lambda: prepare(pixels, geometry, spec)
        todo[ATEN] = lambda: by_torch.values(planes, geometry, spec)
    opened = lambda: Image.open(io.BytesIO(data)).convert("RGB")  # noqa: E731
    todo[THEIRS] = lambda: hf(opened())
    pil = pillows(name, module)
    if pil is not None:
        processor = pil(**config)
        todo[PILLOW] = lambda: processor(images=[opened()], return_tensors="pt")
    return todo


def pillows(name: str, module: str) -> Any:
    """The family's processor with the Pillow backend; None where transformers has none."""
    with contextlib.suppress(ImportError):
        found = importlib.import_module(
            "transformers.models." + module.replace(".image_processing_", ".image_processing_pil_")
        )
        return getattr(found, name + "Pil", None)
    return None


def over_decode(ms: dict[str, float], kind: str) -> tuple[str, str]:
    """Milliseconds, and how many times those of decoding; empty where it is not made."""
    return (f"{ms[kind]:.1f}", f"{ms[kind] / ms[DECODE]:.2f}") if kind in ms else ("", "")


def report(rounds: int) -> str:
    """The table as Markdown."""
    lines = [
        f"# Image families, one core: {cpu_name()}, {datetime.datetime.now(datetime.UTC):%Y-%m-%d}",
        "",
        f"torch {torch.__version__}, transformers {transformers.__version__}, our kernel {fused.level()}; "
        f"median of {rounds} interleaved "
        "rounds, ms of CPU per JPEG. Pixels are handed on inline; tensors are the processor's output, equal "
        "to the last bit; the last column is over "
        "pixels, or over tensors where no pixels can be handed on.",
        "",
        "| family | size | decode alone | pixels | over decode | tensors | over decode | HF torchvision, PIL "
        "decode | over ours | HF PIL over ours | ATen + torch ops over our kernel |",
        "|---" * 11 + "|",
    ]
    for size, (width, height) in SIZES.items():
        data = synthetic_photos.photo(width, height, seed=1)
        for family, row in ROWS.items():
            ms = measure(chains(data, *row), rounds)
            made = [cell for kind in (PIXELS, TENSORS) for cell in over_decode(ms, kind)]
            ours = ms[PIXELS] if PIXELS in ms else ms[TENSORS]
            pil = f"{ms[PILLOW] / ours:.1f}" if PILLOW in ms else ""
            aten = f"{ms[ATEN] / ms[KERNEL]:.1f}" if ATEN in ms else ""
            cells = (
                family,
                size,
                f"{ms[DECODE]:.1f}",
                *made,
                f"{ms[THEIRS]:.1f}",
                f"{ms[THEIRS] / ours:.1f}",
                pil,
                aten,
            )
            lines.append("| " + " | ".join(cells) + " |")
    return "\n".join([*lines, ""])
