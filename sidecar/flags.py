"""One setting as a dataclass field, and the parsers of its text: text -> value, ValueError when it is none."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import field
from pathlib import Path
from typing import Any

Parse = Callable[[str], Any]


def flag(default: Any, parse: Parse, help: str, *, expected: str, secret: bool = False) -> Any:
    """One setting. `parse` turns text into the value or raises ValueError; `expected` completes "expected ..."."""
    return field(default=default, metadata={"parse": parse, "help": help, "expected": expected, "secret": secret})


# A word of `expected` -> what `--help` writes in the value's place.
_KINDS = {
    "HOST:PORT": "HOST:PORT",
    "URL": "URL",
    "directory": "DIR",
    "dollars": "DOLLARS",
    "file": "FILE",
    "milliseconds": "MS",
    "number": "N",
    "path": "FILE",
    "quantity": "SIZE",
    "seconds": "SECONDS",
    "size": "SIZE",
    "time": "TIME",
    "tokens": "N",
}


def described(expected: str) -> tuple[str, str]:
    """What `--help` writes in a value's place, and what its text must add to that: the choices, where they are many."""
    if expected.startswith("one of "):
        choices = "|".join(expected.removeprefix("one of ").split(" (")[0].split(", "))
        return (choices, "") if len(choices) <= 60 else ("NAME", f"; {expected}")
    if expected.startswith("some of "):
        return "NAMES", f"; {expected}"
    words = expected.split(" such as ")[0].split()
    return next((_KINDS[word] for word in words if word in _KINDS), "TEXT"), ""


def url(text: str) -> str:
    if not re.fullmatch(r"https?://[^\s/?#]+(/[^\s?#]*)?", text):
        raise ValueError
    return text.rstrip("/")


def address(text: str) -> tuple[str, int]:
    host, sep, port = text.rpartition(":")
    host = host.strip("[]")
    if not sep or not host or not port.isdigit() or int(port) > 65535:
        raise ValueError
    return host, int(port)


def one_of(*options: str) -> Parse:
    def parse(text: str) -> str:
        if text not in options:
            raise ValueError
        return text

    return parse


def number(low: float, high: float) -> Parse:
    def parse(text: str) -> float:
        value = float(text)
        if not low <= value <= high:
            raise ValueError
        return value

    return parse


def integer(low: int, high: int) -> Parse:
    def parse(text: str) -> int:
        value = int(text)
        if not low <= value <= high:
            raise ValueError
        return value

    return parse


_SIZE = re.compile(r"(\d+)\s*([kmgt]?)(?:i?b)?", re.IGNORECASE)


def size(text: str) -> int:
    match = _SIZE.fullmatch(text.strip())
    if not match:
        raise ValueError
    return int(match[1]) << 10 * " kmgt".index(match[2].lower() or " ")


def existing_dir(text: str) -> str:
    if not Path(text).is_dir():
        raise ValueError
    return text


def existing_file(text: str) -> str:
    if not Path(text).is_file():
        raise ValueError
    return text


def text(value: str) -> str:
    return value


def header_name(value: str) -> str:
    if not re.fullmatch(r"[A-Za-z0-9!#$%&'*+.^_`|~-]{1,64}", value):
        raise ValueError
    return value.lower()


_DOMAIN = r"(\*\.)?[a-z0-9_]([a-z0-9_.-]{0,251}[a-z0-9])?(:[1-9][0-9]{0,4})?"
_DOMAINS = re.compile(rf"off|{_DOMAIN}(\s*,\s*{_DOMAIN})*", re.IGNORECASE)


def domains(value: str) -> str:
    if not _DOMAINS.fullmatch(value):
        raise ValueError
    return value.lower()


def gpu(value: str) -> str:
    gpu_of(value)
    return value


def gpu_of(value: str) -> tuple[int, str]:
    """How many GPUs of which name: "2xH100" is (2, "H100"). Raises ValueError."""
    match = re.fullmatch(r"(?:([1-9][0-9]?)\s*x\s*)?([A-Za-z][\w .-]{1,60})", value)
    if not match:
        raise ValueError
    return int(match[1] or 1), match[2]


def switch(value: str) -> bool:
    return {"true": True, "1": True, "yes": True, "on": True, "false": False, "0": False, "no": False, "off": False}[
        value.lower()
    ]


ENGINE_KINDS = ("auto", "vllm", "sglang", "tgi", "llamacpp", "openai", "scripted")
