"""The mark that shows a vLLM with the plugin, written by real processes."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from sidecar.images.shm_cache import CacheFolder, ImageCache, shared_group
from sidecar.images.vllm_plugin import (
    CHECK_INTERVAL_S,
    MARK_PREFIX,
    NO_HANDOFFS,
    PluginWatch,
    check_mark,
    check_offer,
    read_status,
)
from sidecar.kernels import families
from tests.waiting import PATIENCE

from .conftest import QWEN2_VL
from .test_imagecache import plugin

QWEN: Any = families.from_config(QWEN2_VL)
NO_PLUGIN = "no vLLM with the sidecar's plugin"
ENGINE = (
    "import sys; sys.path.insert(0, sys.argv[1]); import sidecar_vllm, pathlib; "
    "sidecar_vllm.leave_mark(pathlib.Path(sys.argv[2])); print('left', flush=True); sys.stdin.read()"
)
SOURCES = Path(__file__).parents[2] / "plugins/vllm"
Start = Callable[..., subprocess.Popen[str]]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    """A function: starts a process that has left its mark, as each of vLLM's does."""
    with ExitStack() as stack:

        def run(connector: str = "inference_sidecar") -> subprocess.Popen[str]:
            env = os.environ | {"VLLM_MEDIA_CONNECTOR": connector}
            command = [sys.executable, "-c", ENGINE, str(SOURCES), str(tmp_path)]
            process = stack.enter_context(
                subprocess.Popen(command, env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
            )
            stack.callback(process.kill)
            assert process.stdout is not None and process.stdout.readline() == "left\n"
            return process

        yield run


def end(process: subprocess.Popen[str]) -> None:
    process.kill()
    process.wait(PATIENCE)


def test_a_mark_lives_as_long_as_the_processes_that_left_it(start: Start, tmp_path: Path) -> None:
    """With no, one, two, one, no process: the file stays, is void once the last process is killed, and is reused."""
    assert read_status(str(tmp_path)).why.startswith(NO_PLUGIN)
    first, second = start(), start()
    assert read_status(str(tmp_path)).why == ""
    end(first)
    assert read_status(str(tmp_path)).why == "" and read_status(str(tmp_path)).version == plugin().__version__
    end(second)
    assert read_status(str(tmp_path)).why.startswith(NO_PLUGIN) and len(list(tmp_path.iterdir())) == 1
    start()
    assert read_status(str(tmp_path)).why == "" and len(list(tmp_path.iterdir())) == 1


def test_a_plugin_that_is_not_in_use_is_told_from_none(start: Start, tmp_path: Path) -> None:
    """vLLM loads every plugin that is installed, and uses the connector that its environment names."""
    start("http")
    assert "VLLM_MEDIA_CONNECTOR is 'http'" in read_status(str(tmp_path)).why


GOOD = {"form": 1, "version": "0.1.0", "pid": 7, "user": 5, "reads_all": False, "connector": "inference_sidecar"}
JUDGED: dict[str, tuple[Any, str]] = {
    "the same user": (GOOD, ""),
    "one who may read all": (GOOD | {"user": 0, "reads_all": True}, ""),
    "root without capabilities": (GOOD | {"user": 0}, "may not read"),
    "a group that has none here": (GOOD | {"user": 0, "groups": [0, 9]}, "may not read"),
    "another form": (GOOD | {"form": 2}, "does not match this sidecar's version"),
    "another connector": (GOOD | {"connector": ""}, "VLLM_MEDIA_CONNECTOR is ''"),
    "too little": ({"form": 1}, "cannot be read"),
    "no object": ([], "cannot be read"),
    "no numbers": (GOOD | {"user": "x"}, "cannot be read"),
}


@pytest.mark.parametrize("case", JUDGED)
def test_what_a_mark_says(case: str) -> None:
    """Images go through shared memory only where the one who left the mark can read them; else the reason is named."""
    said, why = JUDGED[case]
    found = check_mark(json.dumps(said).encode().ljust(512), user=5).why
    assert why in found and bool(why) == bool(found)


SETTINGS = {
    "do_resize": True,
    "do_convert_rgb": True,
    "resample": 3,
    "patch_size": 14,
    "temporal_patch_size": 2,
    "merge_size": 2,
    "min_pixels": QWEN.min_pixels,
    "max_pixels": 224 * 224,
    "do_rescale": False,
    "do_normalize": False,
    "rescale_factor": 1 / 255,
    "image_mean": [0.48145466, 0.4578275, 0.40821073],
    "image_std": [0.26862954, 0.26130258, 0.27577711],
}
OFFER = GOOD | {"processor": "Qwen2VLImageProcessor", "settings": SETTINGS, "dtype": "U8", "cache_bytes": 9}
FLOATS = OFFER | {"settings": SETTINGS | {"do_rescale": True, "do_normalize": True}, "dtype": "BF16"}
OFFERS: dict[str, tuple[Any, str]] = {
    "bytes": (OFFER, ""),
    "halves": (FLOATS, ""),
    "another size": (OFFER | {"settings": SETTINGS | {"max_pixels": 1}}, "max_pixels"),
    "no size": (OFFER | {"settings": {}}, "do_resize, resample, patch_size"),
    "other means": (FLOATS | {"settings": FLOATS["settings"] | {"image_mean": [0.5] * 3}}, "image_mean"),
    "bytes that are floats": (OFFER | {"dtype": "F32"}, "'F32'"),
    "floats that are bytes": (FLOATS | {"dtype": "U8"}, "'U8'"),
    "another processor": (OFFER | {"processor": "CLIPImageProcessor"}, "not made here"),
    "another user": (OFFER | {"user": 6}, "may not read"),
    "no settings": (OFFER | {"settings": None}, "cannot be read"),
    "nothing": ({}, "cannot be read"),
}


@pytest.mark.parametrize("case", OFFERS)
def test_what_an_offer_says(case: str) -> None:
    """Tensors go only to a vLLM whose processor has each of the settings that the model's files give here."""
    said, why = OFFERS[case]
    found = check_offer(json.dumps(said).encode().ljust(2048), 5, QWEN)
    assert why in found.why and bool(why) == bool(found.why)
    assert found.why or (found.dtype, found.cache_bytes, found.pid) == (said["dtype"], 9, 7)


def test_a_group_of_the_volume_may_read(tmp_path: Path) -> None:
    """As another user without privileges, in the volume's group: it reads and removes what the sidecar handed over."""
    if os.geteuid():
        pytest.skip("only root can become two users")
    shm = tmp_path / "shm"
    shm.mkdir()
    os.chown(shm, 0, 4242)
    shm.chmod(0o2777)
    for folder in (tmp_path, *tmp_path.parents):  # pytest's own are private, one more of them for each worker
        if folder.stat().st_mode & 0o005 != 0o005:
            folder.chmod(0o755)

    def sidecar() -> bytes:
        folder = CacheFolder(str(shm), 1 << 20)
        cache = ImageCache(folder.path, folder.bytes, b"secret")
        handed, fd = cache.reserve(5)
        os.pwrite(fd, b"bytes", 0)
        assert check_mark(json.dumps(GOOD | {"groups": [4242]}).encode(), 65532, shared_group(str(shm))).why == ""
        assert check_mark(json.dumps(GOOD | {"groups": [4243]}).encode(), 65532, shared_group(str(shm))).why != ""
        return f"{handed.folder}/{handed.name}".encode()

    def engine() -> bytes:
        return bytes(plugin().tensors.map_file(shm / name.decode()))

    def stranger() -> bytes:
        with pytest.raises(ValueError, match="may not be read"):
            plugin().tensors.map_file(shm / name.decode())
        return b"refused"

    name = as_user(65532, 4242, sidecar)
    assert as_user(1234, 4343, stranger) == b"refused"
    assert as_user(1234, 4242, engine) == b"bytes"
    assert not (shm / name.decode()).exists()


def as_user(user: int, group: int, run: Callable[[], bytes]) -> bytes:
    """What `run` returns in a process of another user, who is in one more group."""
    plugin()
    reading, writing = os.pipe()
    if not (pid := os.fork()):
        try:
            os.setgroups([group])
            os.setgid(user)
            os.setuid(user)
            os.write(writing, run())
        finally:
            os._exit(0)
    os.close(writing)
    os.waitpid(pid, 0)
    with os.fdopen(reading, "rb") as answer:
        return answer.read()


def test_strange_files_are_no_marks(tmp_path: Path, start: Start) -> None:
    """A link, a pipe, a folder and a file without a lock are ignored, without waiting, and hide no real mark."""
    elsewhere = tmp_path / "elsewhere"
    elsewhere.write_bytes(json.dumps(GOOD).encode())
    (tmp_path / (MARK_PREFIX + "link")).symlink_to(elsewhere)
    os.mkfifo(tmp_path / (MARK_PREFIX + "pipe"))
    (tmp_path / (MARK_PREFIX + "folder")).mkdir()
    (tmp_path / (MARK_PREFIX + "old")).write_bytes(json.dumps(GOOD | {"user": os.geteuid()}).encode())
    assert read_status(str(tmp_path)).why.startswith(NO_PLUGIN)
    assert read_status(str(tmp_path / "missing")).why.startswith(NO_PLUGIN)
    start()
    assert read_status(str(tmp_path)).why == ""


def test_a_folder_that_cannot_be_written_keeps_no_engine_from_starting(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The plugin says in vLLM's log that images will come inline, and why."""
    plugin().leave_mark(tmp_path / "missing")
    assert "inline" in caplog.text and "No such file" in caplog.text


def test_the_log_names_each_change_once(start: Start, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Looks are at least a second apart; what was said is said again only when it has changed."""
    caplog.set_level(logging.INFO, "sidecar")
    now = [0.0]
    watch = PluginWatch(QWEN, str(tmp_path), lambda: now[0])
    assert [watch(), watch()] == [NO_HANDOFFS, NO_HANDOFFS]
    process = start()
    assert watch() == NO_HANDOFFS, "it looked a moment ago"
    for alive in (True, True, False, False):
        if not alive:
            end(process)
        now[0] += CHECK_INTERVAL_S
        assert watch().pixels is alive
    said = [record.levelname for record in caplog.records]
    assert said == ["WARNING", "INFO", "WARNING"] and "images go inline" in caplog.records[0].message
