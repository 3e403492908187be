"""Print Kubernetes YAML for an engine Deployment with the sidecar.

Pure text; only `main` prints. User input is quoted, including names, because YAML reads some words as true or null.
Every choice that may surprise is explained by a comment in the YAML.
"""

from __future__ import annotations

from textwrap import indent
from typing import Final

from sidecar.health.probes import VERDICT_STALE_S
from sidecar.images.vllm_plugin import PLUGIN_FOLDER
from sidecar.tools.manifests import shell
from sidecar.tools.manifests.settings import ENGINE_PORT, SIDECAR_MEMORY, ManifestSettings, quote, start

RELAY_PORT, ADMIN_PORT = 8080, 9400
STATE_DIR: Final = "/run/sidecar"
# Time of a rollout before the engine starts.
ROLLOUT_MARGIN_S: Final = 600
STARTUP_PERIOD_S: Final = 5
# For open requests to finish when a pod is deleted.
DRAIN_S: Final = 120
# Until no client sends requests to a deleted pod.
ENDPOINT_REMOVAL_S: Final = 10

ANNOTATIONS: Final = f"""\
annotations:
  # The relay's page holds the engine's series and the sidecar's.
  prometheus.io/scrape: "true"
  prometheus.io/port: "{RELAY_PORT}"
  prometheus.io/path: /metrics
"""
# For --stack-dumps.
SHARED_PROCESSES: Final = """\
# The sidecar sees the engine's processes, which py-spy needs.
shareProcessNamespace: true
"""
ROOT: Final = """\
# Set by --stack-dumps: root, as in the engines' images, because no other user receives an added capability. An
# attacker who takes over the sidecar, e.g. with a malicious image, can then read the engine's memory with prompts and
# keys.
runAsUser: 0
"""
SIDECAR_GROUP: Final = 65532
NOT_ROOT: Final = f"runAsNonRoot: true\nrunAsUser: {SIDECAR_GROUP}\nrunAsGroup: {SIDECAR_GROUP}\n"
POD_ENV: Final = """\
- {name: POD_NAME, valueFrom: {fieldRef: {fieldPath: metadata.name}}}
- {name: POD_UID, valueFrom: {fieldRef: {fieldPath: metadata.uid}}}
- {name: POD_NAMESPACE, valueFrom: {fieldRef: {fieldPath: metadata.namespace}}}
- {name: NODE_NAME, valueFrom: {fieldRef: {fieldPath: spec.nodeName}}}
- name: OTEL_RESOURCE_ATTRIBUTES
  value: k8s.pod.name=$(POD_NAME),k8s.namespace.name=$(POD_NAMESPACE),k8s.node.name=$(NODE_NAME)
"""
PLUGIN: Final = f"""\
# The sidecar writes its plug-in for vLLM there: images come as finished tensors, and vLLM's own processor does not run.
# A version of vLLM that it does not know is left as it is.
- {{name: PYTHONPATH, value: {STATE_DIR}/{PLUGIN_FOLDER}}}
"""
CONNECTOR: Final = """\
- {name: VLLM_MEDIA_CONNECTOR, value: inference_sidecar}
"""
LIVENESS_PROBES: Final = {
    "safe": f"""\
# Fails only while the sidecar keeps reporting "stalled": it touches the file every second, and a file older than
# {VERDICT_STALE_S:.0f} s passes. So neither a missing sidecar nor an image without stat kills an engine; only
# three commands in a row that exceed timeoutSeconds would.
livenessProbe:
  exec: {{command: [sh, -c, {quote(shell.safe_liveness(STATE_DIR))}]}}
  timeoutSeconds: 10
  failureThreshold: 3
""",
    "http": f"""\
# This fails closed: when the sidecar does not answer for periodSeconds * failureThreshold, a healthy engine is killed.
# Use it only if the engine's image has no shell, and keep the threshold high enough for a restart of the sidecar.
livenessProbe:
  httpGet: {{path: /livez, port: {ADMIN_PORT}}}
  timeoutSeconds: 5
  failureThreshold: 6
""",
}
MODELS_MOUNT: Final = "- {name: models, mountPath: /models, readOnly: true}\n"
VOLUMES: Final = """\
# In memory, so that a full disk cannot suppress the verdict. Room for the usage records (64 MiB, twice during
# compaction) and ten diagnoses: a pod that exceeds the size is evicted.
- {name: sidecar-state, emptyDir: {medium: Memory, sizeLimit: 192Mi}}
- {name: sidecar-tmp, emptyDir: {medium: Memory, sizeLimit: 64Mi}}
# The default of 64 MiB is too small for engines that share tensors between processes.
- {name: engine-shm, emptyDir: {medium: Memory, sizeLimit: 8Gi}}
"""


def main(settings: ManifestSettings) -> int:
    """Print the manifests."""
    print(render(settings), end="")
    return 0


def render(settings: ManifestSettings) -> str:
    """The YAML documents as text. Raises UsageError if two settings contradict each other."""
    monitor = [_pod_monitor(settings)] if settings.monitor == "podmonitor" else []
    return "---\n".join([_deployment(settings), _service(settings), *monitor])


def _deployment(settings: ManifestSettings) -> str:
    return f"""\
apiVersion: apps/v1
kind: Deployment
{_metadata(settings)}
spec:
  replicas: {settings.replicas}
{_lines(2, _strategy(settings))}  # Longer than a start: {settings.startup_seconds} s of the startupProbe, after the
  # old pod's end and the pulling of images. The default, 600 s, reports every slow start as failed.
  progressDeadlineSeconds: {settings.startup_seconds + ROLLOUT_MARGIN_S}
  selector: {{matchLabels: {_labels(settings)}}}
  template:
    metadata:
      labels: {_labels(settings)}
{_lines(6, ANNOTATIONS if settings.monitor == "annotations" else "")}    spec:
      # {ENDPOINT_REMOVAL_S} s until clients stop sending, {DRAIN_S} s for open requests, then the sidecar's shutdown.
      terminationGracePeriodSeconds: {ENDPOINT_REMOVAL_S + DRAIN_S + 40}
      enableServiceLinks: false
      automountServiceAccountToken: false
{_lines(6, SHARED_PROCESSES if settings.stack_dumps == "on" else "")}\
{_lines(6, _pod_security(settings))}      initContainers:
{_lines(8, _sidecar(settings))}      containers:
{_lines(8, _engine(settings))}      volumes:
{_lines(8, _volumes(settings))}"""


def _pod_security(settings: ManifestSettings) -> str:
    profile = "seccompProfile: {type: RuntimeDefault}"
    if not settings.claim:
        return f"securityContext: {{{profile}}}\n"
    return (
        "# The group of the volumes, and so of both containers: by it the engine reads what the sidecar hands over.\n"
        f"securityContext: {{{profile}, fsGroup: {SIDECAR_GROUP}, fsGroupChangePolicy: OnRootMismatch}}\n"
    )


def _strategy(settings: ManifestSettings) -> str:
    """How a rollout replaces pods."""
    note = """\
# Spare GPUs are rare, and without one an additional pod stays pending. So an old pod is deleted first: with one
# replica, nothing serves until the new pod is ready. With spare GPUs, use --max-surge 1.
"""
    if settings.max_surge:
        note = "# Set by --max-surge: new pods need more GPUs, and an old pod is deleted when a new one is ready.\n"
    rolling = f"{{maxSurge: {settings.max_surge}, maxUnavailable: {0 if settings.max_surge else 1}}}"
    return f"{note}strategy: {{type: RollingUpdate, rollingUpdate: {rolling}}}\n"


def _service(settings: ManifestSettings) -> str:
    return f"""\
apiVersion: v1
kind: Service
{_metadata(settings)}
spec:
  selector: {_labels(settings)}
  ports:
    # A number: before Kubernetes 1.33, the port name of a native sidecar resolves to no endpoint.
    - {{name: http, port: 80, targetPort: {RELAY_PORT}}}
"""


def _pod_monitor(settings: ManifestSettings) -> str:
    return f"""\
apiVersion: monitoring.coreos.com/v1
kind: PodMonitor
{_metadata(settings)}
spec:
  selector: {{matchLabels: {_labels(settings)}}}
  podMetricsEndpoints:
    # The relay's page holds the engine's series and the sidecar's.
    - {{port: relay, path: /metrics}}
"""


def _metadata(settings: ManifestSettings) -> str:
    namespace = f", namespace: {quote(settings.namespace)}" if settings.namespace else ""
    return f"metadata: {{name: {quote(settings.name)}{namespace}, labels: {_labels(settings)}}}"


def _labels(settings: ManifestSettings) -> str:
    """The label that selects the objects."""
    return f"{{app.kubernetes.io/name: {quote(settings.name)}}}"


def _sidecar(settings: ManifestSettings) -> str:
    dumps = settings.stack_dumps == "on"
    # The engine's /dev/shm for prepared images, which the engine can read there; the default has only 64 MiB.
    images = "- {name: engine-shm, mountPath: /dev/shm}\n" if settings.claim else ""
    return f"""\
# A native sidecar (Kubernetes 1.29 or later): it starts before the engine, is restarted on its own, and ends after it.
- name: sidecar
  image: {quote(settings.sidecar_image)}
  restartPolicy: Always
  args: ["run"]
  env:
{_lines(4, _sidecar_env(settings))}  ports:
    - {{name: relay, containerPort: {RELAY_PORT}}}
    - {{name: admin, containerPort: {ADMIN_PORT}}}
  # The engine's container starts once this passes. /healthz covers the sidecar only.
  startupProbe: {{{_get("/healthz")}, periodSeconds: 1, failureThreshold: 60}}
  livenessProbe: {{{_get("/healthz")}, periodSeconds: 10, timeoutSeconds: 5, failureThreshold: 6}}
  # The pod is ready when the engine can serve. Load alone never makes it unready.
  readinessProbe: {{{_get("/readyz")}, periodSeconds: 2, timeoutSeconds: 2, failureThreshold: 1}}
  resources:
    # The CPU limit is the number of images prepared concurrently.
    requests: {{cpu: "{settings.sidecar_cpus}", memory: {SIDECAR_MEMORY}}}
    limits: {{cpu: "{settings.sidecar_cpus}", memory: {settings.sidecar_memory}}}
  securityContext:
{_lines(4, ROOT if dumps else NOT_ROOT)}    readOnlyRootFilesystem: true
    allowPrivilegeEscalation: false
    capabilities: {{drop: ["ALL"]{', add: ["SYS_PTRACE"]' if dumps else ""}}}
  volumeMounts:
    - {{name: sidecar-state, mountPath: {STATE_DIR}}}
    - {{name: sidecar-tmp, mountPath: /tmp}}
{_lines(4, images + (MODELS_MOUNT if settings.claim else ""))}"""


def _sidecar_env(settings: ManifestSettings) -> str:
    values = {
        "SIDECAR_ENGINE": f"http://127.0.0.1:{ENGINE_PORT}",
        "SIDECAR_ENGINE_KIND": settings.engine_kind,
        "SIDECAR_LISTEN": f"0.0.0.0:{RELAY_PORT}",
        "SIDECAR_ADMIN": f"0.0.0.0:{ADMIN_PORT}",
        "SIDECAR_STATE_DIR": STATE_DIR,
    }
    note = (
        "# No SIDECAR_MODEL, so images pass through unchanged: preparing them needs the model's directory (--claim).\n"
    )
    if settings.claim:
        values["SIDECAR_MODEL"], note = settings.model, ""
    if settings.gpus:
        values["SIDECAR_GPUS"] = str(settings.gpus)
    if settings.images == "shm":
        values["SIDECAR_IMAGES"] = "shm"
    lines = (f"- {{name: {name}, value: {quote(value)}}}\n" for name, value in values.items())
    return "".join(lines) + note + POD_ENV


def _engine(settings: ManifestSettings) -> str:
    image, command, args = start(settings)
    tries = -(-settings.startup_seconds // STARTUP_PERIOD_S)
    gpu = f', nvidia.com/gpu: "{settings.gpus}"' if settings.gpus else ""
    size = f'{{cpu: "{settings.cpus}", memory: {settings.memory}{gpu}}}'
    models = MODELS_MOUNT if settings.claim else "- {name: models, mountPath: /root/.cache/huggingface}\n"
    return f"""\
- name: engine
  image: {image}
  command: {command}
  # On 127.0.0.1 nothing can bypass the relay: work that the sidecar does not see looks like silence.
  args:
{_lines(4, args)}  env:
    # By default, libraries start one thread per core of the node; this is the container's CPU limit.
    - name: OMP_NUM_THREADS
      valueFrom: {{resourceFieldRef: {{containerName: engine, resource: limits.cpu, divisor: "1"}}}}
{_lines(4, _plugin_env(settings))}  # Liveness does not count before the first token.
  # This probe may fail closed for its {settings.startup_seconds} s: without the sidecar nothing serves either.
  # The port is a number because a name refers to the same container only.
  startupProbe: {{{_get("/startupz")}, periodSeconds: {STARTUP_PERIOD_S}, timeoutSeconds: 5, failureThreshold: {tries}}}
{_lines(2, LIVENESS_PROBES[settings.probe])}    periodSeconds: 5
    # A stalled engine does not exit by itself: it is killed after this time, regardless of the pod's own.
    terminationGracePeriodSeconds: 10
  lifecycle:
    # On deletion, new requests stop first, then open ones finish while engine and sidecar still serve. A stalled engine
    # terminates at once.
    preStop:
      exec: {{command: [sh, -c, {quote(shell.drain(STATE_DIR, ENDPOINT_REMOVAL_S, DRAIN_S))}]}}
  resources:
    requests: {size}
    limits: {size}
  # The engines' images run as root and write to their home; if yours does not, add runAsNonRoot: true.
  securityContext: {{allowPrivilegeEscalation: false, capabilities: {{drop: ["ALL"]}}}}
  volumeMounts:
    - {{name: sidecar-state, mountPath: {STATE_DIR}, readOnly: true}}
    - {{name: engine-shm, mountPath: /dev/shm}}
{_lines(4, models)}"""


def _plugin_env(settings: ManifestSettings) -> str:
    if settings.engine_kind != "vllm" or not settings.claim:
        return ""
    return PLUGIN + (CONNECTOR if settings.images == "shm" else "")


def _volumes(settings: ManifestSettings) -> str:
    models = "# Each pod downloads the models; with --claim they come from a volume.\n- {name: models, emptyDir: {}}\n"
    if settings.claim:
        claim = f"{{claimName: {quote(settings.claim)}, readOnly: true}}"
        models = f"- {{name: models, persistentVolumeClaim: {claim}}}\n"
    return VOLUMES + models


def _get(path: str) -> str:
    return f"httpGet: {{path: {path}, port: {ADMIN_PORT}}}"


def _lines(spaces: int, block: str) -> str:
    return indent(block, " " * spaces)
