"""What commands show on a terminal: colours, and numbers for people.

Rules: colours only where a person looks: on a terminal that is not dumb, and without NO_COLOR (no-color.org). Colour is
never the only sign. Texts from outside are made printable first, so that none can command the terminal.
"""

from __future__ import annotations

import io
import os
from typing import Final, TextIO

from sidecar.labels import printable

CODES: Final = {"red": 31, "green": 32, "yellow": 33, "blue": 34, "magenta": 35, "cyan": 36, "bold": 1, "dim": 2}
RESET: Final = "\x1b[0m"
MAX_TEXT_CHARS: Final = 1000

# Glyph and colour of each verdict; the glyphs are those of the live page.
STATES: Final = {
    "starting": ("◔", "magenta"),
    "idle": ("○", "green"),
    "progressing": ("●", "green"),
    "quiet": ("◐", "cyan"),
    "suspect": ("▲", "yellow"),
    "stalled": ("■", "red"),
    "dead": ("✕", "red"),
    "exempt": ("◇", "dim"),
    "unknown": ("?", "dim"),
}


def is_terminal(stream: TextIO) -> bool:
    """Whether a person looks at this stream, on a terminal that takes commands."""
    return stream.isatty() and os.environ.get("TERM", "dumb") != "dumb"


def has_colours(stream: TextIO) -> bool:
    return is_terminal(stream) and not os.environ.get("NO_COLOR")


def paint(text: str, *styles: str, on: bool = True) -> str:
    """The text in these styles (CODES), or as it is."""
    return f"\x1b[{';'.join(str(CODES[style]) for style in styles)}m{text}{RESET}" if on and styles else text


def safe(text: object) -> str:
    """A text from outside on one line, without what would command a terminal."""
    return printable(str(text), MAX_TEXT_CHARS)


def replace_unknown(stream: TextIO) -> None:
    """From now on, characters that the stream's encoding lacks are written as `?`: ASCII is no reason to fail."""
    if isinstance(stream, io.TextIOWrapper):
        stream.reconfigure(errors="replace")


def span(seconds: float) -> str:
    """A time for people: 210 ms, 4.2 s, 3 min 12 s, 2 h 5 min, 3 d 4 h."""
    if seconds < 0.9995:
        return f"{seconds * 1000:.0f} ms"
    if seconds < 59.5:
        return f"{seconds:.2g} s" if seconds < 9.95 else f"{seconds:.0f} s"
    whole, parts = round(seconds), list[tuple[int, str]]()
    for unit, size in (("d", 86_400), ("h", 3600), ("min", 60), ("s", 1)):
        count, whole = divmod(whole, size)
        if parts or count:
            parts.append((count, unit))
    return " ".join(f"{count} {unit}" for count, unit in parts[:2] if count)


def amount(value: float) -> str:
    """A number of three digits: 4.2, 87, 820, 12.3k, 4.1M."""
    size, prefix = (1e6, "M") if abs(value) >= 999.5e3 else (1e3, "k") if abs(value) >= 1e4 else (1.0, "")
    scaled = value / size
    digits = 0 if abs(scaled) >= 99.5 else 1 if abs(scaled) >= 9.95 else 2
    text = f"{scaled:.{digits}f}"
    return (text.rstrip("0").rstrip(".") if digits else text) + prefix
