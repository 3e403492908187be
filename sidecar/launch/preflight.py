"""Checks before anything starts: coefficients, sockets, images. `sidecar doctor` runs them too."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import logging
import re
import secrets
import shutil
import socket
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import zip_longest
from pathlib import Path
from typing import Final

from sidecar.errors import StartError, UsageError
from sidecar.flags import parse_gpu
from sidecar.images.shm_cache import SHM_DIR
from sidecar.kernels import families
from sidecar.load import body_scan, cost_model
from sidecar.load.roofline import roofline
from sidecar.settings import Settings
from sidecar.signals.gpu import names as gpu_names

BACKLOG_CONNECTIONS: Final = 1024
IMAGE_MODULES: Final = ("PIL", "numpy", "pybase64")  # the extra `images`; simplejpeg only makes it faster
RENDER_MODULES: Final = ("tokenizers", "jinja2", "blake3", "PIL")  # the extra `render`
IMAGE_KEY_BYTES: Final = 32
MIN_KEY_FILE_BYTES: Final = 16
MAX_KEY_FILE_BYTES: Final = 4096
# Where an engine listens whose command line names no port.
DEFAULT_PORTS: Final = {"vllm": "8000"}

_log = logging.getLogger("sidecar")


def with_command(chosen: Settings, command: Sequence[str]) -> Settings:
    """The settings next to an engine that COMMAND starts: its address, unless --engine names it. Raises UsageError."""
    if shutil.which(command[0]) is None:
        raise UsageError(f"COMMAND: {command[0][:200]!r} is not a program on PATH; give the engine's after --")
    if chosen.engine:
        return chosen
    port = _port_of(command)
    if not port:
        raise UsageError("--engine is missing, and the command names no --port; e.g. --engine http://127.0.0.1:8000")
    return replace(chosen, engine=f"http://127.0.0.1:{port}")


def _port_of(command: Sequence[str]) -> str:
    """The port that a command line names, else the default of an engine that its first word names."""
    for word, following in zip_longest(command, command[1:], fillvalue=""):
        if found := re.fullmatch(r"--port[= ]([1-9][0-9]{0,4})", f"{word} {following}" if word == "--port" else word):
            return found[1]
    return DEFAULT_PORTS.get(Path(command[0]).name, "")


def choose_coefficients(chosen: Settings) -> cost_model.Coefficients:
    """The coefficients file, else a roofline of --model on the GPU, else the documented default. Raises UsageError."""
    if chosen.coefficients:
        coefficients = load_coefficients(chosen.coefficients)
        if coefficients.no_capacity:
            _log.warning(
                "coefficients: the capacity is a lower bound, so the reported load is too high: %s",
                coefficients.no_capacity,
            )
        return coefficients
    coefficients = _roofline(chosen) if chosen.model else cost_model.Coefficients()
    _log.info("coefficients: %s; measure them with `sidecar calibrate`", coefficients.source)
    return coefficients


def load_coefficients(path: str) -> cost_model.Coefficients:
    """Read a coefficients file. Raises UsageError."""
    name = f"--coefficients {path}"
    try:
        text = Path(path).read_text("utf-8")
    except OSError as e:
        raise UsageError(f"{name}: cannot be read ({e.strerror})") from None
    except UnicodeDecodeError:
        raise UsageError(f"{name}: not JSON (not UTF-8)") from None
    return cost_model.from_json(text, name)


def _roofline(chosen: Settings) -> cost_model.Coefficients:
    """Coefficients from the model's config.json and the GPU that --gpu or NVML names."""
    try:
        config = json.loads((Path(chosen.model) / "config.json").read_text("utf-8"))
    except FileNotFoundError:
        return replace(cost_model.Coefficients(), source="default: no config.json in --model")
    except (OSError, ValueError) as e:
        why = f"default: config.json of --model cannot be read ({type(e).__name__})"
        return replace(cost_model.Coefficients(), source=why)
    if chosen.gpu:
        count, name = parse_gpu(chosen.gpu)
    else:  # all that NVML reports are assumed to be the engine's
        names = gpu_names.read()
        count, name = len(names), names[0] if names else ""
    return roofline(config if isinstance(config, dict) else {}, name, chosen.gpus or count)


def choose_image_mode(chosen: Settings, shm: str = SHM_DIR) -> str:
    """The mode: that chosen, or off. Raises StartError if inline or shm was requested and is not possible."""
    reason, mode = explain_images_off(chosen, shm), chosen.images
    _log.info("images: %s", f"off ({reason})" if reason else mode)
    if reason and chosen.images not in ("auto", "off"):
        raise StartError(f"--images {chosen.images}: {reason}")
    return "off" if reason else mode


def explain_images_off(chosen: Settings, shm: str = SHM_DIR) -> str:
    """Why images cannot be prepared; empty if they can."""
    if chosen.images == "off":
        return "by --images off"
    if not chosen.model:
        return "no --model directory with a known image processor (preprocessor_config.json)"
    if isinstance(found := families.explain(chosen.model), str):
        return f"the image processor of --model is unknown: {found}"
    if chosen.images == "shm" and not Path(shm).is_dir():
        return f"no shared memory: {shm} is not a directory"
    if any(importlib.util.find_spec(module) is None for module in IMAGE_MODULES):
        return "the extra is not installed; pip install 'inference-sidecar[images]'"
    if not body_scan.is_compiled():
        return "the compiled kernel was not built; install a C++ compiler, then the package from source"
    return ""


def check_usage(chosen: Settings) -> None:
    """Raises UsageError or StartError if usage cannot be reported as asked. Whether a database answers is not asked."""
    for name, value in (("usage-url", chosen.usage_url), ("request-log-bytes", chosen.request_log_bytes)):
        if value and not chosen.usage_bytes:
            raise UsageError(f"--{name}: needs the usage records in the state directory; --usage-bytes is 0")
    if chosen.usage_url and importlib.util.find_spec("psycopg") is None:
        raise StartError("--usage-url: the extra is not installed; pip install 'inference-sidecar[postgres]'")


def check_render(chosen: Settings) -> None:
    """Raises UsageError or StartError if prompts cannot be rendered as asked."""
    if chosen.render == "off":
        return
    if not chosen.model:
        raise UsageError("--render on: needs the model's directory; name it with --model DIR")
    if any(importlib.util.find_spec(module) is None for module in RENDER_MODULES):
        raise StartError("--render on: the extra is not installed; pip install 'inference-sidecar[render]'")


def read_image_key(chosen: Settings) -> bytes:
    """The key of images' names: from --image-key-file, or a random one. Raises UsageError."""
    if not chosen.image_key_file:
        return secrets.token_bytes(IMAGE_KEY_BYTES)
    try:
        with Path(chosen.image_key_file).open("rb") as file:
            content = file.read(MAX_KEY_FILE_BYTES).strip()  # editors and `kubectl create secret` may add a line end
    except OSError as e:
        raise UsageError(f"--image-key-file: cannot be read ({e.strerror})") from None
    if len(content) < MIN_KEY_FILE_BYTES:
        example = "head -c 32 /dev/urandom | base64"
        raise UsageError(f"--image-key-file: it has fewer than {MIN_KEY_FILE_BYTES} bytes; make one with: {example}")
    return hashlib.blake2b(content, digest_size=IMAGE_KEY_BYTES).digest()


def check_certificate(chosen: Settings) -> None:
    """Raises UsageError if the relay's port cannot speak TLS with --tls-cert and --tls-key."""
    if bool(chosen.tls_cert) != bool(chosen.tls_key):
        raise UsageError("--tls-cert and --tls-key: give both, or none")
    if not chosen.tls_cert:
        return
    import ssl  # costs every process memory

    try:
        ssl.create_default_context(ssl.Purpose.CLIENT_AUTH).load_cert_chain(chosen.tls_cert, chosen.tls_key)
    except OSError as e:  # SSLError included
        is_other = getattr(e, "reason", "") == "KEY_VALUES_MISMATCH"
        forms = f"{chosen.tls_cert} or {chosen.tls_key} is not PEM, or cannot be read"
        why = f"{chosen.tls_key} is not the key of {chosen.tls_cert}" if is_other else forms
        raise UsageError(f"--tls-cert, --tls-key: not a certificate and its key: {why}") from None


def bind(name: str, address: tuple[str, int]) -> socket.socket:
    """A listening socket for the flag `name`. Raises StartError if the port cannot be used."""
    return _open(name, address, lambda sock: sock.listen(BACKLOG_CONNECTIONS))


def reserve(name: str, address: tuple[str, int], module: str, extra: str) -> socket.socket:
    """A socket that keeps a port for a server with a socket of its own (SO_REUSEPORT); it accepts no connection itself.

    Raises StartError if the port cannot be used, or the module that serves it is not installed.
    """
    if importlib.util.find_spec(module) is None:
        raise StartError(f"--{name}: the extra is not installed; pip install 'inference-sidecar[{extra}]'")
    # Shared only after it is bound: a port that another process serves is refused.
    return _open(name, address, lambda sock: sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1))


def _open(name: str, address: tuple[str, int], prepare: Callable[[socket.socket], object]) -> socket.socket:
    host, port = address
    sock = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_STREAM)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        sock.bind((host, port))
        prepare(sock)
    except OSError as e:
        sock.close()
        text = f"--{name}: port {port} on {host} cannot be used ({e.strerror}); free it or choose another"
        raise StartError(text) from None
    sock.setblocking(False)
    return sock


def bind_unix(path: Path) -> socket.socket:
    """A listening Unix socket at `path`."""
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    sock.bind(str(path))
    sock.listen(BACKLOG_CONNECTIONS)
    return sock
