"""What a restart budget adds to the manifests: an account that may write the Leases, and its token for the sidecar alone."""

from __future__ import annotations

from typing import Final

from sidecar.tools.manifests.settings import ManifestSettings, quoted

TOKEN: Final = "/var/run/secrets/kubernetes.io/serviceaccount"  # where client libraries look


def documents(s: ManifestSettings) -> list[str]:
    """The account and its rights, as YAML documents; none without a budget."""
    if not s.restarts_at_once:
        return []
    names = ", ".join(f"{_lease(s)}-{n}" for n in range(s.restarts_at_once))
    rights = f"""\
rules:
  - apiGroups: [coordination.k8s.io]
    resources: [leases]
    resourceNames: [{names}]
    verbs: [get, update]
  # What is created has no name yet, so a name cannot bound this one.
  - apiGroups: [coordination.k8s.io]
    resources: [leases]
    verbs: [create]
"""
    binding = f"""\
subjects:
  - {{kind: ServiceAccount, name: {quoted(s.name)}}}
roleRef: {{apiGroup: rbac.authorization.k8s.io, kind: Role, name: {quoted(s.name)}}}
"""
    return [
        _head("v1", "ServiceAccount", s) + "automountServiceAccountToken: false\n",
        _head("rbac.authorization.k8s.io/v1", "Role", s) + rights,
        _head("rbac.authorization.k8s.io/v1", "RoleBinding", s) + binding,
    ]


def account(s: ManifestSettings) -> str:
    """The pod's account."""
    return f"serviceAccountName: {quoted(s.name)}\n" if s.restarts_at_once else ""


def env(s: ManifestSettings) -> list[tuple[str, str]]:
    """The sidecar's setting; POD_NAMESPACE must stand before it."""
    places = f"$(POD_NAMESPACE)/{_lease(s)}:{s.restarts_at_once}"
    return [("SIDECAR_RESTART_BUDGET", places)] if s.restarts_at_once else []


def mount(s: ManifestSettings) -> str:
    """The token, where the sidecar finds it."""
    return f"- {{name: sidecar-token, mountPath: {TOKEN}, readOnly: true}}\n" if s.restarts_at_once else ""


def volume(s: ManifestSettings) -> str:
    """The token as a volume, because the engine's container gets none."""
    if not s.restarts_at_once:
        return ""
    return """\
# Only the sidecar gets the account's token: the engine needs no rights in the cluster.
- name: sidecar-token
  projected:
    sources:
      - serviceAccountToken: {path: token, expirationSeconds: 3600}
      - configMap: {name: kube-root-ca.crt, items: [{key: ca.crt, path: ca.crt}]}
"""


def _lease(s: ManifestSettings) -> str:
    return f"{s.name}-restart"


def _head(version: str, kind: str, s: ManifestSettings) -> str:
    namespace = f"  namespace: {quoted(s.namespace)}\n" if s.namespace else ""
    labels = f"  labels:\n    app.kubernetes.io/name: {quoted(s.name)}\n"
    return f"apiVersion: {version}\nkind: {kind}\nmetadata:\n  name: {quoted(s.name)}\n{namespace}{labels}"
