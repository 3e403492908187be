"""What a start needs, found wrong before anything runs: files, sockets, what images need. `doctor` asks the same."""

from __future__ import annotations

import importlib.util
import json
import logging
import socket
from dataclasses import replace
from pathlib import Path

from sidecar.errors import StartError, UsageError
from sidecar.flags import parse_gpu
from sidecar.images.shm_cache import SHM_DIR
from sidecar.kernels import families
from sidecar.load import cost_model
from sidecar.load.roofline import roofline
from sidecar.settings import Settings
from sidecar.signals.gpu import names as gpu_names

BACKLOG = 1024

_log = logging.getLogger("sidecar")


def coefficients(chosen: Settings) -> cost_model.Coefficients:
    """The coefficients file; else a roofline of --model on the GPU; else the documented default. Raises UsageError."""
    if chosen.coefficients:
        return load_coefficients(chosen.coefficients)
    found = _roofline(chosen) if chosen.model else cost_model.Coefficients()
    _log.info("coefficients: %s; `sidecar calibrate` measures them", found.source)
    return found


def load_coefficients(path: str) -> cost_model.Coefficients:
    """The file that --coefficients names. Raises UsageError."""
    name = f"--coefficients {path}"
    try:
        text = Path(path).read_text("utf-8")
    except OSError as e:
        raise UsageError(f"{name}: cannot be read ({e.strerror})") from None
    except UnicodeDecodeError:
        raise UsageError(f"{name}: not JSON (no UTF-8)") from None
    return cost_model.from_json(text, name)


def _roofline(chosen: Settings) -> cost_model.Coefficients:
    """From the model's config.json and the GPU that --gpu names, or NVML."""
    try:
        config = json.loads((Path(chosen.model) / "config.json").read_text("utf-8"))
    except FileNotFoundError:
        return replace(cost_model.Coefficients(), source="default: no config.json in --model")
    except (OSError, ValueError) as e:
        why = f"default: config.json of --model cannot be read ({type(e).__name__})"
        return replace(cost_model.Coefficients(), source=why)
    count, name = parse_gpu(chosen.gpu) if chosen.gpu else _seen()
    return roofline(config if isinstance(config, dict) else {}, name, count)


def _seen() -> tuple[int, str]:
    """The GPUs that NVML shows: all of them are taken to be the engine's."""
    names = gpu_names.read()
    return len(names), names[0] if names else ""


def image_mode(chosen: Settings, shm: str = SHM_DIR) -> str:
    """ "inline", "shm" or "off". Raises StartError where images were asked for and cannot be had."""
    why = no_images(chosen, shm)
    mode = "shm" if chosen.images == "shm" else "inline"
    _log.info("images: %s", f"off ({why})" if why else mode)
    if not why:
        return mode
    if chosen.images in ("auto", "off"):
        return "off"
    raise StartError(f"--images {chosen.images}: {why}")


def no_images(chosen: Settings, shm: str = SHM_DIR) -> str:
    """Why images cannot be prepared; empty where they can."""
    if chosen.images == "off":
        return "as chosen"
    if not chosen.model:
        return "no --model directory with a known image processor (preprocessor_config.json)"
    if isinstance(found := families.explained(chosen.model), str):
        return f"the image processor of --model is not known: {found}"
    if chosen.images == "shm" and not Path(shm).is_dir():
        return f"there is no shared memory: {shm} is no directory"
    if importlib.util.find_spec("torchvision") is None:
        return "the extra is not installed; pip install 'inference-sidecar[images]'"
    return ""


def bind(name: str, address: tuple[str, int]) -> socket.socket:
    """A listening socket. Raises StartError that names the port."""
    host, port = address
    sock = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_STREAM)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        sock.bind((host, port))
        sock.listen(BACKLOG)
    except OSError as e:
        sock.close()
        text = f"--{name}: port {port} on {host} cannot be used ({e.strerror}); free it or choose another"
        raise StartError(text) from None
    sock.setblocking(False)
    return sock


def reserve(name: str, address: tuple[str, int], module: str, extra: str) -> socket.socket:
    """A socket that keeps a port for a server which opens its own beside it (SO_REUSEPORT), and takes no connection itself.

    Raises StartError where the port is taken, or the module that serves it is not installed.
    """
    if importlib.util.find_spec(module) is None:
        raise StartError(f"--{name}: the extra is not installed; pip install 'inference-sidecar[{extra}]'")
    host, port = address
    sock = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_STREAM)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        sock.bind((host, port))  # not shared yet, so that a port which another one serves is refused
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    except OSError as e:
        sock.close()
        text = f"--{name}: port {port} on {host} cannot be used ({e.strerror}); free it or choose another"
        raise StartError(text) from None
    return sock


def unix(path: Path) -> socket.socket:
    """A listening Unix socket at `path`."""
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    sock.bind(str(path))
    sock.listen(BACKLOG)
    return sock
