"""A small API server of Kubernetes: Leases only, kept in memory, with versions and conflicts as the real one has them."""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from aiohttp import web

MICRO_TIME = re.compile(
    r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{6}(Z|[+-]\d\d:\d\d)"
)  # as Go parses it: six digits, always
PATH = "/apis/coordination.k8s.io/v1/namespaces/{namespace}/leases"


@dataclass
class LeaseServer:
    """`leases` by name; `fail` answers each call with that status instead; `asked` counts calls; `silent` answers none."""

    url: str = ""
    leases: dict[str, dict[str, Any]] = field(default_factory=dict)
    fail: int = 0
    silent: bool = False
    asked: list[str] = field(default_factory=list)
    before_write: Callable[[str], None] = lambda name: None
    version: int = 100

    def holder(self, name: str) -> str | None:
        held: str | None = self.leases[name]["spec"].get("holderIdentity")
        return held

    def write(self, name: str, **spec: Any) -> None:
        """What another replica does."""
        self.version += 1
        meta = {"name": name, "namespace": "models", "resourceVersion": str(self.version)}
        self.leases[name] = {"apiVersion": "coordination.k8s.io/v1", "kind": "Lease", "metadata": meta, "spec": spec}

    def kubeconfig(self, folder: Path) -> Path:
        """A file that leads here."""
        path = folder / "kubeconfig"
        one = {"name": "x"}
        content = {
            "apiVersion": "v1", "kind": "Config", "current-context": "x",
            "clusters": [{**one, "cluster": {"server": self.url}}],
            "users": [{**one, "user": {"token": "secret"}}],
            "contexts": [{**one, "context": {"cluster": "x", "user": "x"}}],
        }  # fmt: skip
        path.write_text(yaml.safe_dump(content))
        return path

    async def get(self, request: web.Request) -> web.Response:
        name = await self._enter(request)
        if name not in self.leases:
            return status(404, "NotFound")
        return web.json_response(self.leases[name])

    async def post(self, request: web.Request) -> web.Response:
        await self._enter(request)
        body = await request.json()
        name = body["metadata"]["name"]
        self.before_write(name)
        if name in self.leases:
            return status(409, "AlreadyExists")
        return self._keep(name, body, 201)

    async def put(self, request: web.Request) -> web.Response:
        name = await self._enter(request)
        body = await request.json()
        self.before_write(name)
        if body["metadata"].get("resourceVersion") != self.leases[name]["metadata"]["resourceVersion"]:
            return status(409, "Conflict")
        return self._keep(name, body, 200)

    async def _enter(self, request: web.Request) -> str:
        name = request.match_info.get("name", "")
        self.asked.append(f"{request.method} {name}".strip())
        assert request.headers["Authorization"] == "Bearer secret"
        if self.silent:
            await asyncio.Event().wait()
        if self.fail:
            text = f'{{"kind": "Status", "code": {self.fail}}}'
            error: dict[int, type[web.HTTPException]] = {403: web.HTTPForbidden, 500: web.HTTPInternalServerError}
            raise error[self.fail](text=text, content_type="application/json")
        return name

    def _keep(self, name: str, body: dict[str, Any], code: int) -> web.Response:
        spec = body["spec"]
        for key in ("acquireTime", "renewTime"):
            if spec.get(key) is not None and not MICRO_TIME.fullmatch(spec[key]):
                return status(400, f"BadRequest: {spec[key]} is no MicroTime")
        if spec.get("holderIdentity") == "" or spec.get("leaseDurationSeconds", 1) <= 0:
            return status(422, "Invalid")
        self.write(name, **{k: v for k, v in spec.items() if v is not None})
        return web.json_response(self.leases[name], status=code)


def status(code: int, reason: str) -> web.Response:
    return web.json_response({"kind": "Status", "status": "Failure", "code": code, "reason": reason}, status=code)


@asynccontextmanager
async def lease_server() -> AsyncIterator[LeaseServer]:
    """A running one, on a port of its own."""
    server = LeaseServer()
    app = web.Application()
    app.router.add_get(PATH + "/{name}", server.get)
    app.router.add_post(PATH, server.post)
    app.router.add_put(PATH + "/{name}", server.put)
    runner = web.AppRunner(app, shutdown_timeout=0.1)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    server.url = f"http://127.0.0.1:{runner.addresses[0][1]}"
    try:
        yield server
    finally:
        await runner.cleanup()
