"""Add the sidecar to workloads that exist: YAML in, YAML out.

What changes in a pod is little, so that Services, routers and monitors stay as they are:

- The relay takes over the engine's port; the engine moves to another port on 127.0.0.1 (`engine_args.py`).
- A container `sidecar`, two volumes in memory, and a mount of one of them in the engine's container.
- The engine's start-up and liveness probes ask the sidecar; its readiness probe goes: the sidecar's is the pod's.
- A preStop that drains, if there is none; a grace period that is long enough for it.
- An API key of the engine's in a variable is given to the sidecar, by the same reference to a Secret.
- For vLLM and SGLang, what the plug-in needs: its variable, and one folder at /dev/shm for both, for the core's steps.
- With a model's directory: its volume for the sidecar, read-only; for vLLM also a group for the pod's volumes, by which
  it may read images in shared memory.

Everything else stays: fields that are not known here, and comments. A document that nothing is added to keeps its text,
byte for byte; so does one that has the sidecar already.
"""

from __future__ import annotations

import copy
import io
import re
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path, PurePosixPath
from typing import Any, Final

from ruamel.yaml import YAML
from ruamel.yaml.anchor import Anchor
from ruamel.yaml.comments import CommentedMap, CommentedSeq
from ruamel.yaml.error import YAMLError

from sidecar.engines.registry import PLUGIN_KINDS
from sidecar.errors import UsageError
from sidecar.flags import file_path, flag, integer, one_of, text
from sidecar.runtime.plugin_folders import PLUGIN_FOLDER
from sidecar.tools.manifests import engine_args
from sidecar.tools.manifests.answers import Answers, SettingsAnswers, to_yaml
from sidecar.tools.manifests.parts import fill
from sidecar.tools.manifests.render import (
    ADMIN_PORT,
    POD_GRACE_S,
    SIDECAR_GROUP,
    STATE_DIR,
    added_env,
    container,
    probes,
    restarter,
)
from sidecar.tools.manifests.settings import (
    KINDS,
    SIDECAR_MEMORY,
    ManifestSettings,
    names,
    optional_label,
    quantity,
    reference,
)

MAX_INPUT_BYTES: Final = 16 << 20
NAME: Final = "sidecar"
SHM: Final = "/dev/shm"
# The containers that this command adds.
ADDED: Final = {NAME, "restarter"}
# Variables that hold an engine's API key.
KEY_VARIABLES: Final = ("VLLM_API_KEY", "SGLANG_API_KEY", "API_KEY", "LLAMA_API_KEY")
# Where a workload has its pod: paths to a template (with metadata and spec), or to a pod's spec alone.
TEMPLATES: Final[dict[str, tuple[tuple[str, ...], ...]]] = {
    "Pod": ((),),
    "Deployment": (("spec", "template"),),
    "StatefulSet": (("spec", "template"),),
    "ReplicaSet": (("spec", "template"),),
    "DaemonSet": (("spec", "template"),),
    "LeaderWorkerSet": (("spec", "leaderWorkerTemplate", "leaderTemplate"),),
    "RayCluster": (("spec", "headGroupSpec", "template"),),
    "RayService": (("spec", "rayClusterConfig", "headGroupSpec", "template"),),
}
SPECS: Final[dict[str, tuple[str, ...]]] = {
    "LLMInferenceService": ("spec", "template"),
    "LLMInferenceServiceConfig": ("spec", "template"),
}


@dataclass(frozen=True, slots=True)
class InjectSettings:
    """Settings of `sidecar inject`."""

    file: str = flag(
        "",
        file_path,
        "File with the workload, or - for standard input; a List or several documents, too",
        heading="Workload",
    )
    container: str = flag("", optional_label, "Name of the engine's container; default: the one that starts an engine")
    engine_kind: str = flag("auto", one_of("auto", *KINDS), "Which engine it is; auto: by its command line or image")
    engine_port: int = flag(0, integer(0, 65_535), "Where the engine moves to, on 127.0.0.1; 0: 10000 above its port")
    keep_port: int = flag(
        0,
        integer(0, 65_535),
        "Leave the engine's command line alone: it listens on this port, and clients must use the relay's, 8080",
    )
    sidecar_image: str = flag(ManifestSettings().sidecar_image, reference, "The sidecar's image", heading="Sidecar")
    sidecar_cpus: int = flag(2, integer(1, 128), "CPUs of the sidecar")
    sidecar_memory: str = flag("4Gi", quantity(SIDECAR_MEMORY), f"Memory of the sidecar, at least {SIDECAR_MEMORY}")
    qos: str = flag("guaranteed", one_of("guaranteed", "burstable"), "Whether all that the sidecar may use is reserved")
    probe: str = flag("safe", one_of("safe", "http", "restart-rules"), "As in `sidecar manifests`")
    startup_seconds: int = flag(3600, integer(60, 86_400, "seconds"), "Longest time until the engine serves")
    model: str = flag(
        "",
        text,
        "The model's directory in the engine's container, on a volume: the sidecar mounts it, too, and prepares images",
    )
    pull_secrets: str = flag("", names, "Secrets to pull the sidecar's image with")


@dataclass(slots=True)
class WorkloadsFound:
    """Workloads of a text: how many have an engine, the names of the others, the comments that came with a sidecar."""

    engines: int = 0
    others: list[str] = field(default_factory=list)
    comments: set[str] = field(default_factory=set)


def main(settings: InjectSettings) -> int:
    """Print the file with the sidecar added. Raises UsageError."""
    if not settings.file:
        raise UsageError("-f is missing; name a file with the workload, or - for standard input")
    text, others = inject(_read(settings.file), settings)
    print(text, end="")
    if others:
        print(f"sidecar: no engine is recognised in {', '.join(others)}: left as it is", file=sys.stderr)
    return 0


def inject(text: str, settings: InjectSettings) -> tuple[str, list[str]]:
    """The text with the sidecar in each workload that has an engine, and the names of the others.

    Raises UsageError: what cannot be changed, and what to do.
    """
    found = WorkloadsFound()
    parts: list[str] = []
    for number, document in enumerate(split(text), 1):
        try:
            parts.append(_document(document, settings, found))
        except YAMLError as e:
            mark = getattr(e, "problem_mark", None)
            where = f", line {mark.line + 1}" if mark else ""
            problem = getattr(e, "problem", None) or type(e).__name__
            raise UsageError(f"document {number} is not YAML: {problem}{where}") from None
    if not found.engines and found.others:
        raise UsageError(
            f"no engine is recognised in {', '.join(found.others)}; name its --container, and its --engine-kind or its "
            "port by --keep-port"
        )
    if not found.engines:
        raise UsageError(f"no workload found; expected one of {', '.join([*TEMPLATES, *SPECS])}, or a List of them")
    return "".join(parts), found.others


def split(text: str) -> list[str]:
    """The documents with their `---` lines; together they are the text."""
    starts = [m.start() for m in re.finditer(r"^---(?=\s|$)", text, re.M)]
    edges = [0, *(start for start in starts if start), len(text)]
    return [text[a:b] for a, b in pairwise(edges)]


def _document(text: str, settings: InjectSettings, found: WorkloadsFound) -> str:
    """One document, changed."""
    yaml = _yaml(text)
    content = yaml.load(text)
    changed = [_workload(workload, settings, found) for workload in _objects(content)]
    if not any(changed):
        return text
    out = io.StringIO()
    # An explicit start stays one.
    yaml.explicit_start = text.startswith("---")
    yaml.dump(content, out)
    return _align(out.getvalue(), found.comments)


def _align(text: str, ours: set[str]) -> str:
    """Indent the comments that came with the sidecar as the lines below them; the writer keeps their old columns."""
    lines = text.splitlines(keepends=True)
    below = ""
    for n in range(len(lines) - 1, -1, -1):
        stripped = lines[n].strip()
        if stripped in ours:
            lines[n] = f"{below}{stripped}\n"
        elif stripped and not stripped.startswith("#"):
            below = lines[n][: len(lines[n]) - len(lines[n].lstrip())]
    return "".join(lines)


def _yaml(text: str) -> YAML:
    """A loader and writer that keeps order, quotes, comments and, as far as it is even, the indentation of lists."""
    yaml = YAML(typ="rt", pure=True)
    yaml.preserve_quotes = True
    yaml.width = 1 << 20
    if re.search(r"^( *)(- )?[\w.\"'/-]+:[ ]*(#.*)?\n(\s*#.*\n)*\1(?(2)  )  - ", text, re.M):
        yaml.indent(mapping=2, sequence=4, offset=2)
    return yaml


def _objects(content: Any) -> Iterator[CommentedMap]:
    """The workloads of a document: itself, or the items of a List."""
    if not isinstance(content, CommentedMap):
        return
    kind = content.get("kind")
    if isinstance(kind, str) and kind.endswith("List") and isinstance(content.get("items"), list):
        for item in content["items"]:
            yield from _objects(item)
    elif kind in TEMPLATES or kind in SPECS:
        yield content


def _workload(content: CommentedMap, settings: InjectSettings, found: WorkloadsFound) -> bool:
    """Change one workload. False if it has the sidecar already, or no engine."""
    kind = content["kind"]
    name = f"{kind} {_at(content, ('metadata', 'name')) or '?'}"
    if kind == "LeaderWorkerSet":
        _add_leader(content, name)
    path = SPECS[kind] if kind in SPECS else (*TEMPLATES[kind][0], "spec")
    spec = _at(content, path)
    if not isinstance(spec, CommentedMap) or not isinstance(spec.get("containers"), list):
        raise UsageError(f"{name}: no containers at {'.'.join(path)}")
    return _pod(spec, name, settings, found)


def _add_leader(content: CommentedMap, name: str) -> None:
    """Give a LeaderWorkerSet a template for leaders, if it uses that of workers: the sidecar is the leader's alone."""
    template = _at(content, ("spec", "leaderWorkerTemplate"))
    if not isinstance(template, CommentedMap) or not isinstance(template.get("workerTemplate"), CommentedMap):
        raise UsageError(f"{name}: no workerTemplate at spec.leaderWorkerTemplate")
    if "leaderTemplate" not in template:
        template.insert(0, "leaderTemplate", copy.deepcopy(template["workerTemplate"]))
    _unshare(template, ("leaderTemplate",))
    _unshare(template["leaderTemplate"], ("spec",))


def _pod(spec: CommentedMap, name: str, settings: InjectSettings, found: WorkloadsFound) -> bool:
    """Change one pod's spec. False if it has the sidecar already, or no engine."""
    present = [
        c for key in ("initContainers", "containers") for c in spec.get(key) or [] if isinstance(c, CommentedMap)
    ]
    ours = [c for c in present if c.get("name") in ADDED]
    if any(_is_ours(c) for c in ours):
        found.engines += 1
        return False
    engine = _engine(spec["containers"], name, settings)
    if engine is None:
        found.others.append(name)
        return False
    found.engines += 1
    if ours:
        raise UsageError(f"{name}: a container of its own is named {ours[0]['name']!r}; rename it")
    volumes = {v.get("name") for v in spec.get("volumes") or []}
    if taken := volumes & {"sidecar-state", "sidecar-tmp"}:
        raise UsageError(f"{name}: a volume of its own is named {min(taken)!r}; rename it")
    _unshare(engine, ("command", "args", "env", "volumeMounts", "lifecycle"))
    _unshare(spec, ("initContainers", "volumes", "imagePullSecrets", "securityContext"))
    kind = engine_args.kind_of(engine) if settings.engine_kind == "auto" else settings.engine_kind
    if settings.keep_port:
        listen, port = 8080, settings.keep_port
        if listen == port:
            raise UsageError(f"{name}: the engine's port {port} is the relay's; leave --keep-port out")
    else:
        listen, port = engine_args.move(engine, kind, settings.engine_port, _ports(present), name)
    if ADMIN_PORT in _ports(present):
        raise UsageError(f"{name}: port {ADMIN_PORT} is in use; the sidecar's probes need it")
    answers = SettingsAnswers(_as_manifest(settings))
    env, mounts = added_env(kind or "auto", listen, port), ""
    if settings.model:
        env += f"- {to_yaml({'name': 'SIDECAR_MODEL', 'value': settings.model})}\n"
        mounts = f"- {to_yaml(_mount_of(engine, settings.model, name) | {'readOnly': True})}\n"
    if kind in PLUGIN_KINDS:
        mounts += f"- {to_yaml(_share_memory(spec, engine, name))}\n"
        _set_python_path(engine, name)
        if settings.model and kind == "vllm":
            _share_group(spec)
    added = container(answers, env, own_ports=_own_ports(listen, present), mounts=mounts)
    added += answers.when("rules", restarter(answers))
    text = added + fill("volumes") + fill("volumes-engine") + probes(answers)
    found.comments |= {line.strip() for line in text.splitlines() if line.strip().startswith("#")}
    _append(spec, "initContainers", _parsed(added), before="containers")
    _append(spec, "volumes", _parsed(fill("volumes")))
    _append(engine, "volumeMounts", _parsed(f"- {{name: sidecar-state, mountPath: {STATE_DIR}, readOnly: true}}\n"))
    _set_probes(engine, answers)
    _give_key(engine, spec)
    if int(spec.get("terminationGracePeriodSeconds", 30)) < POD_GRACE_S:
        spec["terminationGracePeriodSeconds"] = POD_GRACE_S
    if secrets := answers.list("pull_secrets"):
        _append(spec, "imagePullSecrets", CommentedSeq(CommentedMap(s) for s in secrets))
    return True


def _mount_of(engine: CommentedMap, path: str, name: str) -> dict[str, Any]:
    """The engine's mount that a path lies on. Raises UsageError."""
    wanted = PurePosixPath(path)
    mounts = [m for m in engine.get("volumeMounts") or [] if isinstance(m, CommentedMap)]
    found = [m for m in mounts if wanted.is_relative_to(str(m.get("mountPath") or "?"))]
    if not wanted.is_absolute() or not found:
        raise UsageError(
            f"{name}: --model: no volume of the engine's container is mounted at {path} or above it; mount the model "
            "from a volume, or leave --model out"
        )
    return dict(max(found, key=lambda m: len(PurePosixPath(m["mountPath"]).parts)))


def _share_memory(spec: CommentedMap, engine: CommentedMap, name: str) -> dict[str, Any]:
    """One folder in memory for both, for steps and images. Returns the sidecar's mount. Raises UsageError."""
    mounts = [m for m in engine.get("volumeMounts") or [] if isinstance(m, CommentedMap)]
    mount = next((dict(m) for m in mounts if m.get("mountPath") == SHM), None)
    if mount is None:
        if "engine-shm" in {v.get("name") for v in spec.get("volumes") or []}:
            raise UsageError(f"{name}: a volume of its own is named 'engine-shm'; mount it at {SHM}, or rename it")
        mount = {"name": "engine-shm", "mountPath": SHM}
        _append(spec, "volumes", _parsed(fill("volumes-engine")))
        _append(engine, "volumeMounts", _parsed(f"- {to_yaml(mount)}\n"))
    return mount


def _share_group(spec: CommentedMap) -> None:
    """Let the engine read the images that the sidecar leaves: the pod's volumes have the sidecar's group."""
    security = spec.get("securityContext")
    if not isinstance(security, CommentedMap):
        spec.pop("securityContext", None)
        spec.insert(0, "securityContext", security := CommentedMap())
    if "fsGroup" not in security:
        security["fsGroup"] = SIDECAR_GROUP
        security.setdefault("fsGroupChangePolicy", "OnRootMismatch")


def _set_python_path(engine: CommentedMap, name: str) -> None:
    """Put the plug-in's folder before what PYTHONPATH may have."""
    folder = f"{STATE_DIR}/{PLUGIN_FOLDER}"
    for variable in engine.get("env") or []:
        if isinstance(variable, CommentedMap) and variable.get("name") == "PYTHONPATH":
            if not isinstance(variable.get("value"), str):
                raise UsageError(f"{name}: PYTHONPATH comes from elsewhere; put {folder} before it there, as its value")
            if folder not in variable["value"].split(":"):
                variable["value"] = f"{folder}:{variable['value']}".rstrip(":")
            return
    _append(engine, "env", _parsed(f"- {to_yaml({'name': 'PYTHONPATH', 'value': folder})}\n"))


def _unshare(parent: Any, keys: Sequence[str]) -> None:
    """Copy what will be changed: an alias may use it elsewhere, too, and must not change with it."""
    for key in keys:
        node = parent.get(key) if isinstance(parent, CommentedMap) else None
        if isinstance(node, CommentedMap | CommentedSeq):
            parent[key] = copied = copy.deepcopy(node)
            if hasattr(copied, Anchor.attrib):
                delattr(copied, Anchor.attrib)


def _is_ours(c: CommentedMap) -> bool:
    """A sidecar of this project: it runs next to an engine."""
    env = {v.get("name") for v in c.get("env") or [] if isinstance(v, CommentedMap)}
    return c.get("name") == NAME and "SIDECAR_ENGINE" in env


def _engine(containers: Sequence[Any], name: str, settings: InjectSettings) -> CommentedMap | None:
    """The engine's container; None if there is none. Raises UsageError if several could be it."""
    given = [c for c in containers if isinstance(c, CommentedMap)]
    if settings.container:
        return next((c for c in given if c.get("name") == settings.container), None)
    known = [c for c in given if engine_args.kind_of(c)]
    if len(known) > 1:
        shown = ", ".join(str(c.get("name")) for c in known)
        raise UsageError(f"{name}: which container is the engine? Give --container, one of {shown}")
    return known[0] if known else None


def _ports(containers: Sequence[CommentedMap]) -> set[int]:
    """The ports that the pod's containers declare."""
    found = (port.get("containerPort") for c in containers for port in c.get("ports") or [])
    return {port for port in found if isinstance(port, int)}


def _own_ports(listen: int, present: Sequence[CommentedMap]) -> str:
    """The relay's port, unless the engine's container declares it: Services find it by that name."""
    return "" if listen in _ports(present) else f"- {{name: relay, containerPort: {listen}}}\n"


def _set_probes(engine: CommentedMap, answers: Answers) -> None:
    ours = _parsed(probes(answers))
    lifecycle = ours.pop("lifecycle")
    engine.pop("readinessProbe", None)
    engine.pop("livenessProbe", None)
    for key, value in ours.items():
        engine[key] = value
    own = engine.get("lifecycle")
    if not isinstance(own, CommentedMap):
        engine["lifecycle"] = lifecycle
    elif "preStop" not in own:
        own["preStop"] = lifecycle["preStop"]


def _give_key(engine: CommentedMap, spec: CommentedMap) -> None:
    """The sidecar asks the engine with the key that it has, by the same reference."""
    for variable in engine.get("env") or []:
        if isinstance(variable, CommentedMap) and variable.get("name") in KEY_VARIABLES:
            key = copy.deepcopy(variable)
            key["name"] = "SIDECAR_ENGINE_KEY"
            (sidecar,) = [c for c in spec["initContainers"] if c.get("name") == NAME]
            sidecar["env"].insert(0, key)
            return


def _append(parent: CommentedMap, key: str, items: Any, before: str = "") -> None:
    """Add items to a list of the parent, which may have none yet."""
    if not isinstance(parent.get(key), list):
        parent.pop(key, None)
        at = list(parent).index(before) if before in parent else len(parent)
        parent.insert(at, key, items)
        return
    if isinstance(parent[key], CommentedSeq) and not parent[key]:
        parent[key].fa.set_block_style()
    parent[key].extend(items)


def _parsed(text: str) -> Any:
    yaml = YAML(typ="rt", pure=True)
    yaml.preserve_quotes = True
    return yaml.load(text)


def _at(content: Any, path: Sequence[str]) -> Any:
    for key in path:
        content = content.get(key) if isinstance(content, CommentedMap) else None
    return content


def _as_manifest(settings: InjectSettings) -> ManifestSettings:
    """The settings that the parts ask for."""
    return replace(
        ManifestSettings(),
        sidecar_image=settings.sidecar_image,
        sidecar_cpus=settings.sidecar_cpus,
        sidecar_memory=settings.sidecar_memory,
        qos=settings.qos,
        probe=settings.probe,
        startup_seconds=settings.startup_seconds,
        pull_secrets=settings.pull_secrets,
    )


def _read(path: str) -> str:
    """A file's text, bounded. Raises UsageError."""
    try:
        if path == "-":
            data = sys.stdin.buffer.read(MAX_INPUT_BYTES + 1)
        else:
            with Path(path).open("rb") as file:
                data = file.read(MAX_INPUT_BYTES + 1)
        if len(data) > MAX_INPUT_BYTES:
            raise UsageError(f"-f: {path} is longer than {MAX_INPUT_BYTES >> 20} MiB")
        return data.decode()
    except OSError as e:
        raise UsageError(f"-f: cannot read {path} ({e.strerror})") from None
    except UnicodeDecodeError:
        raise UsageError(f"-f: {path} is not UTF-8 text") from None
