"""The printed manifest as a pod of real containers, with kubelet's part: probes, and kills that restart a container.

`podman play kube` knows Pods, no native sidecars, no values from fields, and mangles the quotes of exec probes. So the
Deployment's pod is played with its sidecar as the first container, and its probes run from here, as they are printed.
A pod has no network but loopback: nothing of it can meet what else listens on this machine.
"""

from __future__ import annotations

import contextlib
import ctypes
import http.client
import json
import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from .environment import COMMAND_TIMEOUT_S, Podman

CLONE_NEWNET = 0x40000000
PATIENCE_S = 120.0
RELAY, ADMIN = 8080, 9400


def pod_of(manifest: str, name: str, env: dict[str, str]) -> dict[str, Any]:
    """The printed Deployment's pod, as `podman play kube` takes it; `env` is added to the sidecar's."""
    deployment = next(part for part in yaml.safe_load_all(manifest) if part["kind"] == "Deployment")
    spec = deployment["spec"]["template"]["spec"]
    (sidecar,) = spec.pop("initContainers")
    spec["containers"] = [sidecar, *spec["containers"]]
    spec["restartPolicy"] = "Always"
    for container in spec["containers"]:
        for absent in ("restartPolicy", "ports", "startupProbe", "livenessProbe", "readinessProbe", "lifecycle"):
            container.pop(absent, None)
        for kind in ("requests", "limits"):
            container["resources"][kind].pop("nvidia.com/gpu", None)
        container["env"] = [
            {"name": e["name"], "value": e.get("value", "1" if "resourceFieldRef" in str(e) else "test")}
            for e in container.get("env", [])
        ]
    sidecar["env"] += [{"name": key, "value": value} for key, value in env.items()]
    for volume in spec["volumes"]:
        volume["name"] = f"{name}-{volume['name']}"
    for container in spec["containers"]:
        for mount in container["volumeMounts"]:
            mount["name"] = f"{name}-{mount['name']}"
    return {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": name}, "spec": spec}


def liveness_of(manifest: str) -> dict[str, Any]:
    """The engine's printed livenessProbe."""
    deployment = next(part for part in yaml.safe_load_all(manifest) if part["kind"] == "Deployment")
    (engine,) = deployment["spec"]["template"]["spec"]["containers"]
    probe: dict[str, Any] = engine["livenessProbe"]
    return probe


@dataclass
class Pod:
    """A played pod."""

    podman: Podman
    name: str
    liveness: dict[str, Any]
    model: str
    network: int  # a process in the pod's network, which lives as long as the pod

    def container(self, which: str) -> str:
        return f"{self.name}-{which}"

    def pid(self, which: str) -> int:
        return self.podman.pid(self.container(which))

    def processes(self, which: str) -> list[int]:
        """All processes of a container, as this machine numbers them."""
        return descendants(self.pid(which))

    def connect(self, port: int) -> socket.socket:
        """A connection to a port of the pod, from within its network."""
        return connect_within(self.network, port)

    def ask(self, port: int, method: str, path: str, body: Any = None, timeout: float = 60.0) -> tuple[int, bytes]:
        """One request on a connection of its own. Raises OSError or HTTPException."""
        connection = http.client.HTTPConnection("127.0.0.1", port)
        connection.sock = self.connect(port)
        connection.sock.settimeout(timeout)
        with contextlib.closing(connection):
            data = body if isinstance(body, bytes) or body is None else json.dumps(body).encode()
            connection.request(method, path, data, {"content-type": "application/json"})
            answer = connection.getresponse()
            return answer.status, answer.read()

    def complete(self, tokens: int = 4) -> int:
        """The status of one short completion through the relay."""
        body = {"model": self.model, "prompt": "hello", "max_tokens": tokens}
        return self.ask(RELAY, "POST", "/v1/completions", body)[0]

    def stream(self, tokens: int) -> http.client.HTTPConnection:
        """The connection of a streamed completion, whose answer has not been read."""
        connection = http.client.HTTPConnection("127.0.0.1", RELAY)
        connection.sock = self.connect(RELAY)
        connection.sock.settimeout(PATIENCE_S)
        body = {"model": self.model, "prompt": "hello", "max_tokens": tokens, "stream": True}
        connection.request("POST", "/v1/completions", json.dumps(body), {"content-type": "application/json"})
        return connection

    def verdict(self) -> str:
        """The verdict that control has published."""
        return str(json.loads(self.ask(ADMIN, "GET", "/readyz")[1])["verdict"])

    def is_serving(self) -> bool:
        with contextlib.suppress(OSError, http.client.HTTPException):
            return self.ask(ADMIN, "GET", "/readyz")[0] == 200 and self.complete() == 200
        return False

    def is_alive(self) -> bool:
        """Whether the engine's printed livenessProbe passes, run in its container as kubelet would."""
        command = self.liveness["exec"]["command"]
        return self.podman.run("exec", self.container("engine"), *command).returncode == 0

    def kill(self, which: str) -> None:
        """End a container's first process from outside, as an OOM kill would: `podman kill` would count as a stop."""
        os.kill(self.pid(which), signal.SIGKILL)

    def restarted(self, which: str, before: int) -> None:
        """Wait until a container has another first process than `before`."""
        wait_for(lambda: self.pid(which) not in (0, before), f"{which} to be restarted")


def wait_for(condition: Callable[[], bool], what: str, seconds: float = PATIENCE_S, interval: float = 0.2) -> None:
    """Ask again until it holds."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"waited {seconds:g} s for {what}"
        time.sleep(interval)  # what happens in another container gives no event here


def descendants(pid: int) -> list[int]:
    """A process and all below it; none if it has ended."""
    found = []
    with contextlib.suppress(OSError):
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
        found = [pid, *(below for child in children for below in descendants(int(child)))]
    return found


def connect_within(pid: int, port: int) -> socket.socket:
    """A connection to 127.0.0.1 in the network of process `pid`. A socket stays in the network where it was made."""
    made: list[socket.socket | BaseException] = []

    def work() -> None:
        try:
            with Path(f"/proc/{pid}/ns/net").open() as network:
                if ctypes.CDLL(None, use_errno=True).setns(network.fileno(), CLONE_NEWNET):
                    raise OSError(ctypes.get_errno(), "setns")
            made.append(socket.create_connection(("127.0.0.1", port), 30.0))
        except BaseException as e:  # noqa: BLE001  raised in the caller's thread
            made.append(e)

    thread = threading.Thread(target=work)  # only this thread enters that network
    thread.start()
    thread.join()
    if isinstance(made[0], BaseException):
        raise made[0]
    return made[0]


@contextlib.contextmanager
def played(podman: Podman, name: str, manifest: str, model: str, **env: str) -> Iterator[Pod]:
    """The printed manifest, played until the block ends."""
    pod = pod_of(manifest, name, env)
    volumes = [volume["name"] for volume in pod["spec"]["volumes"]]

    def remove() -> None:
        podman.run("pod", "rm", "--force", "--time=2", name)
        podman.run("volume", "rm", "--force", *volumes)

    remove()  # what an interrupted run has left
    try:
        podman.must("play", "kube", "--network=none", "-", input=yaml.safe_dump(pod), timeout=COMMAND_TIMEOUT_S)
        infra = json.loads(podman.must("pod", "inspect", name))["InfraContainerID"]
        yield Pod(podman, name, liveness_of(manifest), model, podman.pid(infra))
    finally:
        remove()
