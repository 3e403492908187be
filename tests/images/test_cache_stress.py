"""Many processes in one folder: nothing raises, the limit always holds, and a killed process leaves no file forever."""

from __future__ import annotations

import os
import random
import subprocess
import sys
from pathlib import Path

import pytest

from sidecar.images.protocol import ImageDone
from sidecar.images.shm_cache import SHARED_PREFIX, CacheFolder, ImageCache
from sidecar.runtime.locked_folder import LOCK_NAME

MAX_BYTES = 1 << 20
KEYS = [f"{i:02x}" for i in range(24)]
OPERATIONS = 250
DONE = ImageDone("ok", "jpeg", "image/x-portable-pixmap", 28, 56, (1, 2, 4), 2, "cafe", (("decode", 0.1),), 99)


def content(key: str) -> bytes:
    """The payload of a key: of its own size, and of its own bytes."""
    return bytes([int(key, 16)]) * (1000 + 9000 * int(key, 16))


def read(cache: ImageCache, folder: str, key: str, *, linked: bool) -> None:
    """Hand a payload over, read it as its reader would, and remove it or take it back."""
    handed = cache.export(content(key), key=key) if linked else cache.share(content(key)[:500], content(key)[500:])
    path = Path(folder) / handed.name
    assert path.read_bytes()[handed.offset :] == content(key)
    if linked:
        cache.unlink_shared(handed)
    else:
        path.unlink()


def within(cache: ImageCache, folder: str) -> None:
    """The entries, and those that are being written, hold no more than they may."""
    with cache._exclusive(), os.scandir(folder) as found:
        assert sum(entry.stat().st_size for entry in found if entry.name[0] != SHARED_PREFIX[0]) <= MAX_BYTES


def life(folder: str, seed: int, operations: int) -> None:
    """One process's share; an assertion or an exception ends it with 1."""
    cache, chance = ImageCache(folder, MAX_BYTES, b"secret"), random.Random(seed)
    for _ in range(operations):
        key = chance.choice(KEYS)
        match chance.randrange(5):
            case 0 | 1:
                cache.put(key, DONE, content(key))
            case 2:
                found = cache.get(key)
                assert found is None or bytes(found[1]) == content(key)
            case 3:
                read(cache, folder, key, linked=chance.random() < 0.7)
            case 4:
                within(cache, folder)


def born(shm: str, times: int) -> None:
    """Sidecars that start and end."""
    for _ in range(times):
        folder = CacheFolder(shm, MAX_BYTES)
        assert (Path(folder.path) / LOCK_NAME).exists()
        folder.close()


def start(what: str, folder: str, *numbers: int) -> subprocess.Popen[bytes]:
    """`life` or `born` in a process of its own."""
    return subprocess.Popen([sys.executable, __file__, what, folder, *map(str, numbers)])


@pytest.mark.slow
def test_four_processes_in_a_tiny_folder(tmp_path: Path) -> None:
    """Four processes put, get, evict and export while a fifth is killed: reads are whole, no exported file is left."""
    folder = CacheFolder(str(tmp_path), MAX_BYTES)
    doomed = start("life", folder.path, 0, 1_000_000)
    while not any((Path(folder.path) / name).exists() for name in KEYS):
        assert doomed.poll() is None
    others = [start("life", folder.path, seed, OPERATIONS) for seed in range(1, 5)]
    assert others[0].wait(300) == 0
    doomed.kill()
    doomed.wait()
    assert [process.wait(300) for process in others] == [0] * 4
    within(ImageCache(folder.path, MAX_BYTES, b"secret"), folder.path)
    assert len(list(Path(folder.path).glob(SHARED_PREFIX + "*"))) <= 1, "one, of the process that was killed"
    folder.close()
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_folders_that_are_made_and_swept_at_once(tmp_path: Path) -> None:
    """Sidecars that start at one moment sweep the folders of dead ones only: each has its own, and it is there."""
    processes = [start("born", str(tmp_path), 300) for _ in range(4)]
    assert [process.wait(300) for process in processes] == [0] * 4
    assert not list(tmp_path.iterdir())


if __name__ == "__main__":
    {"life": life, "born": born}[sys.argv[1]](sys.argv[2], *map(int, sys.argv[3:]))
