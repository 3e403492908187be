"""Record the real vLLM's answers to all cases, for tests without it.

    .venv/bin/python -m tests.render.record [MODEL ...]

Each file of tests/render/recorded has a model's requests as they were sent, and vLLM's answers: status and JSON.
"""

from __future__ import annotations

import asyncio
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import aiohttp

from tests.render import cases
from tests.vllm.rendering import renderer

MODELS = Path(__file__).parent / "models"
RECORDED = Path(__file__).parent / "recorded"


# Models whose templates and processors others have, too: some cases are enough.
KIN = dict.fromkeys(
    ("qwen3-vl-moe", "qwen3.5", "glm-4.1v"),
    ("tool-call", "images-3", "odd-turned-6", "odd-png-alpha", "image-last", "images-in-turns", "named-image"),
)


def cases_of(model: str) -> dict[str, tuple[str, dict[str, Any]]]:
    """The cases of a model: those with images for one that sees."""
    every = cases.text_cases() | (cases.image_cases() if model != "text" else {})
    return {name: every[name] for name in KIN.get(model, every)}


async def ask(url: str, wanted: dict[str, tuple[str, dict[str, Any]]]) -> list[dict[str, Any]]:
    """The requests with their answers."""
    done = []
    async with aiohttp.ClientSession() as http:
        for name, (path, body) in wanted.items():
            async with http.post(url + path, json=body) as answer:
                made = {"status": answer.status, "answer": await answer.json()}
            done.append({"name": name, "path": path, "request": body, **made})
    return done


def main() -> None:
    RECORDED.mkdir(exist_ok=True)
    for model in sys.argv[1:] or sorted(path.name for path in MODELS.iterdir()):
        with tempfile.TemporaryDirectory() as logs, renderer(MODELS, model, Path(logs) / "log") as running:
            done = asyncio.run(ask(running.url, cases_of(model)))
        lines = ",\n".join(json.dumps(one, ensure_ascii=False) for one in done)
        (RECORDED / f"{model}.json").write_text(f"[\n{lines}\n]\n")
        print(model, len(done), "answers,", sum(one["status"] != 200 for one in done), "of them errors")


if __name__ == "__main__":
    main()
