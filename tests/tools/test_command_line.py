"""The command line as users see it: help in groups, one meaning of --json, helpful errors, completion."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path

import click
import pytest

from sidecar import __main__
from sidecar.settings import Settings, format_key


def all_commands() -> Iterator[tuple[str, click.Command]]:
    """Every command that users see, those below others, too."""
    context = click.Context(__main__.cli)
    for name in __main__.cli.list_commands(context):
        command = __main__.cli.get_command(context, name)
        assert command is not None
        if command.hidden:
            continue
        yield name, command
        if isinstance(command, click.Group):
            yield from ((f"{name} {below}", it) for below, it in command.commands.items())


COMMANDS = dict(all_commands())


def test_each_command_is_in_one_group() -> None:
    """Help lists every command once, under a title."""
    grouped = [name for names in __main__.COMMAND_GROUPS.values() for name in names]
    assert sorted(grouped) == sorted(name for name in COMMANDS if " " not in name)


def test_help_of_the_commands_is_grouped_and_whole(capsys: pytest.CaptureFixture[str]) -> None:
    """Titles stand above their commands, and no sentence is cut."""
    assert __main__.run(["--help"]) == 0
    text = capsys.readouterr().out
    order = [text.index(f"\n{title}:\n") for title in __main__.COMMAND_GROUPS]
    assert order == sorted(order)
    assert "...\n" not in text.partition("\n")[2] and "\n  status  " in text


@pytest.mark.parametrize("name", ["run", "doctor", "manifests", "inject", "engine"])
def test_a_long_list_of_flags_is_parted(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    """A command with many flags shows them below headings, each flag once."""
    assert __main__.run([name, "--help"]) == 0
    text = capsys.readouterr().out
    parts = [line[:-1] for line in text.splitlines() if line.endswith(":") and not line.startswith(" ")]
    assert len(parts) >= 3 and parts[-1] == "Other options" and len(parts) == len(set(parts))
    shown = [word.split()[0] for word in text.splitlines() if word.startswith("  -")]
    assert len(shown) == len(set(shown)), "no flag is shown twice"
    flags = [option.opts[0] for option in COMMANDS[name].params if isinstance(option, click.Option)]
    lines = [line.split()[:2] for line in text.splitlines()]
    assert [flag for flag in flags if not any(flag in start for start in lines)] == []


def test_every_setting_of_run_has_a_heading() -> None:
    """None is left to the other options, which are those of no setting."""
    options = {o.opts[0]: o for o in COMMANDS["run"].params if isinstance(o, __main__.SettingOption)}
    assert [format_key(f.name) for f in fields(Settings) if not options[format_key(f.name)].heading] == []


def test_json_means_one_thing() -> None:
    """Every command that reports takes --json with the same words; those without a result are named."""
    with_json = {
        name for name, command in COMMANDS.items() for p in command.params if p.opts[0] == "--json" and p.is_flag
    }
    assert with_json == set(COMMANDS) - __main__.WITHOUT_JSON
    helps = {p.help for command in COMMANDS.values() for p in command.params if p.opts[0] == "--json"}  # type: ignore[attr-defined]
    assert helps == {__main__.JSON_HELP}


@pytest.mark.parametrize(
    ("argv", "code"),
    [
        (["probe", "live", "--json", "--state-dir", "."], 0),
        (["probe", "self", "--json", "--admin", "127.0.0.1:1"], 1),
        (["status", "--json", "--admin", "127.0.0.1:1"], 3),
        (["top", "--json", "--admin", "127.0.0.1:1"], 3),
        (["cel", "--json"], 0),
    ],
)
def test_json_is_one_document(argv: list[str], code: int, capsys: pytest.CaptureFixture[str]) -> None:
    """Standard output is JSON and nothing else, also where the answer is bad; the exit code is that of the text."""
    assert __main__.run(argv) == code
    json.loads(capsys.readouterr().out)
    assert __main__.run([word for word in argv if word != "--json"]) == code


def test_json_and_another_form_exclude_each_other(capsys: pytest.CaptureFixture[str]) -> None:
    """What is asked for twice in different ways is an error, not a silent choice."""
    assert __main__.run(["usage", "--json", "--format", "csv"]) == 2
    assert "--json and --format" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["stat"], "did you mean 'status'? See `sidecar --help`"),
        (["usage", "exprt"], "Did you mean 'export'? See `sidecar usage --help`"),
        (["status", "more"], "see `sidecar status --help`"),
        (["probe"], "live, ready, startup, self; see `sidecar probe --help`"),
        (["run", "--engin", "x"], "'--engine'"),
        (["status", "--admin", "localhost"], "'localhost' is not HOST:PORT, such as 127.0.0.1:9400"),
        (["top", "--interval", "soon"], "'soon' is not a number of seconds from 0.2 to 3600"),
    ],
)
def test_an_error_is_one_line_that_says_what_to_do(
    argv: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Wrong usage ends with 2 and one line on stderr."""
    assert __main__.run(argv) == 2
    printed = capsys.readouterr()
    assert printed.out == "" and printed.err.count("\n") == 1 and words in printed.err


@pytest.mark.parametrize(
    ("typed", "offered"),
    [
        ("sidecar st", {"status"}),
        ("sidecar run --engine-kind ll", {"llamacpp"}),
        ("sidecar usage ex", {"export"}),
        ("sidecar probe li", {"live"}),
        ("sidecar manifests --probe ", {"safe", "http", "restart-rules"}),
    ],
)
def test_shells_complete_commands_flags_and_values(typed: str, offered: set[str]) -> None:
    """Completion is click's own protocol, as the reference says; values of few choices are known to it."""
    words = typed.split(" ")
    env = os.environ | {"_SIDECAR_COMPLETE": "bash_complete", "COMP_WORDS": typed, "COMP_CWORD": str(len(words) - 1)}
    command = [str(Path(sys.executable).parent / "sidecar")]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=60, check=False)
    assert {line.partition(",")[2] for line in done.stdout.splitlines()} == offered, done.stderr
