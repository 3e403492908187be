"""Values for llm-d's chart, which takes containers and volumes as they are."""

from __future__ import annotations

from typing import Final

from sidecar.errors import UsageError
from sidecar.tools.manifests.answers import SettingsAnswers
from sidecar.tools.manifests.engine_args import moved_from
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

# routing.proxy.targetPort of the chart.
PROXIED_PORT: Final = 8200


def render_values(settings: ManifestSettings) -> str:
    """The values as text. Raises UsageError."""
    if settings.engine_kind != "vllm":
        raise UsageError("--format llm-d is for vLLM, the engine of that chart")
    answers = SettingsAnswers(settings)
    image, _, _ = answers.engine()
    moved = moved_from(settings.port)
    return fill(
        "llm-d",
        port=str(settings.port),
        proxied_port=str(PROXIED_PORT),
        endpoint_removal=str(ENDPOINT_REMOVAL_S),
        drain=str(DRAIN_S),
        pod_grace=str(POD_GRACE_S),
        sidecar=container(answers, added_env(settings.engine_kind, settings.port, moved), mounts=plugin_mount(answers)),
        restarter=answers.when("rules", restarter(answers)),
        container=quote(settings.container),
        engine_image=image,
        engine_port=str(moved),
        engine_probes=probes(answers),
        state_dir=STATE_DIR,
        **added_plugin(answers),
    )
