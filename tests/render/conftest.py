"""A render server in this process, on port 0, with its workers as real processes."""

from __future__ import annotations

import shutil
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from sidecar.tools.render_server import RenderServerSettings, serving

MODELS = Path(__file__).parent / "models"


@pytest.fixture
def model(tmp_path: Path) -> Callable[..., Path]:
    """A function: a model's name, and files that replace its own -> a directory."""

    def copy(name: str = "qwen2-vl", **files: str | None) -> Path:
        folder = tmp_path / name
        shutil.copytree(MODELS / name, folder, dirs_exist_ok=True)
        for stem, content in files.items():
            file = next((path for path in folder.iterdir() if path.stem == stem), folder / f"{stem}.json")
            if content is None:
                file.unlink()
            else:
                file.write_text(content)
        return folder

    return copy


@pytest.fixture
async def serve() -> AsyncIterator[Callable[..., Any]]:
    """A function: a model's directory and settings -> a client of a server that renders for it."""
    async with AsyncExitStack() as stack:

        async def start(folder: Path = MODELS / "qwen2-vl", **more: Any) -> aiohttp.ClientSession:
            chosen = {"workers": 1, "listen": ("127.0.0.1", 0), "max_model_len": 4096} | more
            url = await stack.enter_async_context(serving(RenderServerSettings(str(folder), **chosen)))
            return await stack.enter_async_context(aiohttp.ClientSession(url))

        yield start
