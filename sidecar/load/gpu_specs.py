"""Pure: peak performance of GPUs by their NVML names. A literal table from the vendor's datasheets.

Dense peaks, without sparsity, of matrix products in bf16 (fp16 if a GPU has no bf16) and in fp8; memory bandwidth.
Sources are NVIDIA's datasheets; a row names any other source. A name matches the row all of whose words it contains; if
there are several, the one with the most words.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import Final

MIG_SLICES: Final = 7  # of one GPU


@dataclass(frozen=True, slots=True)
class GpuSpec:
    """Dense TFLOP/s in bf16 and in fp8 (0: not supported), and GB/s of memory."""

    words: str
    bf16: float
    fp8: float
    bandwidth: float


GPUS: Final = (
    GpuSpec("V100", 125, 0, 900),  # fp16
    GpuSpec("T4", 65, 0, 320),  # fp16
    GpuSpec("A10", 125, 0, 600),
    GpuSpec("A10G", 70, 0, 600),  # AWS' G5
    GpuSpec("A30", 165, 0, 933),
    GpuSpec("A40", 150, 0, 696),
    GpuSpec("RTX A6000", 155, 0, 768),
    GpuSpec("A100", 312, 0, 1555),
    GpuSpec("A100 80GB", 312, 0, 2039),
    GpuSpec("A100 80GB PCIe", 312, 0, 1935),
    GpuSpec("A800", 312, 0, 2039),
    GpuSpec("L4", 121, 242, 300),
    GpuSpec("L40", 181, 362, 864),
    GpuSpec("L40S", 362, 733, 864),
    GpuSpec("RTX 6000 Ada", 364, 728, 960),
    GpuSpec("RTX 3090", 71, 0, 936),  # GeForce rows: fp32 accumulation, from the white papers
    GpuSpec("RTX 4090", 165, 330, 1008),
    GpuSpec("RTX 5090", 209, 419, 1792),
    GpuSpec("RTX PRO 6000 Blackwell", 504, 1007, 1792),
    GpuSpec("H100", 989, 1979, 3350),
    GpuSpec("H100 PCIe", 756, 1513, 2000),
    GpuSpec("H100 NVL", 835, 1671, 3900),
    GpuSpec("H800", 989, 1979, 3350),
    GpuSpec("H20", 148, 296, 4000),  # no public datasheet; as sellers state it
    GpuSpec("H200", 989, 1979, 4800),
    GpuSpec("H200 NVL", 835, 1671, 4800),
    GpuSpec("GH200", 989, 1979, 4000),
    GpuSpec("GH200 144G", 989, 1979, 4900),
    GpuSpec("B200", 2250, 4500, 8000),
    GpuSpec("GB200", 2500, 5000, 8000),
    GpuSpec("B300", 2250, 4500, 8000),
    GpuSpec("GB300", 2500, 5000, 8000),
)


def find_gpu(name: str) -> GpuSpec | None:
    """The spec of a GPU, such as "NVIDIA H100 80GB HBM3" or "H100"; None if unknown. A MIG slice gets its share."""
    words = _words(name)
    matching = (gpu for gpu in GPUS if _words(gpu.words) <= words)
    best = max(matching, key=lambda gpu: len(_words(gpu.words)), default=None)
    share = re.search(r"\bmig\b.*?\b([1-7])g\.", name.lower())
    if best is None or share is None:
        return best
    part = int(share[1]) / MIG_SLICES
    return replace(best, bf16=best.bf16 * part, fp8=best.fp8 * part, bandwidth=best.bandwidth * part)


def _words(name: str) -> set[str]:
    return set(re.findall(r"[a-z0-9]+", name.lower()))
