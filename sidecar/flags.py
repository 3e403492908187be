"""Flags of settings classes, and the parsers of their texts.

A parser turns text into a value. It also names what it expects, for errors, and the placeholder that `--help` shows.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import Field, dataclass, field, replace
from pathlib import Path
from typing import Any, Final
from urllib.parse import unquote

ENGINE_KINDS: Final = ("auto", "vllm", "sglang", "tgi", "llamacpp", "tei", "ollama", "openai", "scripted")
MAX_SHOWN_CHOICES_CHARS: Final = 60


@dataclass(frozen=True, slots=True)
class Parser:
    """`parse` raises ValueError for any text that is not `expected`. `choices`: all texts that it takes, if few."""

    expected: str
    metavar: str
    parse: Callable[[str], Any]
    choices: tuple[str, ...] = ()


def flag(
    default: Any, parser: Parser, help: str, *, expected: str = "", secret: bool = False, heading: str = ""
) -> Any:
    """One setting as a dataclass field. `expected` replaces that of the parser.

    `heading`: `--help` and the reference show it, and those after it up to the next heading, below this one.
    """
    parser = replace(parser, expected=expected) if expected else parser
    return field(default=default, metadata={"parser": parser, "help": help, "secret": secret, "heading": heading})


def headings(settings: Iterable[Field[Any]]) -> dict[str, str]:
    """The heading of each setting by its name; "" before the first. A heading may come back."""
    found, heading = {}, ""
    for setting in settings:
        heading = setting.metadata.get("heading") or heading
        found[setting.name] = heading
    return found


def argument(parser: Parser, help: str) -> Any:
    """The arguments of a command that are no flags, divided by commas in other sources."""
    return field(default="", metadata={"parser": parser, "help": help, "secret": False, "positional": True})


def parser(expected: str, metavar: str) -> Callable[[Callable[[str], Any]], Parser]:
    """Decorator: make a function of text a Parser."""
    return lambda parse: Parser(expected, metavar, parse)


def checked(
    accepts: Callable[[str], object], expected: str, metavar: str = "TEXT", then: Callable[[str], str] = str
) -> Parser:
    """A parser that returns the texts it accepts, as `then` makes them."""

    def parse(text: str) -> str:
        if not accepts(text):
            raise ValueError
        return then(text)

    return Parser(expected, metavar, parse)


def matching(pattern: str, expected: str, metavar: str = "TEXT", then: Callable[[str], str] = str) -> Parser:
    """A parser of texts that match a whole pattern."""
    return checked(re.compile(pattern).fullmatch, expected, metavar, then)


def one_of(*options: str) -> Parser:
    """A parser of fixed words; a short list of them is the metavar."""
    words = [option for option in options if option]
    choices = "|".join(words)
    metavar = choices if len(choices) <= MAX_SHOWN_CHOICES_CHARS else "NAME"
    found = checked(options.__contains__, f"one of {', '.join(words)}", metavar)
    return replace(found, choices=tuple(words))


_METAVARS: Final = {"seconds": "SECONDS", "milliseconds": "MS", "dollars": "DOLLARS"}


def _ranged(convert: Callable[[str], float], low: float, high: float, unit: str) -> Parser:
    def parse(text: str) -> float:
        value = convert(text)
        if not low <= value <= high:
            raise ValueError
        return value

    kind = unit if unit.startswith("a ") else f"a number of {unit}"
    return Parser(f"{kind} from {low} to {high}", _METAVARS.get(unit, "N"), parse)


def number(low: float, high: float, unit: str = "a number") -> Parser:
    return _ranged(float, low, high, unit)


def integer(low: int, high: int, unit: str = "a whole number") -> Parser:
    return _ranged(int, low, high, unit)


text: Final = Parser("text", "TEXT", str)
file_path: Final = Parser("a path", "FILE", str)
directory: Final = Parser("a directory", "DIR", str)
existing_dir: Final = checked(lambda text: Path(text).is_dir(), "an existing directory", "DIR")
existing_file: Final = checked(lambda text: Path(text).is_file(), "an existing file", "FILE")
url: Final = matching(
    r"https?://[^\s/?#]+(/[^\s?#]*)?",
    "an http(s) URL such as http://127.0.0.1:8000",
    "URL",
    lambda url: url.rstrip("/"),
)
postgres_url: Final = matching(
    r"postgres(ql)?://\S+", "a URL such as postgresql://user@host/database, with what else libpq takes", "URL"
)
_SOCKET: Final = re.compile(r"(http\+)?unix:(?://)?(\S+)")
MAX_SOCKET_PATH_BYTES: Final = 107


@parser(
    "an http(s) URL such as http://127.0.0.1:8000, or a Unix socket such as unix:/run/engine.sock (at most 107 bytes)",
    "URL",
)
def engine_url(text: str) -> str:
    """A base URL; a Unix socket becomes unix:/path, also from http+unix://%2Fpath."""
    if (found := _SOCKET.fullmatch(text)) is None:
        return str(url.parse(text))
    path = unquote(found[2]) if found[1] else found[2]
    if not path.startswith("/") or len(path.encode()) > MAX_SOCKET_PATH_BYTES:
        raise ValueError
    return f"unix:{path}"


@parser("a file of PEM certificates", "FILE")
def ca_file(text: str) -> str:
    import ssl  # here, so that `sidecar probe` starts quickly

    try:
        ssl.create_default_context(cafile=text)
    except OSError:  # SSLError included
        raise ValueError from None
    return text


header_name: Final = matching(r"[A-Za-z0-9!#$%&'*+.^_`|~-]{1,64}", "a header name", then=str.lower)
_DOMAIN: Final = r"(\*\.)?[a-z0-9_]([a-z0-9_.-]{0,251}[a-z0-9])?(:[1-9][0-9]{0,4})?"
domains: Final = matching(rf"(?i)off|{_DOMAIN}(\s*,\s*{_DOMAIN})*", "off, or domains divided by commas", then=str.lower)


@parser("HOST:PORT, such as 127.0.0.1:9400", "HOST:PORT")
def address(text: str) -> tuple[str, int]:
    host, sep, port = text.rpartition(":")
    host = host.strip("[]")
    if not sep or not host or not port.isdigit() or int(port) > 65535:
        raise ValueError
    return host, int(port)


@parser("a size such as 256M or 1G", "SIZE")
def size(text: str) -> int:
    match = re.fullmatch(r"(\d+)\s*([kmgt]?)(?:i?b)?", text.strip(), re.IGNORECASE)
    if not match:
        raise ValueError
    return int(match[1]) << 10 * " kmgt".index(match[2].lower() or " ")


def parse_gpu(text: str) -> tuple[int, str]:
    """How many GPUs of which name: "2xH100" is (2, "H100"). Raises ValueError."""
    match = re.fullmatch(r"(?:([1-9][0-9]?)\s*x\s*)?([A-Za-z][\w .-]{1,60})", text)
    if not match:
        raise ValueError
    return int(match[1] or 1), match[2]


gpu: Final = checked(parse_gpu, "a name such as H100 or 2xH100")
