"""Settings: their sources, and the errors of invalid ones."""

from __future__ import annotations

import importlib
import os
import re
from dataclasses import fields
from pathlib import Path

import click
import pytest

from sidecar import __main__, settings
from sidecar.errors import UsageError
from sidecar.settings import REMOVED, Settings, load


def test_flag_beats_environment_beats_file_beats_default(tmp_path: Path) -> None:
    """Precedence, one key per source."""
    file = tmp_path / "sidecar.toml"
    file.write_text('workers = 2\ncanary-interval = 7.5\nslo-seconds = 3\nlisten = "127.0.0.1:1"\n')
    env = {"SIDECAR_WORKERS": "3", "SIDECAR_CANARY_INTERVAL": "8", "SIDECAR_CONFIG": str(file)}
    got = load(Settings, {"workers": "4", "admin": None}, env)
    assert (got.workers, got.canary_interval, got.slo_seconds) == (4, 8.0, 3.0)
    assert got.listen == ("127.0.0.1", 1) and got.admin == ("0.0.0.0", 9400)


@pytest.mark.parametrize(
    ("flags", "env", "file", "words"),
    [
        ({"workers": "0"}, {}, "", ["--workers", "'0'", "1 to 64"]),
        ({"engine": "ftp://x"}, {}, "", ["--engine", "http(s) URL"]),
        ({"listen": "8080"}, {}, "", ["--listen", "HOST:PORT"]),
        ({"gpu_memory_budget": "lots"}, {}, "", ["--gpu-memory-budget", "1G"]),
        ({"model": "/nowhere"}, {}, "", ["--model", "existing directory"]),
        ({}, {"SIDECAR_WORKRS": "1"}, "", ["SIDECAR_WORKRS", "SIDECAR_WORKERS"]),
        ({}, {"SIDECAR_IMAGES": "often"}, "", ["SIDECAR_IMAGES", "auto, off"]),
        ({}, {}, "worker = 1", ["worker", "workers"]),
        ({}, {}, "workers = 'many'", ["workers", "'many'", "1 to 64"]),
        ({}, {}, "workers = [", ["--config", "TOML"]),
    ],
)
def test_a_wrong_setting_is_one_line_that_names_key_expectation_and_neighbour(
    tmp_path: Path, flags: dict[str, str], env: dict[str, str], file: str, words: list[str]
) -> None:
    """The error names the key, what was expected, and the nearest valid key."""
    path = tmp_path / "sidecar.toml"
    path.write_text(file)
    with pytest.raises(UsageError) as e:
        load(Settings, flags, env, str(path))
    text = str(e.value)
    assert "\n" not in text
    assert all(word in text for word in words), text


@pytest.mark.parametrize("command", ["run", "doctor", "manifests"])
@pytest.mark.parametrize("argument", ["--restart-budget=models/llm:1", "--restart-budget-wait", "--restarts-at-once=2"])
def test_a_removed_flag_says_what_became_of_it(command: str, argument: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Whatever command it is given to: exit code 2, and one line with the flag and what there is instead."""
    assert __main__.run([command, argument]) == 2
    name = argument.split("=")[0]
    error = capsys.readouterr().err
    assert error == f"sidecar: {name} no longer exists: {REMOVED[name[2:]]}; see docs/reference.md\n"


@pytest.mark.parametrize("name", REMOVED)
def test_a_removed_key_of_environment_or_file_says_what_became_of_it(name: str, tmp_path: Path) -> None:
    """The line names the key as it is written there, with hyphens or underscores."""
    variable, file = f"SIDECAR_{name.upper().replace('-', '_')}", tmp_path / "sidecar.toml"
    with pytest.raises(UsageError) as error:
        load(Settings, {}, {variable: "1"})
    assert str(error.value) == f"{variable} no longer exists: {REMOVED[name]}; see docs/reference.md"
    for key in (name, name.replace("-", "_")):
        file.write_text(f"{key} = 1\n")
        with pytest.raises(UsageError) as error:
            load(Settings, {}, {}, str(file))
        assert str(error.value) == f"{name} no longer exists: {REMOVED[name]}; see docs/reference.md"


def test_what_is_removed_is_no_setting() -> None:
    """No removed name is a flag of any command, and each sentence is one line that names only flags that exist."""
    context = click.Context(__main__.cli)
    commands = [__main__.cli.get_command(context, name) for name in __main__.cli.list_commands(context)]
    current = {option for command in commands if command for p in command.params for option in p.opts}
    assert "--silence-floor" in current
    assert {f"--{name}" for name in REMOVED} & current == set()
    for sentence in REMOVED.values():
        assert "\n" not in sentence and not sentence.endswith(".")
        assert set(re.findall(r"--[a-z-]+", sentence)) <= current


def test_a_service_named_sidecar_does_not_break_the_pod() -> None:
    """Kubernetes injects SIDECAR_PORT and its kin for a Service of that name."""
    env = {
        "SIDECAR_SERVICE_HOST": "10.0.0.1",
        "SIDECAR_SERVICE_PORT": "80",
        "SIDECAR_SERVICE_PORT_HTTP": "80",
        "SIDECAR_PORT": "tcp://10.0.0.1:80",
        "SIDECAR_PORT_80_TCP_ADDR": "10.0.0.1",
    }
    assert load(Settings, {}, env) == Settings()


def test_a_secret_is_never_in_an_error() -> None:
    """The value of a secret setting is not echoed."""
    secret = [f.name for f in fields(Settings) if f.metadata["secret"]]
    assert secret == ["engine_key", "usage_url"]
    with pytest.raises(UsageError) as raised:
        load(Settings, {"usage_url": "mysql://user:secret-word@host/db"}, {})
    assert "secret-word" not in str(raised.value) and "postgresql://" in str(raised.value)


def test_settings_survive_the_trip_to_a_relay_process() -> None:
    """from_json(to_json(x)) == x."""
    chosen = load(Settings, {"engine": "http://e:8000/", "image_max_bytes": "5M"}, {})
    assert settings.from_json(settings.to_json(chosen)) == chosen
    assert chosen.engine == "http://e:8000" and chosen.image_max_bytes == 5 << 20


@pytest.mark.parametrize(
    "cls", [Settings, *(getattr(importlib.import_module(m), name) for m, name in __main__.LAZY_COMMANDS.values())]
)
def test_every_default_is_a_valid_value(cls: type) -> None:
    """Each default passes its own parser, which has an expectation and a metavar."""
    for f in fields(cls):
        assert f.metadata["parser"].expected and f.metadata["parser"].metavar, f.name
        default = f.default
        if default == "" or isinstance(default, tuple):
            continue
        assert f.metadata["parser"].parse(str(default)) == default, f.name


def test_a_file_of_settings_that_is_no_text_is_named(tmp_path: Path) -> None:
    """Bytes that are not UTF-8 are an invalid file, not a bug."""
    path = tmp_path / "sidecar.toml"
    path.write_bytes(b"a = \xff\n")
    with pytest.raises(UsageError, match="is not TOML"):
        load(Settings, {}, {}, str(path))


def test_help_shows_the_form_of_each_value(capsys: pytest.CaptureFixture[str]) -> None:
    """Help has choices, kinds and defaults in their unit."""
    assert __main__.run(["run", "--help"]) == 0
    text = " ".join(capsys.readouterr().out.split())
    for part in ("--images auto|off|inline|shm ", "--listen HOST:PORT ", "--model DIR ", "[1024M]", "[12]"):
        assert part in text, part
    assert __main__.run(["engine", "--help"]) == 0
    assert "--fault NAME A fault that is active from the start; one of freeze, freeze_busy" in " ".join(
        capsys.readouterr().out.split()
    )


def test_without_a_command_the_commands_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    """Without a command: the help on stderr, and exit code 2."""
    assert __main__.run([]) == 2
    assert "\n  run " in capsys.readouterr().err


def test_an_unwritable_file_is_rejected_before_measuring(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An unwritable report is rejected at once, with the name of its flag; an existing file is overwritten."""
    (tmp_path / "there").touch()
    settings.require_writable("plot", str(tmp_path / "there"))
    settings.require_writable("plot", str(tmp_path / "new"))
    for place, words in ((tmp_path, "is a directory"), (tmp_path / "no" / "file", "does not exist")):
        with pytest.raises(UsageError, match=f"--plot.*{words}"):
            settings.require_writable("plot", str(place))
    monkeypatch.setattr(os, "access", lambda *_: False)  # root may write everything
    with pytest.raises(UsageError, match="no permission"):
        settings.require_writable("plot", str(tmp_path / "new"))


@pytest.mark.parametrize(
    ("text", "engine"),
    [
        ("http://127.0.0.1:8000/", "http://127.0.0.1:8000"),
        ("https://engine.example/v", "https://engine.example/v"),
        ("unix:/run/engine.sock", "unix:/run/engine.sock"),
        ("unix:///run/engine.sock", "unix:/run/engine.sock"),
        ("http+unix://%2Frun%2Fengine.sock", "unix:/run/engine.sock"),
    ],
)
def test_an_engine_is_a_url_or_a_socket(text: str, engine: str) -> None:
    """Each spelling of a socket is one and the same engine."""
    assert load(Settings, {"engine": text}, {}).engine == engine


@pytest.mark.parametrize("text", ["unix:run/engine.sock", "unix:", "unix://host", "unix:/" + "x" * 107, "/run/x.sock"])
def test_what_is_no_engine_is_refused(text: str) -> None:
    """A socket needs a whole path that the kernel takes, and the error shows one."""
    with pytest.raises(UsageError, match=r"unix:/run/engine\.sock"):
        load(Settings, {"engine": text}, {})


def test_a_file_without_a_certificate_is_refused_at_the_start(tmp_path: Path) -> None:
    """Neither a text nor a missing file becomes a connection that fails later."""
    (tmp_path / "ca.pem").write_text("no certificate")
    for name in ("ca.pem", "absent.pem", "."):
        with pytest.raises(UsageError, match=r"--engine-ca: .* is not a file of PEM certificates"):
            load(Settings, {"engine_ca": str(tmp_path / name)}, {})
