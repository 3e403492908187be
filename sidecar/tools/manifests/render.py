"""Prints Kubernetes YAML for an engine Deployment with the sidecar.

Rules of this module: pure text, no I/O but the print in `main`; what a user gives is quoted, names too, as YAML reads some
words as true or null; every choice that could surprise has its reason beside it, as a comment in the YAML.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from textwrap import dedent, indent
from typing import Final

from sidecar.health.probes import VERDICT_STALE_S
from sidecar.tools.manifests import shell
from sidecar.tools.manifests.settings import ENGINE_PORT, SIDECAR_MEMORY, ManifestSettings, quoted, start

RELAY, ADMIN = 8080, 9400  # ports
STATE: Final = "/run/sidecar"
BEFORE: Final = 600  # seconds that a rollout may take in which the engine does not start yet
STARTUP_PERIOD: Final = 5  # seconds
DRAIN: Final = 120  # seconds that open requests may take to end when a pod is deleted
ENDPOINTS: Final = 10  # seconds until no client sends to a deleted pod any more


def main(settings: ManifestSettings) -> int:
    """Print the manifests."""
    print(render(settings), end="")
    return 0


def render(s: ManifestSettings) -> str:
    """The YAML documents as text. Raises UsageError where two settings do not fit together."""
    documents = [_deployment(s), _service(s)]
    if s.monitor == "podmonitor":
        documents.append(_pod_monitor(s))
    return "---\n".join(documents)


def _deployment(s: ManifestSettings) -> str:
    return f"""\
apiVersion: apps/v1
kind: Deployment
metadata:
{_metadata(s)}
spec:
  replicas: {s.replicas}
{_lines(2, _strategy(s))}  # More than a start may take: the engine's startupProbe has {s.startup_seconds} s, and before it an old pod ends and images
  # are pulled. The default, 600 s, reports every slow start as a failed rollout.
  progressDeadlineSeconds: {s.startup_seconds + BEFORE}
  selector:
    matchLabels:
      {_label(s)}
  template:
    metadata:
      labels:
        {_label(s)}
{_lines(6, _annotations(s))}    spec:
      # {ENDPOINTS} s until no client sends here any more, at most {DRAIN} s for open requests, then the sidecar's own end.
      terminationGracePeriodSeconds: {ENDPOINTS + DRAIN + 40}
      enableServiceLinks: false
      automountServiceAccountToken: false
{_lines(6, _shared_processes(s))}      securityContext:
        seccompProfile:
          type: RuntimeDefault
      initContainers:
{_lines(8, _sidecar(s))}      containers:
{_lines(8, _engine(s))}      volumes:
{_lines(8, _volumes(s))}"""


def _strategy(s: ManifestSettings) -> str:
    """How a rollout replaces pods."""
    note = """\
# A spare GPU is rare, and without one a pod on top of the others waits forever. So an old pod is deleted first: with one
# replica, nothing serves until the new one is ready. Where GPUs are to spare: --max-surge 1.
"""
    if s.max_surge:
        note = "# Asked for with --max-surge: new pods need GPUs of their own, and an old one is deleted when a new one is ready.\n"
    rolling = f"{{maxSurge: {s.max_surge}, maxUnavailable: {0 if s.max_surge else 1}}}"
    return f"{note}strategy:\n  type: RollingUpdate\n  rollingUpdate: {rolling}\n"


def _service(s: ManifestSettings) -> str:
    return f"""\
apiVersion: v1
kind: Service
metadata:
{_metadata(s)}
spec:
  selector:
    {_label(s)}
  ports:
    - name: http
      port: 80
      # A number: before Kubernetes 1.33, the name of a native sidecar's port leads to no endpoint.
      targetPort: {RELAY}
"""


def _pod_monitor(s: ManifestSettings) -> str:
    return f"""\
apiVersion: monitoring.coreos.com/v1
kind: PodMonitor
metadata:
{_metadata(s)}
spec:
  selector:
    matchLabels:
      {_label(s)}
  podMetricsEndpoints:
    # The relay's page holds the engine's series and the sidecar's.
    - port: relay
      path: /metrics
"""


def _metadata(s: ManifestSettings) -> str:
    namespace = [f"namespace: {quoted(s.namespace)}"] if s.namespace else []
    return indent("\n".join([f"name: {quoted(s.name)}", *namespace, "labels:", f"  {_label(s)}"]), "  ")


def _label(s: ManifestSettings) -> str:
    """What objects are selected by."""
    return f"app.kubernetes.io/name: {quoted(s.name)}"


def _annotations(s: ManifestSettings) -> str:
    if s.monitor != "annotations":
        return ""
    return f"""\
annotations:
  # The relay's page holds the engine's series and the sidecar's.
  prometheus.io/scrape: "true"
  prometheus.io/port: "{RELAY}"
  prometheus.io/path: /metrics
"""


def _sidecar(s: ManifestSettings) -> str:
    head = f"""\
# A native sidecar (Kubernetes 1.29 or later): it starts before the engine, is restarted on its own, and ends after it.
- name: sidecar
  image: {quoted(s.sidecar_image)}
  restartPolicy: Always
  args: ["run"]
  env:
"""
    tail = f"""\
  ports:
    - name: relay
      containerPort: {RELAY}
    - name: admin
      containerPort: {ADMIN}
  # The engine's container is started once this passed. /healthz speaks of the sidecar only.
  startupProbe:
    httpGet: {{path: /healthz, port: {ADMIN}}}
    periodSeconds: 1
    failureThreshold: 60
  livenessProbe:
    httpGet: {{path: /healthz, port: {ADMIN}}}
    periodSeconds: 10
    timeoutSeconds: 5
    failureThreshold: 6
  # The pod is ready when the engine is fit to serve. Load alone never makes it unready.
  readinessProbe:
    httpGet: {{path: /readyz, port: {ADMIN}}}
    periodSeconds: 2
    timeoutSeconds: 2
    failureThreshold: 1
  resources:
    # The CPU limit is how many images are prepared at once.
    requests: {{cpu: "{s.sidecar_cpus}", memory: {SIDECAR_MEMORY}}}
    limits: {{cpu: "{s.sidecar_cpus}", memory: {s.sidecar_memory}}}
  securityContext:
{_lines(4, _sidecar_user(s))}    readOnlyRootFilesystem: true
    allowPrivilegeEscalation: false
    capabilities: {{drop: ["ALL"]{', add: ["SYS_PTRACE"]' if s.stack_dumps == "on" else ""}}}
  volumeMounts:
    - {{name: sidecar-state, mountPath: {STATE}}}
    - {{name: sidecar-tmp, mountPath: /tmp}}
"""
    return head + _lines(4, _sidecar_env(s)) + tail + _lines(4, _image_mount(s) + _model_mount(s, read_only=True))


def _image_mount(s: ManifestSettings) -> str:
    """Where prepared images are kept: without it, /dev/shm is 64 MiB. The engine's, so that it can be handed images there."""
    return "- {name: engine-shm, mountPath: /dev/shm}\n" if s.claim else ""


def _shared_processes(s: ManifestSettings) -> str:
    if s.stack_dumps == "off":
        return ""
    return """\
# The sidecar sees the engine's processes, which py-spy needs.
shareProcessNamespace: true
"""


def _sidecar_user(s: ManifestSettings) -> str:
    if s.stack_dumps == "off":
        return """\
runAsNonRoot: true
runAsUser: 65532
runAsGroup: 65532
"""
    return """\
# Asked for with --stack-dumps: root, as in the engines' images, because an added capability reaches no other user. Whoever
# takes over the sidecar, say by a hostile image, can then read the engine's memory, with its users' prompts and its keys.
runAsUser: 0
"""


def _sidecar_env(s: ManifestSettings) -> str:
    values = {
        "SIDECAR_ENGINE": f"http://127.0.0.1:{ENGINE_PORT}",
        "SIDECAR_ENGINE_KIND": s.engine_kind,
        "SIDECAR_LISTEN": f"0.0.0.0:{RELAY}",
        "SIDECAR_ADMIN": f"0.0.0.0:{ADMIN}",
        "SIDECAR_STATE_DIR": STATE,
    }
    note = "# No SIDECAR_MODEL, so images pass through untouched: their preparation needs the model's directory (--claim).\n"
    if s.claim:
        values["SIDECAR_MODEL"], note = s.model, ""
    if s.images == "shm":
        values["SIDECAR_IMAGES"] = "shm"
    fields = {
        "POD_NAME": "metadata.name",
        "POD_UID": "metadata.uid",
        "POD_NAMESPACE": "metadata.namespace",
        "NODE_NAME": "spec.nodeName",
    }
    own = "".join(f"- {{name: {k}, valueFrom: {{fieldRef: {{fieldPath: {v}}}}}}}\n" for k, v in fields.items())
    attributes = "k8s.pod.name=$(POD_NAME),k8s.namespace.name=$(POD_NAMESPACE),k8s.node.name=$(NODE_NAME)"
    return _env(values.items()) + note + own + _env([("OTEL_RESOURCE_ATTRIBUTES", attributes)])


def _engine(s: ManifestSettings) -> str:
    image, command, args = start(s)
    gpu = f', nvidia.com/gpu: "{s.gpus}"' if s.gpus else ""
    return f"""\
- name: engine
  image: {image}
  command: {command}
  # On 127.0.0.1 nothing can go past the relay: work that the sidecar does not see looks like silence.
  args:
{_lines(4, args)}  env:
    # Libraries start one thread per core of the whole node unless told; this is the container's own CPU limit.
    - name: OMP_NUM_THREADS
      valueFrom: {{resourceFieldRef: {{containerName: engine, resource: limits.cpu, divisor: "1"}}}}
{_lines(4, _connector(s))}  # Until the first token was served, liveness does not count. This one fails closed, as it may: without the sidecar
  # nothing serves either, and it takes {s.startup_seconds} s. The port is a number because a name reaches only one's own container.
  startupProbe:
    httpGet: {{path: /startupz, port: {ADMIN}}}
    periodSeconds: {STARTUP_PERIOD}
    timeoutSeconds: 5
    failureThreshold: {-(-s.startup_seconds // STARTUP_PERIOD)}
{_lines(2, LIVENESS[s.probe]())}  lifecycle:
    # Deletion: first no new requests, then the open ones end, while engine and sidecar still serve. A stalled engine is not
    # waited for.
    preStop:
      exec:
        command:
          - sh
          - -c
          - {quoted(shell.drain(STATE, ENDPOINTS, DRAIN))}
  resources:
    requests: {{cpu: "{s.cpus}", memory: {s.memory}{gpu}}}
    limits: {{cpu: "{s.cpus}", memory: {s.memory}{gpu}}}
  # The engines' own images run as root and write to their home; where yours does not, add runAsNonRoot: true.
  securityContext:
    allowPrivilegeEscalation: false
    capabilities: {{drop: ["ALL"]}}
  volumeMounts:
    - {{name: sidecar-state, mountPath: {STATE}, readOnly: true}}
    - {{name: engine-shm, mountPath: /dev/shm}}
{_lines(4, _model_mount(s, read_only=False))}"""


def _connector(s: ManifestSettings) -> str:
    if s.images != "shm":
        return ""
    return """\
# The image must have the plugin (plugins/vllm of the sidecar's source), and the engine must be root or the sidecar's user, who
# alone may read the images. Where it cannot, images go inline, and `sidecar doctor` says why.
- {name: VLLM_MEDIA_CONNECTOR, value: inference_sidecar}
"""


def _safe_probe() -> str:
    return f"""\
# Fails only while the sidecar says "stalled" and goes on saying it: the file is touched every second, and one older than
# {VERDICT_STALE_S:.0f} s passes. So neither a sidecar that is away nor an image without stat kills an engine; only three commands in a
# row that take longer than timeoutSeconds would.
livenessProbe:
  exec:
    command:
      - sh
      - -c
      - {quoted(shell.safe_liveness(STATE))}
  periodSeconds: 5
  timeoutSeconds: 10
  failureThreshold: 3
  # A stalled engine does not end by itself: it is killed after this, whatever the pod's own period.
  terminationGracePeriodSeconds: 10
"""


def _http_probe() -> str:
    return f"""\
# This fails closed: when the sidecar does not answer for periodSeconds * failureThreshold, a healthy engine is killed.
# Choose it only where the engine's image has no shell, and leave the threshold high enough for a restart of the sidecar.
# The port is a number because a name reaches only one's own container.
livenessProbe:
  httpGet: {{path: /livez, port: {ADMIN}}}
  periodSeconds: 5
  timeoutSeconds: 5
  failureThreshold: 6
  # A stalled engine does not end by itself: it is killed after this, whatever the pod's own period.
  terminationGracePeriodSeconds: 10
"""


LIVENESS: Final[dict[str, Callable[[], str]]] = {"safe": _safe_probe, "http": _http_probe}


def _model_mount(s: ManifestSettings, *, read_only: bool) -> str:
    if s.claim:
        return "- {name: models, mountPath: /models, readOnly: true}\n"
    return "" if read_only else "- {name: models, mountPath: /root/.cache/huggingface}\n"


def _volumes(s: ManifestSettings) -> str:
    models = (
        f"- name: models\n  persistentVolumeClaim: {{claimName: {quoted(s.claim)}, readOnly: true}}\n"
        if s.claim
        else "# Downloaded anew by each pod; with --claim the models come from a volume.\n- name: models\n  emptyDir: {}\n"
    )
    memory = dedent("""\
        # In memory, so that a full disk cannot silence the verdict. Room for the usage records (64 MiB, and again while they are tidied) and
        # ten diagnoses: a pod whose volume is over its size is evicted.
        - name: sidecar-state
          emptyDir: {medium: Memory, sizeLimit: 192Mi}
        - name: sidecar-tmp
          emptyDir: {medium: Memory, sizeLimit: 64Mi}
        # The default of 64 MiB is too small for engines that share tensors between processes.
        - name: engine-shm
          emptyDir: {medium: Memory, sizeLimit: 8Gi}
        """)
    return memory + models


def _env(values: Iterable[tuple[str, str]]) -> str:
    return "".join(f"- {{name: {name}, value: {quoted(value)}}}\n" for name, value in values)


def _lines(spaces: int, block: str) -> str:
    return indent(block, " " * spaces)
