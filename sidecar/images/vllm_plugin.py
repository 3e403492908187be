"""Decide whether images may go to vLLM through shared memory: a running vLLM must use the plugin and read the files.

Pixels may go there if it does, and finished tensors if its own image processor has the settings of the model's files:
the plugin writes down with which settings it was started.

The plugin (plugins/vllm) writes a mark file into the shared folder and locks it while its process runs. A locked mark
therefore shows that the plugin is installed, that both containers share the folder, and that the engine is alive. The
sidecar only queries the lock and never takes it, so it cannot block an engine.
"""

from __future__ import annotations

import json
import logging
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

from sidecar.images.shm_cache import SHM_DIR, shared_group
from sidecar.kernels.families.single_view import Qwen2VLSpec
from sidecar.kernels.grid import ProcessorSpec
from sidecar.runtime.locked_marks import read_marks
from sidecar.runtime.plugin_folders import PLUGIN_FOLDER

MARK_PREFIX: Final = "sidecar-plugin-"
OFFER_PREFIX: Final = "sidecar-tensors-"
URL_VERSION: Final = 1
CONNECTOR_NAME: Final = "inference_sidecar"
CHECK_INTERVAL_S: Final = 1.0
QWEN_PROCESSORS: Final = ("Qwen2VLImageProcessor",)
BYTES: Final = ("U8",)
HALF_OR_FLOAT: Final = ("F32", "BF16", "F16")
REMEDY: Final = (
    "install plugins/vllm into vLLM's environment, start it with VLLM_MEDIA_CONNECTOR=inference_sidecar, and mount one "
    f"folder at {SHM_DIR} in both containers"
)

_log = logging.getLogger("sidecar")


@dataclass(frozen=True, slots=True)
class PluginStatus:
    """The state of the plugin. `why`: the reason that images cannot go through shared memory, or ""."""

    why: str
    version: str = ""


@dataclass(frozen=True, slots=True)
class TensorOffer:
    """How a running vLLM takes finished tensors. `why`: the reason that it gets none, or ""."""

    why: str
    dtype: str = ""  # safetensors' name of the dtype that it wants
    cache_bytes: int = 0  # of its cache of processed images
    pid: int = 0  # of the process that offers: another one has an empty cache
    differs: bool = False  # its image processor has other settings than the model's files: nothing here is right for it


@dataclass(frozen=True, slots=True)
class Handoffs:
    """What a running vLLM takes now."""

    pixels: bool = False  # in shared memory
    tensors: TensorOffer | None = None
    passes: bool = False  # nothing prepared, in any way


NO_HANDOFFS: Final = Handoffs()
PASS_ALL: Final = Handoffs(passes=True)
NO_OFFER: Final = TensorOffer("no vLLM with the sidecar's plugin offers to take tensors here")


def read_status(shm: str) -> PluginStatus:
    """The plugin's state by the marks in the folder `shm`. Never raises, never waits."""
    last = PluginStatus("no vLLM with the sidecar's plugin uses this folder")
    for content in read_marks(shm, MARK_PREFIX):
        last = check_mark(content, os.geteuid(), _group(shm))
        if not last.why:
            break
    return last


def read_offer(shm: str, spec: ProcessorSpec) -> TensorOffer:
    """The offer of a running vLLM, for a sidecar whose model's files give `spec`. Never raises, never waits."""
    last = NO_OFFER
    for content in read_marks(shm, OFFER_PREFIX):
        last = check_offer(content, os.geteuid(), spec, _group(shm))
        if not last.why:
            break
    return last


def check_offer(text: bytes, user: int, spec: ProcessorSpec, group: int = -1) -> TensorOffer:
    """The offer in a mark, for a sidecar that runs as `user`; `group` may read its files."""
    if why := check_mark(text, user, group).why:
        return TensorOffer(why)
    try:
        mark: Any = json.loads(text)
        settings, dtype = dict(mark["settings"]), str(mark["dtype"])
        cache_bytes, pid = int(mark["cache_bytes"]), int(mark["pid"])
    except (ValueError, KeyError, TypeError):
        return TensorOffer("the offer of vLLM's plugin cannot be read")
    if mark.get("processor") not in QWEN_PROCESSORS or type(spec) is not Qwen2VLSpec or spec.frames != 1 or spec.grows:
        return TensorOffer("its tensors are not made here")
    if other := _other_settings(settings, spec):
        return TensorOffer(f"vLLM's image processor has other settings than the model's files: {other}", differs=True)
    floats = bool(settings.get("do_rescale")) or bool(settings.get("do_normalize"))
    if dtype not in (HALF_OR_FLOAT if floats else BYTES):
        return TensorOffer(f"vLLM wants its tensors as {dtype[:8]!a}")
    return TensorOffer("", dtype, max(cache_bytes, 0), pid)


def _group(shm: str) -> int:
    """The group that may read what is handed over; -1 if there is none, or no folder."""
    try:
        return shared_group(shm)
    except OSError:
        return -1


def _other_settings(settings: dict[str, Any], spec: Qwen2VLSpec) -> str:
    """The names of vLLM's settings that differ from `spec`; ""."""
    expected: dict[str, Any] = {
        "do_resize": True,
        "resample": spec.resample,
        "patch_size": spec.patch_size,
        "temporal_patch_size": spec.temporal_patch_size,
        "merge_size": spec.merge_size,
        "min_pixels": spec.min_pixels,
        "max_pixels": spec.max_pixels,
    }
    if settings.get("do_rescale") or settings.get("do_normalize"):  # else vLLM does both on its device
        expected |= {"do_rescale": spec.do_rescale, "do_normalize": spec.do_normalize}
        expected |= {"rescale_factor": spec.rescale_factor}
        expected |= {f"image_{name}": list(getattr(spec, f"image_{name}")) for name in ("mean", "std")}
    return ", ".join(name for name, value in expected.items() if settings.get(name) != value)


def check_mark(text: bytes, user: int, group: int = -1) -> PluginStatus:
    """The plugin's state by a mark, for a sidecar that runs as `user`; `group` may read its files."""
    try:
        mark: Any = json.loads(text)
        version, form = str(mark["version"])[:20], mark["form"]
        connector, owner, reads_all = str(mark["connector"])[:40], int(mark["user"]), bool(mark["reads_all"])
        reads_all = reads_all or (group >= 0 and group in list(mark.get("groups", ())))
    except (ValueError, KeyError, TypeError, RecursionError):
        return PluginStatus("the mark of vLLM's plugin cannot be read")
    if form != URL_VERSION:
        return PluginStatus(f"vLLM's plugin {version!a} does not match this sidecar's version", version)
    if connector != CONNECTOR_NAME:
        return PluginStatus(f"vLLM has the plugin, but VLLM_MEDIA_CONNECTOR is {connector!a}", version)
    if owner != user and not reads_all:
        return PluginStatus(f"vLLM runs as user {owner} and may not read the files of user {user}", version)
    return PluginStatus("", version)


def path_remedy(state_dir: str) -> str:
    """How a vLLM gets the plug-in without another image."""
    return (
        f"start vLLM with PYTHONPATH={state_dir}/{PLUGIN_FOLDER}, with the state directory mounted, and one folder "
        f"mounted at {SHM_DIR} in both containers"
    )


class PluginWatch:
    """Called for each request with images: what vLLM takes through the folder `shm` now. Logs changes.

    `required`: pixels are to go there, and the log says where they cannot; else tensors may, too.
    """

    def __init__(
        self,
        spec: ProcessorSpec,
        shm: str = SHM_DIR,
        now: Callable[[], float] = time.monotonic,
        *,
        required: bool = True,
    ) -> None:
        self._spec = spec
        self._shm = shm
        self._now = now
        self._required = required
        self._checked_at = float("-inf")
        self._status: PluginStatus | None = None
        self._offer: TensorOffer | None = None

    def __call__(self) -> Handoffs:
        now = self._now()
        if now - self._checked_at >= CHECK_INTERVAL_S or self._status is None or self._offer is None:
            self._checked_at = now
            before, self._status = self._status, read_status(self._shm)
            if before != self._status and self._status.why and self._required:
                _log.warning("images go inline, not through %s: %s; %s", self._shm, self._status.why, REMEDY)
            elif before != self._status and not self._status.why:
                _log.info("images go through %s: vLLM has plugin %s", self._shm, self._status.version)
            earlier, self._offer = self._offer, read_offer(self._shm, self._spec)
            if self._offer.differs and earlier != self._offer:
                _log.warning("images pass: %s; start both with the same sizes", self._offer.why)
            elif not self._offer.why and earlier != self._offer and not self._required:
                _log.info("finished tensors go through %s: vLLM wants them as %s", self._shm, self._offer.dtype)
            elif self._offer.why not in ("", NO_OFFER.why, earlier.why if earlier else ""):
                _log.warning("vLLM gets pixels, not finished tensors: %s", self._offer.why)
        if self._status.why:
            return NO_HANDOFFS
        if self._offer.differs:
            return PASS_ALL
        return Handoffs(True, None if self._offer.why or self._required else self._offer)
