"""Files of finished tensors in shared memory, made by the sidecar's own worker code, and chat bodies that name them."""

from __future__ import annotations

import base64
import json
import mmap
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from sidecar.images import engine_tensors
from sidecar.images.protocol import TENSORS, ImageDone, ImageJob, ImageLimits
from sidecar.images.shm_cache import SHM_DIR, CacheFolder, ImageCache
from sidecar.images.worker import pipeline
from sidecar.kernels import families

from .test_images import BODIES

NAMES = ("1080p", "720p", "odd", "long", "EXIF 3", "EXIF 6", "grey", "PNG", "WebP", "alpha", "two")
DTYPES = {"": "U8", "floats": "F32", "half": "BF16"}
LIMITS = ImageLimits(20 << 20, 50_000_000)


@contextmanager
def written(model: Path, place: Path, kind: str) -> Iterator[Path]:
    """A file of cases for tensors.py; the tensors are removed at the end."""
    spec = families.from_dir(str(model))
    assert spec is not None
    wanted = engine_tensors.spec_for(spec, DTYPES[kind])
    folder = CacheFolder(SHM_DIR, 1 << 28, needed=True)
    cache, cases = ImageCache(folder.path, folder.bytes, b"secret"), {}
    try:
        for name in NAMES:
            changed = json.loads(json.dumps(BODIES[name]))
            for part in changed["messages"][0]["content"]:
                if part["type"] == "image_url":
                    part["image_url"]["url"] = _with_file(cache, wanted, part["image_url"]["url"], DTYPES[kind])
            cases[name] = [BODIES[name], changed]
        path = place / "cases.json"
        path.write_text(json.dumps(cases))
        yield path
    finally:
        folder.close()


def _with_file(cache: ImageCache, spec: Any, url: str, dtype: str) -> str:
    head, _, text = url.partition(";base64,")
    job = ImageJob(TENSORS, spec.to_json(), False, LIMITS, 60.0)
    laid_out = pipeline.prepare_image(job, base64.b64decode(text))[0]
    assert isinstance(laid_out, ImageDone)
    size = engine_tensors.bytes_of(spec, spec.geometry(*laid_out.original))
    file, fd = cache.reserve(size)
    with mmap.mmap(fd, size) as memory, memoryview(memory) as into:
        done, payload = pipeline.run_job(job, base64.b64decode(text), into)
    os.close(fd)
    assert isinstance(done, ImageDone) and len(payload) == 0
    return f"{head};{engine_tensors.parameter(done, dtype, file)};base64,{text}"
