"""What each way of an image would cost engine and sidecar on this machine, and which one `--images auto` takes."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Final

from sidecar.images import cost_rule
from sidecar.images.header_geometry import is_worth_resizing, predict
from sidecar.kernels import families
from sidecar.kernels.grid import PatchSpec, ProcessorSpec
from sidecar.launch import preflight
from sidecar.settings import Settings
from sidecar.tools.doctor.finding import DoctorFinding

TIMEOUT_S: Final = 60.0  # loading torch from a cold disk takes most of it
SIZES: Final = {"720p": (720, 1280), "1080p": (1080, 1920), "12 MP": (3000, 4000)}
JPEG_CHARS_PER_PIXEL: Final = 0.3  # of a photograph, as base64 text
_MEASURE: Final = (
    "import json, torch; torch.set_num_threads(1); "
    "from sidecar.images.worker import calibration; print(json.dumps(calibration.measure()))"
)


def check(chosen: Settings) -> DoctorFinding:
    """The choice for photographs of three sizes, with the milliseconds of CPU time that it was made by."""
    spec = families.from_dir(chosen.model) if chosen.model else None
    if chosen.images not in ("auto", "inline", "shm") or spec is None or preflight.explain_images_off(chosen):
        return DoctorFinding("absent", "no images are prepared")
    if chosen.images != "auto":
        return DoctorFinding("absent", f"--images {chosen.images} decides; with auto, costs do")
    command = (sys.executable, "-W", "ignore", "-c", _MEASURE)
    try:
        child = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_S)
        costs = cost_rule.UnitCosts(dict(json.loads(child.stdout)))
    except (subprocess.TimeoutExpired, ValueError, KeyError, TypeError):
        return DoctorFinding("warn", "costs cannot be measured: only bounds decide what passes", "see `images`")
    return DoctorFinding("ok", "CPU ms of engine and sidecar, JPEG: " + "; ".join(_lines(spec, costs)))


def _lines(spec: ProcessorSpec, costs: cost_rule.UnitCosts) -> list[str]:
    lines = []
    for name, (height, width) in SIZES.items():
        geometry = predict(spec, height, width)
        if geometry is None:
            continue
        pixels_out = geometry.size[0] * geometry.size[1]
        chars = int(JPEG_CHARS_PER_PIXEL * height * width)
        image = cost_rule.ImageSize("jpeg", height * width, pixels_out, chars)
        ways = {cost_rule.PASS}
        if spec.inline:
            ways.add(cost_rule.SHM)
        if spec.inline and is_worth_resizing(height * width, geometry, chars):
            ways.add(cost_rule.INLINE)
        if isinstance(spec, PatchSpec):
            ways.add(cost_rule.TENSORS)
        spent = cost_rule.milliseconds(image, costs)
        numbers = ", ".join(f"{way} {spent[way]:.0f}" for way in cost_rule.WAYS if way in ways)
        without = cost_rule.choose(image, ways & {cost_rule.INLINE}, costs)
        lines.append(f"{name}: {numbers}: {cost_rule.choose(image, ways, costs)}, without the plug-in {without}")
    return lines
