"""argv, environment and file -> settings -> command. The only place with exit codes: 0 done, 1 failed, 2 usage."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Callable
from dataclasses import fields
from typing import Any

import click

from sidecar import __version__, settings
from sidecar.control import state_dir as statefile
from sidecar.errors import SidecarError, UsageError
from sidecar.flags import Parser
from sidecar.health import probes
from sidecar.runtime import logs
from sidecar.settings import Settings


def main() -> None:
    """Entry point of the `sidecar` command."""
    sys.exit(run(sys.argv[1:]))


def run(argv: list[str]) -> int:
    """Run one command; returns its exit code."""
    return coded(lambda: int(cli.main(argv, prog_name="sidecar", standalone_mode=False) or 0))


def coded(life: Callable[[], int]) -> int:
    """Run a command, or the life of a process; returns its exit code. Errors of ours are one line on stderr."""
    try:
        return _ungrouped(life)
    except click.exceptions.Exit as e:
        return e.exit_code
    except click.exceptions.NoArgsIsHelpError as e:
        print(e.format_message(), file=sys.stderr)
        return 2
    except click.NoSuchOption as e:
        return _fail(settings.removal(e.option_name) or _one_line(e), 2)
    except click.ClickException as e:
        return _fail(_one_line(e), 2)
    except UsageError as e:
        return _fail(str(e), 2)
    except SidecarError as e:
        return _fail(str(e), 1)
    except (KeyboardInterrupt, click.Abort):
        return 130


# Commands whose modules are heavy: they are imported only when asked for, because kubelet starts `sidecar probe` every few
# seconds. name -> (module, settings class)
HEAVY = {
    "engine": ("sidecar.tools.scripted_engine.server", "EngineSettings"),
    "demo": ("sidecar.tools.demo.command", "DemoSettings"),
    "manifests": ("sidecar.tools.manifests.render", "ManifestSettings"),
    "usage": ("sidecar.tools.usage", "UsageSettings"),
    "cel": ("sidecar.tools.cel", "CelSettings"),
    "calibrate": ("sidecar.tools.calibrate.command", "CalibrateSettings"),
    "bench": ("sidecar.tools.bench.command", "BenchSettings"),
}


class Commands(click.Group):
    """The commands, with those of HEAVY made on demand."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return sorted({*super().list_commands(ctx), *HEAVY})

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name in HEAVY:
            return _heavy(cmd_name, *HEAVY[cmd_name])
        return super().get_command(ctx, cmd_name)


def _heavy(name: str, module: str, settings_class: str) -> click.Command:
    code = importlib.import_module(module)
    cls = getattr(code, settings_class)

    def command(config: str | None, **flags: str | None) -> int:
        return int(code.main(settings.load(cls, flags, os.environ, config, also=(Settings,))))

    return click.command(name, help=_summary(code))(options(cls)(command))


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(__version__, prog_name="sidecar")
def cli() -> None:
    """A sidecar for one LLM inference engine: progress verdicts, load in model units, images off the hot path."""


def options(cls: type) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Give a command one option per field of a settings class; the values stay text until settings.load parses them."""

    def wrap(f: Callable[..., Any]) -> Callable[..., Any]:
        for field in reversed(fields(cls)):
            parser: Parser = field.metadata["parser"]
            choices = f"; {parser.expected}" if parser.metavar in ("NAME", "NAMES") else ""
            text = f"{field.metadata['help']}{choices} [{settings.shown(field)}]"
            f = click.option(settings.spelled(field.name), field.name, default=None, metavar=parser.metavar, help=text)(
                f
            )
        return click.option("--config", default=None, metavar="FILE", help="TOML file of settings [none]")(f)

    return wrap


def _summary(module: Any) -> str:
    """A module's first docstring line, as a command's help."""
    return str(module.__doc__).strip().splitlines()[0]


@cli.command("run")
@options(Settings)
def run_command(config: str | None, **flags: str | None) -> int:
    """The main job beside a real engine."""
    chosen = settings.load(Settings, flags, os.environ, config)
    if not chosen.engine:
        raise UsageError("--engine is missing; expected the engine's base URL, e.g. --engine http://127.0.0.1:8000")
    logs.setup(chosen.log_level)
    from sidecar.launch import process_tree  # here, so that `sidecar probe` starts quickly

    return process_tree.main(chosen, coded)


@cli.command("probe")
@click.argument("kind", type=click.Choice(probes.KINDS))
@click.option("--state-dir", default=None, metavar="DIR", help="Directory shared with the sidecar [/run/sidecar]")
def probe_command(kind: probes.Kind, state_dir: str | None) -> int:
    """Exec probe: judges by the verdict file, without network. Passes when the file is missing or stale."""
    path = state_dir or os.environ.get("SIDECAR_STATE_DIR") or str(Settings().state_dir)
    passed, text = probes.exec_answer(kind, *statefile.read(path))
    click.echo(text)
    return 0 if passed else 1


@cli.command("doctor")
@options(Settings)
@click.option("--json", "as_json", is_flag=True, help="Print the findings as JSON")
def doctor_command(as_json: bool, config: str | None, **flags: str | None) -> int:
    """Check settings, engine, GPU, shared memory, CPU quota; say what is missing and how to mend it."""
    from sidecar.tools.doctor import report

    return report.main(settings.load(Settings, flags, os.environ, config), as_json)


@cli.command("image-server", hidden=True)
@click.option("--listen-fd", type=int, required=True)
def image_command(listen_fd: int) -> int:
    """The image server; started by `run`, which writes the settings to its standard input."""
    from sidecar.images.worker import fork_server

    return fork_server.main(listen_fd, sys.stdin.readline())


def _ungrouped(life: Callable[[], int]) -> int:
    """An error of ours that ended a task group is raised alone."""
    try:
        return life()
    except BaseExceptionGroup as group:
        ours = group.subgroup(SidecarError)
        if ours is None:
            raise
        raise _first(ours) from None


def _first(group: BaseExceptionGroup[Any]) -> BaseException:
    error = group.exceptions[0]
    return _first(error) if isinstance(error, BaseExceptionGroup) else error


def _one_line(e: click.ClickException) -> str:
    """Click's own messages name the flag and the nearest one; keep them to one line."""
    return " ".join(e.format_message().split())


def _fail(text: str, code: int) -> int:
    print(f"sidecar: {text}", file=sys.stderr)
    return code


if __name__ == "__main__":
    main()
