"""Pure: the shell lines that run in the engine's container, which has none of our code. They work in dash, bash and busybox."""

from __future__ import annotations

from sidecar.health.probes import VERDICT_STALE_S


def safe_liveness(state: str) -> str:
    """The shell line of the safe livenessProbe: exit 1 only where `stalled` exists and was touched in the last seconds.

    Whatever is missing (the file, `stat`, `date`) passes.
    """
    age = "a=$(( $(date +%s) - ${t:-0} ))"
    return f"t=$(stat -c %Y {state}/stalled 2>/dev/null) || exit 0; {age}; [ $a -gt {VERDICT_STALE_S:.0f} ] || [ $a -lt -{VERDICT_STALE_S:.0f} ]"


def drain(state: str, endpoints: int, seconds: int) -> str:
    """The shell line of the engine's preStop: wait until nothing is outstanding. At once where the engine is stalled or dead.

    A stalled engine whose kill is held back has no file `stalled`; the verdict says it.
    """
    lost = f"""[ -e {state}/stalled ] || grep -q '"verdict": "stalled"' {state}/verdict.json"""
    idle = f"""grep -q '"outstanding": 0[,}}]' {state}/verdict.json"""
    return (
        f"{{ {lost}; }} && exit 0; sleep {endpoints}; n=0; "
        f"while [ $n -lt {seconds} ] && ! {idle}; do sleep 1; n=$((n+1)); done"
    )
