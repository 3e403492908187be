"""The command line of an engine in a pod: which engine it is, where it listens, and how it is moved elsewhere."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Final

from ruamel.yaml.comments import CommentedMap, CommentedSeq

from sidecar.errors import UsageError

# The engine's new port is the old one and this.
MOVED_BY: Final = 10_000
LOOPBACK: Final = "127.0.0.1"
# A rank of vLLM without an API.
HEADLESS: Final = "--headless"
# Flags of vLLM, SGLang and llama.cpp with which the engine speaks something else than HTTP on its port.
NOT_HTTP: Final = re.compile(r"--(ssl-(certfile|keyfile|cert-file|key-file)|uds)\b")
SHELLS: Final = {"sh", "bash", "dash", "ash", "zsh"}


@dataclass(frozen=True, slots=True)
class CommandLine:
    """How an engine is recognised and where it listens by default."""

    commands: str  # in its command line
    image: str
    port: int
    host: str = "--host"


# Ports and flags: vLLM v0.32 cli_args.py, SGLang v0.5 server_args.py, TGI v3.3 launcher main.rs (`PORT` is 80 in its
# image), llama.cpp common/arg.cpp; the scripted engine is ours.
ENGINES: Final[dict[str, CommandLine]] = {
    "vllm": CommandLine(r"(^|[\s/])vllm\s+serve\b|\bvllm\.entrypoints\.\S*api_server\b", r"vllm(?!.*router)", 8000),
    "sglang": CommandLine(r"(^|[\s/])sglang\s+serve\b|\bsglang\.launch_server\b", r"sglang", 30_000),
    "tgi": CommandLine(r"\btext-generation-launcher\b", r"text-generation-inference", 80, "--hostname"),
    "llamacpp": CommandLine(r"\bllama-server\b", r"llama\.?cpp", 8080),
    "scripted": CommandLine(r"\bsidecar engine\b", r"$.", 8000),
}


def kind_of(container: CommentedMap) -> str:
    """The engine that a container starts, by its command line, else by its image; empty if none is recognised."""
    line, image = " ".join(words(container)), str(container.get("image", ""))
    if HEADLESS in line.split():
        return ""
    by_line = [kind for kind, engine in ENGINES.items() if re.search(engine.commands, line)]
    by_image = [kind for kind, engine in ENGINES.items() if re.search(engine.image, image)]
    return next(iter([*by_line, *by_image]), "")


def words(container: CommentedMap) -> Iterator[str]:
    """The words of a container's command line."""
    for key in ("command", "args"):
        for word in container.get(key) or []:
            yield str(word)


def move(container: CommentedMap, kind: str, wanted: int, taken: set[int], name: str) -> tuple[int, int]:
    """Have the engine listen elsewhere on loopback. Returns the port it had, and its new one. Raises UsageError."""
    if not kind:
        raise UsageError(f"{name}: the engine is not recognised; give --engine-kind, or its port by --keep-port")
    engine = ENGINES[kind]
    script = _script(container)
    if container.get("command") and not re.search(engine.commands, " ".join(words(container))):
        raise UsageError(f"{name}: its command starts {kind} elsewhere; give the engine's port by --keep-port")
    if found := NOT_HTTP.search(" ".join(words(container))):
        raise UsageError(
            f"{name}: its engine does not speak plain HTTP ({found[0]}); remove the flag, and give the sidecar "
            "SIDECAR_TLS_CERT and SIDECAR_TLS_KEY"
        )
    if kind == "scripted":
        raise UsageError(f"{name}: the scripted engine's address is one flag, --listen; give its port by --keep-port")
    port = _port(container, script, engine, name)
    new = wanted or moved_from(port)
    while not wanted and new in taken:
        new += 1
    if new == port or new in taken:
        raise UsageError(f"{name}: port {new} is in use; choose another with --engine-port")
    if script is not None:
        _move_in_script(script, engine, new, name)
    else:
        _set(container, "--port", str(new))
        _set(container, engine.host, LOOPBACK)
    return port, new


def moved_from(port: int) -> int:
    """Where an engine listens whose port the relay has taken over."""
    return port + MOVED_BY if port + MOVED_BY < 1 << 16 else port - MOVED_BY


@dataclass(frozen=True, slots=True)
class _Script:
    """A shell's script: the list that it is in, and where."""

    items: CommentedSeq
    index: int

    @property
    def text(self) -> str:
        return str(self.items[self.index])


def _script(container: CommentedMap) -> _Script | None:
    """The script of `sh -c SCRIPT`, if a shell starts the engine."""
    line = list(words(container))
    if not line or line[0].rpartition("/")[2] not in SHELLS:
        return None
    for key in ("args", "command"):
        items = container.get(key)
        if isinstance(items, CommentedSeq) and items:
            longest = max(range(len(items)), key=lambda n: len(str(items[n])))
            return _Script(items, longest)
    return None


def _port(container: CommentedMap, script: _Script | None, engine: CommandLine, name: str) -> int:
    """Where the engine listens now."""
    found = ""
    if script is not None:
        ports = set(re.findall(r"--port[= ]+['\"]?([^\s'\"\\;&|]+)", script.text))
        if len(ports) != 1:
            raise UsageError(f"{name}: no single --port in its script; give the engine's port by --keep-port")
        (found,) = ports
    else:
        found = _get(container, "--port") or _environment(container, "PORT" if engine.host == "--hostname" else "")
    if not found:
        return engine.port
    if not re.fullmatch(r"[1-9][0-9]{0,4}", found) or int(found) > 65_535:
        raise UsageError(f"{name}: its --port is {found[:40]!r}, not a number; give the engine's port by --keep-port")
    return int(found)


def _move_in_script(script: _Script, engine: CommandLine, port: int, name: str) -> None:
    """Replace the port's flag, and put the address next to it: the last of two equal flags counts."""
    text = re.sub(rf"\s{engine.host}[= ]+\S+", "", script.text)
    flags = f"{engine.host} {LOOPBACK} --port {port}"
    changed = re.sub(r"--port[= ]+['\"]?[0-9]+['\"]?", flags, text)
    old = script.items[script.index]
    script.items[script.index] = type(old)(changed) if type(old) is not str else changed


def _get(container: CommentedMap, flag: str) -> str:
    """The last value of a flag."""
    line = list(words(container))
    value = ""
    for n, word in enumerate(line):
        if word == flag and n + 1 < len(line):
            value = line[n + 1]
        elif word.startswith(f"{flag}="):
            value = word.removeprefix(f"{flag}=")
    return value


def _set(container: CommentedMap, flag: str, value: str) -> None:
    """Give a flag a value where it stands, else at the end."""
    done = False
    for key in ("command", "args"):
        items = container.get(key)
        for n in range(len(items) if isinstance(items, CommentedSeq) else 0):
            if items[n] == flag and n + 1 < len(items):
                items[n + 1], done = _like(items[n + 1], value), True
            elif str(items[n]).startswith(f"{flag}="):
                items[n], done = _like(items[n], f"{flag}={value}"), True
    if done:
        return
    if not isinstance(container.get("args"), CommentedSeq):
        if isinstance(container.get("command"), CommentedSeq) and len(container["command"]) > 1:
            container["command"].append(f"{flag}={value}")
            return
        container["args"] = CommentedSeq()
    container["args"].append(f"{flag}={value}")


def _like(old: Any, value: str) -> Any:
    """A text in the quotes of the one that it replaces."""
    return type(old)(value) if isinstance(old, str) and type(old) is not str else value


def _environment(container: CommentedMap, name: str) -> str:
    """A variable's literal value."""
    for variable in container.get("env") or []:
        if name and isinstance(variable, CommentedMap) and variable.get("name") == name:
            return str(variable.get("value", ""))
    return ""
