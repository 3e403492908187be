"""The models that the scripted engine lists: one with adapters, or several of which one is loaded at a time."""

from __future__ import annotations

import asyncio
import time
from typing import Any


class ServedModels:
    """`status`: whether the list says which model is loaded, as llama.cpp's router does; LocalAI's does not."""

    def __init__(self, name: str, models: int, load_seconds: float, *, status: bool, adapters: int) -> None:
        self.names = [name, *(f"{name}-{number}" for number in range(2, models + 1))]
        self.adapters = [f"adapter-{number}" for number in range(1, adapters + 1)]
        self.loaded = name if models == 1 else ""
        self.loads = 0
        self._loading = ""
        self._status = status and models > 1
        self._load_seconds = load_seconds
        self._turn = asyncio.Lock()

    async def load(self, model: str) -> None:
        """Return when the model is loaded; it evicts the one that was."""
        async with self._turn:
            if len(self.names) > 1 and self.loaded != model:
                self.loaded, self._loading = "", model
                self.loads += 1
                try:
                    await asyncio.sleep(self._load_seconds)
                    self.loaded = model
                finally:
                    self._loading = ""

    def cards(self, capacity: int) -> list[dict[str, Any]]:
        """The rows of /v1/models."""
        return [self._card(name, capacity) for name in (*self.names, *self.adapters)]

    def _card(self, name: str, capacity: int) -> dict[str, Any]:
        base = self.names[0] if name in self.adapters else None
        card = {"id": name, "object": "model", "created": int(time.time()), "owned_by": "scripted", "root": name}
        if self._status:
            states = {self.loaded: "loaded", self._loading: "loading"}
            card["status"] = {"value": states.get(name, "unloaded")}
        return card | {"parent": base, "max_model_len": capacity}
