"""The files in parts/: pieces of YAML with `${name}` for what varies.

A placeholder alone on its line takes a block of lines, each indented as it is; without lines, the line disappears. Any
other takes a text. A name without a value, and a value without a place, is an error.
"""

from __future__ import annotations

import re
from importlib.resources import files
from textwrap import indent
from typing import Final

FOLDER: Final = files(__package__) / "parts"
_BLOCK: Final = re.compile(r"^( *)\$\{([a-z_]+)\}\n", re.M)
_TEXT: Final = re.compile(r"\$\{([a-z_]+)\}")


def fill(part: str, **values: str) -> str:
    """The text of parts/PART.yaml with its placeholders filled in."""
    used: set[str] = set()

    def block(found: re.Match[str]) -> str:
        used.add(found[2])
        return indent(values[found[2]], found[1])

    def text(found: re.Match[str]) -> str:
        used.add(found[1])
        return values[found[1]]

    # In one pass each: values are not searched for placeholders, because shells use the same form.
    pieces = re.split(r"(^ *\$\{[a-z_]+\}\n)", (FOLDER / f"{part}.yaml").read_text("utf-8"), flags=re.M)
    filled = "".join(_BLOCK.sub(block, p) if _BLOCK.fullmatch(p) else _TEXT.sub(text, p) for p in pieces)
    if unused := values.keys() - used:
        raise KeyError(f"{part}: no place for {sorted(unused)}")
    return filled
