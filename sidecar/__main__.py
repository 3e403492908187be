"""The commands: argv, environment and file to settings. Only this module sets exit codes: 0 done, 1 failed, 2 usage."""

from __future__ import annotations

import difflib
import importlib
import json
import os
import sys
from collections.abc import Callable, Mapping
from dataclasses import fields
from typing import Any, Final, Literal

import click
from click.shell_completion import CompletionItem

from sidecar import __version__, settings
from sidecar.control import state_dir as statefile
from sidecar.errors import SidecarError, UsageError
from sidecar.flags import Parser, headings
from sidecar.health import probes
from sidecar.runtime import logs
from sidecar.settings import Settings


def main() -> None:
    """Entry point of the `sidecar` command."""
    sys.exit(run(sys.argv[1:]))


def run(argv: list[str]) -> int:
    """Run one command; returns its exit code."""
    return run_to_exit_code(lambda: int(cli.main(argv, prog_name="sidecar", standalone_mode=False) or 0))


def run_to_exit_code(job: Callable[[], int]) -> int:
    """Run a command or a whole process; returns its exit code. Each SidecarError becomes one line on stderr."""
    try:
        return _unwrap_group(job)
    except click.exceptions.Exit as e:
        return e.exit_code
    except click.exceptions.NoArgsIsHelpError as e:
        print(e.format_message(), file=sys.stderr)
        return 2
    except click.NoSuchOption as e:
        return _fail(settings.explain_removed(e.option_name) or _one_line(e), 2)
    except click.ClickException as e:
        return _fail(_one_line(e), 2)
    except SidecarError as e:
        return _fail(str(e), 2 if isinstance(e, UsageError) else 1)
    except (KeyboardInterrupt, click.Abort):
        return 130


# Imported on use, because kubelet starts `sidecar probe` every few seconds: name -> (module, settings class).
LAZY_COMMANDS: Final = {
    "status": ("sidecar.tools.status", "StatusSettings"),
    "top": ("sidecar.tools.top", "TopSettings"),
    "engine": ("sidecar.tools.scripted_engine.server", "EngineSettings"),
    "demo": ("sidecar.tools.demo.command", "DemoSettings"),
    "inject": ("sidecar.tools.manifests.inject", "InjectSettings"),
    "manifests": ("sidecar.tools.manifests.render", "ManifestSettings"),
    "usage": ("sidecar.tools.usage", "UsageSettings"),
    "forecast": ("sidecar.tools.forecast", "ForecastSettings"),
    "cel": ("sidecar.tools.cel", "CelSettings"),
    "calibrate": ("sidecar.tools.calibrate.command", "CalibrateSettings"),
    "bench": ("sidecar.tools.bench.command", "BenchSettings"),
    "render": ("sidecar.tools.render_server", "RenderServerSettings"),
}
# Commands below one of them.
LAZY_SUBCOMMANDS: Final = {
    "usage": {
        "export": ("sidecar.tools.usage_export", "ExportSettings"),
        "merge": ("sidecar.tools.usage_merge", "MergeSettings"),
    }
}
# Those that write files in the formats of other programs, or run until they are stopped: they have no result to report,
# and so no --json. All others print one JSON document with it, and progress and errors on stderr.
WITHOUT_JSON: Final = frozenset({"run", "engine", "render", "manifests", "inject", "usage export"})

# What `sidecar --help` shows together.
COMMAND_GROUPS: Final = {
    "Run": ("run", "render", "probe"),
    "Look": ("status", "top", "doctor"),
    "Deploy": ("manifests", "inject"),
    "Measure": ("calibrate", "bench"),
    "Account and plan": ("usage", "forecast", "cel"),
    "Try out": ("demo", "engine"),
}
MAX_HELP_CHARS: Final = 200
JSON_HELP: Final = "Print the result as one JSON document; progress goes to stderr"


class Commands(click.Group):
    """The commands; those of LAZY_COMMANDS are imported on use."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return sorted({*super().list_commands(ctx), *LAZY_COMMANDS})

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """The command that was named; the error for an unknown one names the nearest."""
        if args and not args[0].startswith("-") and self.get_command(ctx, args[0]) is None:
            near = difflib.get_close_matches(args[0], self.list_commands(ctx), n=1)
            ctx.fail(f"no command is named {args[0][:80]!r}" + (f"; did you mean {near[0]!r}?" if near else ""))
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """The commands in COMMAND_GROUPS, each with its whole first sentence."""
        for title, names in COMMAND_GROUPS.items():
            commands = ((name, self.get_command(ctx, name)) for name in names)
            rows = [(name, command.get_short_help_str(MAX_HELP_CHARS)) for name, command in commands if command]
            with formatter.section(title):
                formatter.write_dl(rows)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in LAZY_COMMANDS:
            return super().get_command(ctx, cmd_name)
        return _lazy_command(cmd_name, *LAZY_COMMANDS[cmd_name], LAZY_SUBCOMMANDS.get(cmd_name, {}))


class SettingOption(click.Option):
    """The flag of a setting: `--help` shows it below its heading, and shells complete its value."""

    def __init__(self, *args: Any, heading: str, parser: Parser, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.heading, self._parser = heading, parser

    def shell_complete(self, ctx: click.Context, incomplete: str) -> list[CompletionItem]:
        if kind := {"FILE": "file", "DIR": "dir"}.get(self._parser.metavar):
            return [CompletionItem(incomplete, type=kind)]
        return [CompletionItem(choice) for choice in self._parser.choices if choice.startswith(incomplete)]


class GroupedCommand(click.Command):
    """A command whose `--help` shows its settings below their headings, and what has none last."""

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        sections: dict[str, list[tuple[str, str]]] = {}
        for param in self.get_params(ctx):
            if (row := param.get_help_record(ctx)) is not None:
                sections.setdefault(getattr(param, "heading", ""), []).append(row)
        others = sections.pop("", [])
        for heading, rows in [*sections.items(), ("Other options" if sections else "Options", others)]:
            with formatter.section(heading):
                formatter.write_dl(rows)


class GroupedGroup(click.Group, GroupedCommand):
    """The same, with commands below it."""

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        GroupedCommand.format_options(self, ctx, formatter)
        self.format_commands(ctx, formatter)


def _lazy_command(
    name: str, module: str, settings_class: str, subcommands: Mapping[str, tuple[str, str]]
) -> click.Command:
    """A command whose code is imported now, with those below it."""
    code = importlib.import_module(module)
    cls = getattr(code, settings_class)

    def command(config: str | None, as_json: bool = False, **flags: str | tuple[str, ...] | None) -> int:
        texts = {flag: ",".join(value) or None if isinstance(value, tuple) else value for flag, value in flags.items()}
        if (subcommand := click.get_current_context().invoked_subcommand) is not None:
            if config or as_json or any(texts.values()):
                raise UsageError(f"put the flags of `sidecar {name} {subcommand}` after its name")
            return 0
        if as_json and texts.get("format") not in (None, "json"):
            raise UsageError("--json and --format: use only one of them")
        chosen = settings.load(cls, texts, os.environ, config, also=(Settings,))
        return int(code.main(chosen, as_json) if reports else code.main(chosen))

    reports = name not in WITHOUT_JSON
    summary = str(code.__doc__).strip().splitlines()[0]
    callback = add_options(cls)(add_json(command) if reports else command)
    whole = click.command(name, cls=GroupedCommand, help=summary)(callback)
    if not subcommands:
        return whole
    group = GroupedGroup(name, invoke_without_command=True, help=summary)
    group.callback, group.params = command, whole.params
    for subcommand, (module, settings_class) in subcommands.items():
        below = _lazy_command(f"{name} {subcommand}", module, settings_class, {})
        group.add_command(below, subcommand)
    return group


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(__version__, prog_name="sidecar")
def cli() -> None:
    """A sidecar for one LLM inference engine: progress verdicts, load in model units, images off the hot path."""


def add_options(cls: type) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Add one option per field of a settings class. The values stay text until settings.load parses them."""

    heading_of = headings(fields(cls))

    def wrap(command: Callable[..., Any]) -> Callable[..., Any]:
        for field in reversed(fields(cls)):
            parser: Parser = field.metadata["parser"]
            choices = f"; {parser.expected}" if parser.metavar in ("NAME", "NAMES") else ""
            text = f"{field.metadata['help']}{choices} [{settings.format_default(field)}]"
            if field.metadata.get("positional"):
                command = click.argument(field.name, nargs=-1, metavar=parser.metavar)(command)
                continue
            name = settings.format_key(field.name)
            names = [name, "-f"] if field.name == "file" else [name]
            made: dict[str, Any] = {"cls": SettingOption, "heading": heading_of[field.name], "parser": parser}
            command = click.option(*names, field.name, metavar=parser.metavar, help=text, **made)(command)
        return click.option("--config", default=None, metavar="FILE", help="TOML file of settings [none]")(command)

    return wrap


def add_json(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add `--json`, which means the same for every command that reports."""
    return click.option("--json", "as_json", is_flag=True, help=JSON_HELP)(command)


@cli.command("run", cls=GroupedCommand)
@add_options(Settings)
@click.argument("command", nargs=-1, metavar="[-- COMMAND]")
def run_command(command: tuple[str, ...], config: str | None, **flags: str | None) -> int:
    """Run the sidecar next to an engine. With -- COMMAND, start the engine, and restart it when it hangs or ends."""
    chosen = settings.load(Settings, flags, os.environ, config)
    if command:
        from sidecar.launch import preflight

        chosen = preflight.with_command(chosen, command)
    if not chosen.engine:
        raise UsageError("--engine is missing; expected the engine's base URL, e.g. --engine http://127.0.0.1:8000")
    logs.setup(chosen.log_level)
    from sidecar.launch import process_tree  # here, so that `sidecar probe` starts quickly

    return process_tree.main(chosen, run_to_exit_code, command)


@cli.command("probe")
@add_json
@click.argument("kind", type=click.Choice((*probes.KINDS, "self")), metavar="|".join((*probes.KINDS, "self")))
@click.option("--state-dir", default=None, metavar="DIR", help="Directory shared with the sidecar [/run/sidecar]")
@click.option("--admin", default=None, metavar="HOST:PORT", help="Of `self`: the sidecar's admin port [0.0.0.0:9400]")
def probe_command(kind: Literal["self"] | probes.Kind, state_dir: str | None, admin: str | None, as_json: bool) -> int:
    """Exec probe: reads the verdict file, needs no network. Passes if the file is missing or stale.

    `self` asks the sidecar's own /healthz instead, for containers without curl, and fails without an answer.
    """
    if kind == "self":
        from sidecar.tools import self_probe

        passed, text = self_probe.ask(admin or os.environ.get("SIDECAR_ADMIN") or "")
    else:
        path = state_dir or os.environ.get("SIDECAR_STATE_DIR") or str(Settings().state_dir)
        passed, text = probes.exec_answer(kind, *statefile.read(path))
    click.echo(json.dumps({"probe": kind, "passes": passed, "detail": text}, indent=1) if as_json else text)
    return 0 if passed else 1


@cli.command("doctor", cls=GroupedCommand)
@add_options(Settings)
@add_json
def doctor_command(as_json: bool, config: str | None, **flags: str | None) -> int:
    """Check settings, engine, GPU, shared memory and CPU quota; report what is missing and how to fix it."""
    from sidecar.tools.doctor import report

    return report.main(settings.load(Settings, flags, os.environ, config), as_json)


@cli.command("image-server", hidden=True)
@click.option("--listen-fd", type=int, required=True)
def image_command(listen_fd: int) -> int:
    """The image server; started by `run`, which writes the settings to its standard input."""
    from sidecar.images.worker import fork_server

    return fork_server.main(listen_fd, sys.stdin.readline())


def _unwrap_group(job: Callable[[], int]) -> int:
    """Run `job`. A SidecarError inside an exception group is raised alone."""
    try:
        return job()
    except BaseExceptionGroup as group:
        errors = group.subgroup(SidecarError)
        if errors is None:
            raise
        error: BaseException = errors
        while isinstance(error, BaseExceptionGroup):
            error = error.exceptions[0]
        raise error from None


def _one_line(error: click.ClickException) -> str:
    """Click's message, which names the flag and the nearest one, as one line that says where to look."""
    text = " ".join(error.format_message().split()).rstrip(".")
    if not isinstance(error, click.UsageError) or error.ctx is None:
        return text
    return f"{text}{' See' if text.endswith('?') else '; see'} `{error.ctx.command_path} --help`"


def _fail(text: str, code: int) -> int:
    print(f"sidecar: {text}", file=sys.stderr)
    return code


if __name__ == "__main__":
    main()
