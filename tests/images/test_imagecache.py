"""Prepared images are kept by content, for one tenant, within a bound, and whatever goes wrong is a miss."""

from __future__ import annotations

import asyncio
import base64
import importlib
import json
import os
import resource
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from sidecar.errors import StartError
from sidecar.images.protocol import PIXELS, TENSORS, ImageDone
from sidecar.images.service import ImageService
from sidecar.images.shm_cache import CacheFolder, ImageCache
from sidecar.images.shm_handoff import ShmHandoff
from sidecar.launch.preflight import choose_image_mode
from sidecar.settings import Settings
from sidecar.tools import synthetic_photos

from .conftest import QWEN2_VL

DONE = ImageDone("ok", "jpeg", "image/x-portable-pixmap", 28, 56, (1, 2, 4), 2, "cafe", (("decode", 0.1),), 99)


@pytest.fixture
def cache(tmp_path: Path) -> ImageCache:
    return ImageCache(str(tmp_path), 1 << 20, b"secret")


def test_what_was_put_is_got(cache: ImageCache) -> None:
    """Record and payload come back; an unknown key is a miss."""
    cache.put("aa", DONE, b"pixels")
    found = cache.get("aa")
    assert found is not None and (found[0], bytes(found[1])) == (DONE, b"pixels")
    assert cache.get("bb") is None


def test_an_entry_that_was_made_anew_is_read_anew(cache: ImageCache, monkeypatch: pytest.MonkeyPatch) -> None:
    """Parsed entries match their files, even after another process replaces one of equal size, and are bounded."""
    monkeypatch.setattr("sidecar.images.shm_cache.MAX_PARSED_ENTRIES", 3)
    for n in range(8):
        done = replace(DONE, stages=(("decode", n / 10),))
        cache.put("aa", done, bytes([n] * 6))
        for _ in range(2):
            found = cache.get("aa")
            assert found is not None and (found[0], bytes(found[1])) == (done, bytes([n] * 6))
        cache.put(f"b{n}", DONE, b"other")
        assert cache.get(f"b{n}") is not None


def test_the_key_depends_on_all_that_the_result_does(cache: ImageCache, tmp_path: Path) -> None:
    """Bytes, kind of result, processor, tenant and secret: a change of any gives another entry."""
    other = ImageCache(str(tmp_path), 1 << 20, b"other")
    keys = [
        cache.key(b"x", PIXELS, "spec", "tenant"),
        cache.key(b"y", PIXELS, "spec", "tenant"),
        cache.key(b"x", TENSORS, "spec", "tenant"),
        cache.key(b"x", PIXELS, "spec2", "tenant"),
        cache.key(b"x", PIXELS, "spec", "tenant2"),
        cache.key(b"x", PIXELS, "spect", "enant"),
        other.key(b"x", PIXELS, "spec", "tenant"),
    ]
    assert len(set(keys)) == len(keys)
    assert cache.key(memoryview(b"x"), PIXELS, "spec", "tenant") == keys[0]


def test_the_least_recently_used_go_first_and_the_bound_holds(cache: ImageCache, tmp_path: Path) -> None:
    """Ten entries of a fifth of the bound: the folder never holds more than it may, and what was just read stays."""
    for i in range(10):
        cache.put(f"{i:02x}", DONE, bytes(200_000))
        os.utime(tmp_path / f"{i:02x}", (i, i))
        cache.get("00")
        assert sum(p.stat().st_size for p in tmp_path.iterdir()) <= 1 << 20
    assert cache.get("00") is not None and cache.get("09") is not None
    assert cache.get("01") is None


def test_an_evicted_entry_stays_with_its_reader(cache: ImageCache, tmp_path: Path) -> None:
    """A request that is being sent keeps its bytes."""
    cache.put("aa", DONE, b"pixels")
    found = cache.get("aa")
    (tmp_path / "aa").unlink()
    assert found is not None and bytes(found[1]) == b"pixels"


@pytest.mark.parametrize(
    "damage",
    [b"", b"\0" * 5, b"\0" * 12, b"\xff" * 500, b"\0\0\0\2\0\0\0\0\0\0\0\5{}x"],
    ids=["empty", "less than a prefix", "zeros", "ones", "short"],
)
def test_a_damaged_entry_is_a_miss(cache: ImageCache, tmp_path: Path, damage: bytes) -> None:
    """Nothing in the folder can raise."""
    (tmp_path / "aa").write_bytes(damage)
    assert cache.get("aa") is None


def test_links_are_not_followed(cache: ImageCache, tmp_path: Path) -> None:
    """Neither read through nor written through."""
    (tmp_path / "target").write_bytes(b"mine")
    (tmp_path / "aa").symlink_to(tmp_path / "target")
    assert cache.get("aa") is None
    cache.put("aa", DONE, b"pixels")
    assert (tmp_path / "target").read_bytes() == b"mine"


def test_too_large_and_a_folder_that_is_gone_are_no_errors(tmp_path: Path) -> None:
    """An entry over a quarter of the bound is not kept; a folder may vanish at any time."""
    cache = ImageCache(str(tmp_path), 1000, b"")
    cache.put("aa", DONE, bytes(900))
    assert cache.get("aa") is None
    gone = ImageCache(str(tmp_path / "gone"), 1 << 20, b"")
    gone.put("aa", DONE, b"x")
    assert gone.get("aa") is None


def test_an_entry_that_vanishes_meanwhile_does_not_keep_others_out(cache: ImageCache, tmp_path: Path) -> None:
    """Another worker may evict what is being counted (here a link to nowhere): what comes in is kept all the same."""
    (tmp_path / "ff").symlink_to(tmp_path / "gone")
    cache.put("aa", DONE, b"pixels")
    assert cache.get("aa") is not None


def test_a_folder_lives_as_long_as_its_sidecar(tmp_path: Path) -> None:
    """Closed, it is gone; left by a process that was killed, the next one sweeps it; one in use stays."""
    mine = CacheFolder(str(tmp_path), 1 << 20)
    assert Path(mine.path).stat().st_mode & 0o777 == 0o700
    code = "import os, sys; from sidecar.images.shm_cache import CacheFolder; "
    code += "print(CacheFolder(sys.argv[1], 1 << 20).path, flush=True); os._exit(9)"
    command = [sys.executable, "-c", code, str(tmp_path)]
    left = subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()
    assert Path(left).is_dir()
    CacheFolder(str(tmp_path), 0)
    assert not Path(left).exists() and Path(mine.path).is_dir()
    mine.close()
    assert not list(tmp_path.iterdir())


def test_no_room_is_no_cache(tmp_path: Path) -> None:
    """A missing folder, or a bound of 0, gives no cache and no error."""
    absent, none = CacheFolder(str(tmp_path / "absent"), 1 << 20), CacheFolder(str(tmp_path), 0)
    assert (absent.path, absent.why) == ("", "No such file or directory")
    assert (none.path, none.why) == ("", "")


def test_a_hand_off_folder_that_is_not_there_ends_the_start(tmp_path: Path) -> None:
    """Missing shared memory is reported at once, not by every image that goes inline."""
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(QWEN2_VL))
    chosen = Settings(images="shm", model=str(tmp_path))
    assert choose_image_mode(chosen, str(tmp_path)) == "shm"
    with pytest.raises(StartError, match="absent is not a directory"):
        choose_image_mode(chosen, str(tmp_path / "absent"))


def test_what_is_handed_over_is_read_once_and_never_evicted(cache: ImageCache, tmp_path: Path) -> None:
    """An export has a new random name: a link to an entry, or else a new file; its reader or the sidecar removes it."""
    cache.put("aa", DONE, b"pixels")
    linked, written = cache.export(b"pixels", key="aa"), cache.export(b"pix", b"els", key="bb")
    assert linked.name != written.name and linked.folder == tmp_path.name
    for handed in (linked, written):
        path = tmp_path / handed.name
        assert path.read_bytes()[handed.offset :] == b"pixels" and path.stat().st_mode & 0o777 == 0o600
    assert (tmp_path / linked.name).samefile(tmp_path / "aa")
    for i in range(8):
        cache.put(f"{i:02x}", DONE, bytes(200_000))
    assert (tmp_path / linked.name).exists() and (tmp_path / written.name).exists()
    cache.unlink_shared(linked)
    cache.unlink_shared(linked)
    assert not (tmp_path / linked.name).exists()


def test_what_nobody_read_goes_in_the_end(cache: ImageCache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A relay that died could not take it back: the next entry that is kept sweeps it."""
    handed = cache.export(b"pixels")
    cache.put("aa", DONE, b"x")
    assert (tmp_path / handed.name).exists()
    later = time.time() + 1000
    monkeypatch.setattr("sidecar.images.shm_cache.time.time", lambda: later)
    cache.put("bb", DONE, b"x")
    assert not (tmp_path / handed.name).exists()


def test_what_finds_no_room_leaves_no_part(cache: ImageCache, tmp_path: Path) -> None:
    """A file that cannot be written completely raises an error and is removed."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, before[1]))
    try:
        for write in (cache.export, cache.share):
            with pytest.raises(OSError, match="too large"):
                write(bytes(90), bytes(90))
        cache.put("aa", DONE, bytes(90))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert not list(tmp_path.iterdir())


def test_what_waits_for_readers_is_bounded(cache: ImageCache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Readers who never come fill no memory; what is read makes room, and a link to an entry takes none."""
    monkeypatch.setattr("sidecar.images.shm_cache.MAX_UNREAD_BYTES", 1000)
    cache.put("aa", DONE, bytes(700))
    cache.export(bytes(700), key="aa")
    first = cache.share(bytes(300), bytes(300))
    with pytest.raises(OSError, match="unread"):
        cache.share(bytes(600))
    (tmp_path / first.name).unlink()
    cache.share(bytes(600))


async def test_a_cancelled_request_leaves_nothing_behind(cache: ImageCache) -> None:
    """The thread that writes for it cannot be stopped; what it wrote is taken back."""
    handovers = ShmHandoff(cache)
    with cache._exclusive():
        asked = asyncio.create_task(handovers.tensors(b"pixels"))
        await asyncio.sleep(0)
        asked.cancel()
        with pytest.raises(asyncio.CancelledError):
            await asked
    await asyncio.get_running_loop().shutdown_default_executor()
    await asyncio.sleep(0)  # its callback
    assert not list(cache._files())


def plugin() -> Any:
    """plugins/vllm, which has an environment of its own."""
    folder = str(Path(__file__).parents[2] / "plugins/vllm")
    if folder not in sys.path:
        sys.path.append(folder)
    return importlib.import_module("sidecar_vllm")


async def test_the_plugins_urls_are_ours(server: Any, spec: Any, tmp_path: Path) -> None:
    """An exported file matches the plugin's URL pattern and holds the inline image's pixels; reading removes it."""
    folder = CacheFolder(str(tmp_path), 64 << 20)
    images = ImageService(server.path, server.settings, spec, ImageCache(folder.path, folder.bytes, b"secret"))
    photo = base64.b64encode(synthetic_photos.photo(640, 480, seed=4))
    inline = await images.inline(photo, "image")
    ppm = base64.b64decode(inline.base64 or b"")
    for outcome in ("ok", "cached"):
        prepared = await images.inline(photo, "image", "t", "request")
        found = plugin().URL_PATTERN.fullmatch(prepared.url)
        assert found and prepared.outcome == outcome and prepared.base64 is None
        file = tmp_path / found[1] / found[2]
        assert ppm.endswith(file.read_bytes()[int(found[5]) :])
        assert (int(found[3]), int(found[4])) == (prepared.height, prepared.width)
        images.release("request")
        assert not file.exists()
    folder.close()


@pytest.mark.parametrize(
    "url",
    [
        "sidecar-shm://../out-" + "0" * 32 + "?h=1&w=1&o=0",
        "sidecar-shm://sidecar-images-x/../../etc/passwd?h=1&w=1&o=0",
    ],
)
def test_the_plugin_takes_no_other_name(url: str) -> None:
    """Nothing that a client writes leads out of the folder."""
    assert plugin().URL_PATTERN.fullmatch(url) is None


async def test_a_repeated_image_is_not_prepared_again(server: Any, spec: Any, tmp_path: Path) -> None:
    """The second time no worker is asked and the results are equal; another tenant starts without a cache."""
    cache = ImageCache(str(tmp_path), 64 << 20, b"secret")
    images = ImageService(server.path, server.settings, spec, cache)
    photo = synthetic_photos.photo(640, 480, seed=3)
    first = (await images.tensors([(photo, False)], tenant="a"))[0]
    await images.close()  # what is on its way into the cache is awaited
    images = ImageService("/nowhere", server.settings, spec, cache)
    again = (await images.tensors([(photo, False)], tenant="a"))[0]
    assert bytes(again.values) == bytes(first.values)
    assert (first.prepared.outcome, again.prepared.outcome) == ("ok", "cached")
    assert again.prepared.grid == first.prepared.grid and again.prepared.bytes_out == len(first.values)
    assert cache.get(cache.key(photo, TENSORS, "False", spec.to_json(), "b")) is None
