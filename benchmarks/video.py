"""Videos on one core: the sidecar's chain against decoding alone and Hugging Face's processors.

    python benchmarks/video.py [--rounds N] [--write]

Rules: one core (affinity and one thread, of FFmpeg, too). The chains of a clip alternate in every round; a row is the
median over the rounds of the CPU time. Before anything is timed, the sidecar's tensors are compared with the
processor's, and must be equal. Clips are H.264 of a photograph that is panned over: one whose 16 frames are all taken,
which is the hardest to do in little more time than decoding takes, and one of eight seconds of which 16 are.
`--write` puts the table into benchmarks/results/.
"""

from __future__ import annotations

import argparse
import datetime
import io
import platform
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import av
import cv2
import numpy as np
import torch
import torchvision
import transformers
from one_core import DECODE, LIMITS, cpu_name, measure, pin
from transformers.models.qwen2_vl.video_processing_qwen2_vl import Qwen2VLVideoProcessor
from transformers.models.qwen3_vl.video_processing_qwen3_vl import Qwen3VLVideoProcessor

from sidecar.images.worker import video_decode, videos
from sidecar.kernels import fused, video_sampling
from sidecar.kernels.families.videos import VideoSpec, from_config
from sidecar.tools import synthetic_photos

WIDTH, HEIGHT, FRAMES, FPS = 1280, 720, 16, 30
CLIPS = {"16 frames, all taken": FRAMES, "8 seconds, 16 frames taken": 8 * FPS}
# as the models publish them
MODELS: dict[str, tuple[Any, dict[str, Any]]] = {
    "Qwen3-VL": (
        Qwen3VLVideoProcessor,
        {
            "video_processor_type": "Qwen3VLVideoProcessor",
            "size": {"shortest_edge": 4096, "longest_edge": 25_165_824},
            "patch_size": 16,
            "temporal_patch_size": 2,
            "merge_size": 2,
            "image_mean": [0.5] * 3,
            "image_std": [0.5] * 3,
        },
    ),
    "Qwen2.5-VL": (
        Qwen2VLVideoProcessor,
        {
            "video_processor_type": "Qwen2VLVideoProcessor",
            "size": {"shortest_edge": 3136, "longest_edge": 12_845_056},
            "patch_size": 14,
            "temporal_patch_size": 2,
            "merge_size": 2,
            "image_mean": [0.48145466, 0.4578275, 0.40821073],
            "image_std": [0.26862954, 0.26130258, 0.27577711],
        },
    ),
}
BYTES, HALVES, TENSORS = "decode + uint8 patches", "decode + bf16 patches", "decode + fp32 patches"
HF = "decode + HF processor"
OUR_LAYOUT, HF_LAYOUT = "our fp32 patches alone", "HF processor alone"


def clip(count: int) -> bytes:
    """An MP4 of a photograph that is panned over."""
    pixels = synthetic_photos.pixels(WIDTH + 4 * 64, HEIGHT + 2 * 64, 1)
    out = io.BytesIO()
    with av.open(out, "w", format="mp4") as file:
        stream = file.add_stream("libx264", rate=FPS)
        stream.width, stream.height, stream.pix_fmt = WIDTH, HEIGHT, "yuv420p"
        for n in range(count):
            x, y = 4 * (n % 64), 2 * (n % 64)
            frame = np.ascontiguousarray(pixels[y : y + HEIGHT, x : x + WIDTH])
            file.mux(stream.encode(av.VideoFrame.from_ndarray(frame, "rgb24")))
        file.mux(stream.encode(None))
    return out.getvalue()


def chains(data: bytes, spec: VideoSpec, processor: Any) -> dict[str, Callable[[], Any]]:
    """What is compared, each from the file's bytes but for the last two."""
    indices = video_sampling.rounded(video_decode.open_video(data, LIMITS).source.frames, FRAMES)
    geometry = spec.video(FRAMES, HEIGHT, WIDTH)
    plain = replace(spec, do_rescale=False, do_normalize=False)
    half = replace(spec, half="BF16")

    def frames() -> Any:
        return video_decode.frames(video_decode.open_video(data, LIMITS), indices)

    def decode_as_vllm() -> Any:
        made = np.empty((FRAMES, HEIGHT, WIDTH, 3), np.uint8)
        for at, frame in enumerate(frames()):
            made[at] = cv2.cvtColor(frame, cv2.COLOR_BGR2RGB)
        return made

    def theirs(made: Any) -> Any:
        return processor(videos=[made], do_sample_frames=False, return_tensors="pt")["pixel_values_videos"]

    decoded = [cv2.cvtColor(frame, cv2.COLOR_BGR2RGB) for frame in frames()]
    stacked = np.stack(decoded)
    return {
        DECODE: decode_as_vllm,
        BYTES: lambda: videos.lay_out(frames(), geometry, plain, video_decode.put_rgb),
        HALVES: lambda: videos.lay_out(frames(), geometry, half, video_decode.put_rgb),
        TENSORS: lambda: videos.lay_out(frames(), geometry, spec, video_decode.put_rgb),
        HF: lambda: theirs(decode_as_vllm()),
        OUR_LAYOUT: lambda: videos.lay_out(decoded, geometry, spec),
        HF_LAYOUT: lambda: theirs(stacked),
    }


def report(model: str, rounds: int) -> str:
    """One model's tables as Markdown."""
    kind, config = MODELS[model]
    spec = from_config(config)
    assert isinstance(spec, VideoSpec), spec
    processor = kind(**{name: value for name, value in config.items() if name != "video_processor_type"})
    rows: dict[str, dict[str, float]] = {}
    for name, count in CLIPS.items():
        todo = chains(clip(count), spec, processor)
        assert torch.equal(torch.from_numpy(todo[TENSORS]()), todo[HF]()), "not exact: nothing is timed"
        rows[name] = measure(todo, rounds)
    ratios = (
        ("our uint8 patches / decode alone", BYTES, DECODE),
        ("our bf16 patches / decode alone", HALVES, DECODE),
        ("our fp32 patches / decode alone", TENSORS, DECODE),
        ("HF chain / our fp32 chain", HF, TENSORS),
        ("HF processor alone / our fp32 patches alone", HF_LAYOUT, OUR_LAYOUT),
    )
    lines = [
        f"# 16 frames of 720p video to {model}'s patches, one core: {cpu_name()}, "
        f"{datetime.datetime.now(datetime.UTC):%Y-%m-%d}",
        "",
        f"torch {torch.__version__}, torchvision {torchvision.__version__}, transformers {transformers.__version__}, "
        f"OpenCV {cv2.__version__}, Python {platform.python_version()}, our kernel {fused.level()}; median of {rounds} "
        "interleaved rounds, ms of CPU per video; our fp32 patches equal the processor's to the last bit.",
        "",
        "| clip | " + " | ".join(next(iter(rows.values()))) + " |",
        "|---" * (len(next(iter(rows.values()))) + 1) + "|",
        *(f"| {name} | " + " | ".join(f"{ms:.1f}" for ms in row.values()) + " |" for name, row in rows.items()),
        "",
        "| ratio | " + " | ".join(rows) + " |",
        "|---" * (len(rows) + 1) + "|",
        *(
            f"| {label} | " + " | ".join(f"{row[over] / row[under]:.2f}" for row in rows.values()) + " |"
            for label, over, under in ratios
        ),
        "",
    ]
    return "\n".join(lines)


def main() -> None:
    """Print the table; write it where asked."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--write", action="store_true")
    chosen = parser.parse_args()
    pin()
    cv2.setNumThreads(1)
    text = "\n".join(report(model, chosen.rounds) for model in MODELS)
    print(text)
    if chosen.write:
        slug = re.sub(r"[^a-z0-9]+", "-", cpu_name().lower()).strip("-")
        folder = Path(__file__).parent / "results"
        (folder / f"video-{datetime.datetime.now(datetime.UTC):%Y-%m-%d}-{slug}.md").write_text(text)


if __name__ == "__main__":
    main()
