"""Fixtures around real containers: podman, the image of this checkout, and a pod from the printed manifest."""

from __future__ import annotations

import shlex
import subprocess
import sys
from collections.abc import Iterator

import pytest

from ..missing import missing
from . import pods
from .environment import IMAGE, ROOT, Podman, Unavailable, available

MODEL = "tiny"
PRINT = (
    f"manifests --engine-kind scripted --model {MODEL} --image {IMAGE} --sidecar-image {IMAGE} --cpus 1 --memory 1Gi "
    "--sidecar-cpus 1 --sidecar-memory 1Gi"
)


@pytest.fixture(scope="session")
def podman() -> Podman:
    """podman; skips where it cannot run containers, fails where nothing may be skipped."""
    try:
        return available()
    except Unavailable as e:
        missing(str(e))


@pytest.fixture(scope="session")
def image(podman: Podman) -> str:
    """The image of this checkout, built as its users build it."""
    podman.build(REVISION="0123456789abcdef", CREATED="2026-01-01T00:00:00Z", SOURCE="https://example.org/sidecar")
    return IMAGE


@pytest.fixture(scope="session")
def manifest() -> str:
    """What `sidecar manifests` prints."""
    command = [sys.executable, "-m", "sidecar", *shlex.split(PRINT)]
    return subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True, timeout=60).stdout


@pytest.fixture
def pod(podman: Podman, image: str, manifest: str) -> Iterator[pods.Pod]:
    """The printed pod, serving. A hang is killed after 20 s instead of 75, so that the test takes less time."""
    with pods.played(podman, "sidecar-test", manifest, MODEL, SIDECAR_SILENCE_KILL="20") as pod:
        pods.wait_for(pod.is_serving, "the pod to serve")
        yield pod
