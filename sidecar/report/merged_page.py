"""Pure: the engine's metrics page and the sidecar's as one."""

from __future__ import annotations

import re
from typing import Final

_EOF: Final = re.compile(r"^# EOF *$\n?", re.MULTILINE)
_OWN_SERIES: Final = re.compile(r"^(# (HELP|TYPE|UNIT) )?(sidecar_|DCGM_FI_)[^\n]*\n", re.MULTILINE)


def merge_pages(engine_page: str | None, own_page: str) -> str:
    """One page of plain text: the engine's series, unchanged, then the sidecar's.

    A family may appear on a page only once, so series of an engine page under the sidecar's names are dropped (an
    engine that is itself behind a sidecar). Without an engine page it has the sidecar's series only: no stale ones.
    """
    if not engine_page:
        return own_page
    page = _EOF.sub("", engine_page)
    if "sidecar_" in page or "DCGM_FI_" in page:
        page = _OWN_SERIES.sub("", page if page.endswith("\n") else page + "\n")
    return page + ("" if page.endswith("\n") else "\n") + own_page
