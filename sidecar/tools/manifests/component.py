"""A Kustomize component: the sidecar as patches of workloads that have a label."""

from __future__ import annotations

from typing import Final

from sidecar.tools.manifests.answers import Answers, SettingsAnswers
from sidecar.tools.manifests.engine_args import ENGINES, moved_from
from sidecar.tools.manifests.parts import fill
from sidecar.tools.manifests.render import (
    DRAIN_S,
    ENDPOINT_REMOVAL_S,
    POD_GRACE_S,
    STATE_DIR,
    added_env,
    added_plugin,
    container,
    plugin_mount,
    probes,
    restarter,
)
from sidecar.tools.manifests.settings import ManifestSettings, quote

# Two handlers of a probe would be merged into one that is invalid.
REPLACE: Final = "$patch: replace\n"


def files(settings: ManifestSettings) -> dict[str, str]:
    """The component's files by name."""
    answers: Answers = SettingsAnswers(settings)
    moved = moved_from(settings.port)
    host = ENGINES[settings.engine_kind].host
    return {
        "kustomization.yaml": fill(
            "component", container=settings.container, port=str(settings.port), engine_port=str(moved)
        ),
        "sidecar.yaml": fill(
            "component-patch",
            endpoint_removal=str(ENDPOINT_REMOVAL_S),
            drain=str(DRAIN_S),
            pod_grace=str(POD_GRACE_S),
            sidecar=container(
                answers, added_env(settings.engine_kind, settings.port, moved), mounts=plugin_mount(answers)
            ),
            restarter=answers.when("rules", restarter(answers)),
            container=quote(settings.container),
            engine_probes=probes(answers, REPLACE),
            state_dir=STATE_DIR,
            **added_plugin(answers),
        ),
        "arguments.yaml": fill("component-arguments", host=quote(f"{host}=127.0.0.1"), port=quote(f"--port={moved}")),
    }
