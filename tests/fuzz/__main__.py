"""`python -m tests.fuzz TARGET SECONDS [option of libFuzzer ...]`: search for bytes that a target does not withstand.

Exit status 0: none was found. What was found, and what was learned on the way, is kept in build/fuzz/TARGET.
"""

from __future__ import annotations

import hashlib
import sys
from pathlib import Path

import atheris
import torchvision.io.image  # noqa: F401  takes longer than one try may

with atheris.instrument_imports(include=["sidecar.images.file_headers", "sidecar.relay", "sidecar.load", "json"]):
    from tests.fuzz.targets import TARGETS

from tests.fuzz import seeds

LIMITS = (
    "-timeout=10",
    "-rss_limit_mb=4096",
    f"-max_len={seeds.MAX_SEED_BYTES}",
    "-print_final_stats=1",
    "-verbosity=0",
)


def main(target: str, seconds: str, *more: str) -> None:
    """Does not return: libFuzzer ends the process."""
    folder = Path("build/fuzz") / target
    folder.mkdir(parents=True, exist_ok=True)
    for seed in seeds.of(target):
        (folder / hashlib.sha256(seed).hexdigest()[:16]).write_bytes(seed)
    options = [f"-max_total_time={seconds}", f"-artifact_prefix={folder}-", *LIMITS, *more]
    atheris.Setup([sys.argv[0], str(folder), *options], TARGETS[target])
    atheris.Fuzz()


if __name__ == "__main__":
    main(*sys.argv[1:])
