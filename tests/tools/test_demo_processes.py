"""The demo's ports, files and containers."""

from __future__ import annotations

import json
import shutil
import socket
from collections.abc import Iterator

import pytest

from sidecar.errors import StartError
from sidecar.settings import Settings
from sidecar.tools.demo import processes
from sidecar.tools.demo.processes import QUICK_SETTINGS, DemoProcesses


@pytest.fixture
def stage() -> Iterator[DemoProcesses]:
    made = processes.make(("127.0.0.1", 0), ("127.0.0.1", 0))
    yield made
    shutil.rmtree(made.directory)


def test_a_taken_port_is_replaced_and_told() -> None:
    """If the wanted port is in use, another is chosen, and one line names both."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        made = processes.make(("127.0.0.1", 0), ("127.0.0.1", port))
    shutil.rmtree(made.directory)
    assert made.admin[1] > port
    assert [n for n in made.notes if "in use" in n] == [
        f"127.0.0.1:{port} is in use; --admin is 127.0.0.1:{made.admin[1]} instead"
    ]


def test_a_host_that_is_not_ours_is_an_error() -> None:
    """An address that cannot be bound at all ends the start with a line that names the flags."""
    with pytest.raises(StartError, match=r"192\.0\.2\.1; choose another with --listen and --admin"):
        processes.find_free_address(("192.0.2.1", 80))


def test_a_free_port_is_kept(unused_tcp_port: int) -> None:
    """A free wanted port is used without a note."""
    made = processes.make(("127.0.0.1", unused_tcp_port), ("127.0.0.1", 0))
    shutil.rmtree(made.directory)
    assert made.relay == ("127.0.0.1", unused_tcp_port)
    assert not [n for n in made.notes if "in use" in n]


def test_the_model_directory_is_one(stage: DemoProcesses) -> None:
    """The temporary model directory holds what image preparation reads of a Qwen2-VL."""
    made = json.loads((stage.directory / "model" / "preprocessor_config.json").read_text())
    assert made["image_processor_type"] == "Qwen2VLImageProcessor"
    assert (made["patch_size"], made["merge_size"]) == (14, 2)


def test_containers_keep_our_environment_out(stage: DemoProcesses, monkeypatch: pytest.MonkeyPatch) -> None:
    """SIDECAR_* variables of the caller reach neither container; the shortened settings reach the sidecar as flags."""
    monkeypatch.setenv("SIDECAR_ENGINE", "http://elsewhere:1")
    monkeypatch.setenv("HOME", "/somewhere")
    for container in (stage.sidecar(), stage.engine_container()):
        assert container.env is not None
        assert container.env["HOME"] == "/somewhere"
        assert not [key for key in container.env if key.startswith("SIDECAR_")]
    command = stage.sidecar().command
    assert command[command.index("--silence-floor") + 1] == QUICK_SETTINGS["silence_floor"]
    assert command[command.index("--engine") + 1] == processes.url(stage.engine)


def test_the_engine_is_probed_through_the_sidecar(stage: DemoProcesses) -> None:
    """Each of the engine's probes asks the admin port, and liveness keeps Kubernetes' threshold of three."""
    probes = stage.engine_container().probes
    admin = processes.url(stage.admin)
    paths = {"startup": "startupz", "readiness": "readyz", "liveness": "livez"}
    assert {kind: spec.url for kind, spec in probes.items()} == {
        kind: f"{admin}/{path}" for kind, path in paths.items()
    }
    assert probes["liveness"].failure_threshold == 3


def test_quick_settings_are_told_with_the_defaults() -> None:
    """Shortened settings are printed together with their defaults."""
    said = processes.describe_quick_settings()
    assert "--silence-floor 3 (default 12)" in said
    assert f"--canary-interval 3 (default {Settings().canary_interval:g})" in said


@pytest.mark.parametrize(
    ("address", "expected"),
    [
        (("127.0.0.1", 80), "http://127.0.0.1:80"),
        (("0.0.0.0", 80), "http://127.0.0.1:80"),
        (("::", 80), "http://[::1]:80"),
    ],
)
def test_url(address: tuple[str, int], expected: str) -> None:
    """A URL that a client on this machine can use, for any listening address."""
    assert processes.url(address) == expected
