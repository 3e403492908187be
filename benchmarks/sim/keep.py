"""Results of a long run, kept in a file as they come, so that a run that was broken off goes on where it was.

Rules: what is kept belongs to the very code that made it: a file of other sources is refused, not mixed. It is the
sidecar's own pickle, for the same machine and the same day; no one else's file belongs here.
"""

from __future__ import annotations

import hashlib
import pickle
from pathlib import Path
from typing import BinaryIO, Generic, TypeVar

Job = tuple[str, str, int, int]  # kind, seed, first, count
R = TypeVar("R")


class Kept(Generic[R]):
    """`done` holds what the file had. Without a file nothing is kept. Raises ValueError where it is of other code."""

    def __init__(self, file: Path | None, benchmarks: Path) -> None:
        self.file = file
        self.done: dict[Job, R] = {}
        if file is None:
            return
        sources = fingerprint(benchmarks)
        if not file.exists():
            file.write_bytes(pickle.dumps(sources))
            return
        with file.open("r+b") as source:
            if pickle.load(source) != sources:
                raise ValueError(f"{file} was made by other code; remove it to begin again")
            source.truncate(self._read(source))  # a last record may be cut off

    def _read(self, source: BinaryIO) -> int:
        """Read what is whole. Returns where that ends."""
        while True:
            end = source.tell()
            try:
                job, result = pickle.load(source)
            except (EOFError, pickle.UnpicklingError):
                return end
            self.done[job] = result

    def add(self, job: Job, result: R) -> R:
        """Keep one more."""
        if self.file is not None:
            with self.file.open("ab") as target:
                pickle.dump((job, result), target)
        return result


def fingerprint(benchmarks: Path) -> str:
    """A hash of all sources that a result depends on."""
    digest = hashlib.sha256()
    for folder in (benchmarks / "sim", benchmarks.parent / "sidecar"):
        for path in sorted(folder.rglob("*.py")):
            digest.update(path.read_bytes())
    return digest.hexdigest()
