"""Pure: shell lines for the engine's container, without any code of the sidecar; for dash, bash and busybox."""

from __future__ import annotations

from sidecar.health.probes import VERDICT_STALE_S


def safe_liveness(state: str) -> str:
    """The shell line of the safe livenessProbe: exit 1 only if `stalled` exists and was touched in the last seconds.

    If anything is missing (the file, `stat`, `date`), it passes.
    """
    age = "a=$(( $(date +%s) - ${t:-0} ))"
    stale = f"[ $a -gt {VERDICT_STALE_S:.0f} ] || [ $a -lt -{VERDICT_STALE_S:.0f} ]"
    return f"t=$(stat -c %Y {state}/stalled 2>/dev/null) || exit 0; {age}; {stale}"


def restart(state: str, code: int, failures: int = 3, period: int = 5) -> str:
    """The shell line of the container `restarter`: exit with `code` after so many failures of liveness in a row."""
    return (
        f"trap 'exit 0' TERM; n=0; while sleep {period}; do "
        f"if ( {safe_liveness(state)} ); then n=0; else n=$((n+1)); fi; [ $n -lt {failures} ] || exit {code}; done"
    )


def drain(state: str, endpoints: int, seconds: int) -> str:
    """The shell line of the engine's preStop: wait until nothing is outstanding; exit at once if it is stalled or dead.

    A stalled engine whose kill is held back has no file `stalled`, but the verdict `stalled`.
    """
    lost = f"""[ -e {state}/stalled ] || grep -q '"verdict": "stalled"' {state}/verdict.json"""
    idle = f"""grep -q '"outstanding": 0[,}}]' {state}/verdict.json"""
    return (
        f"{{ {lost}; }} && exit 0; sleep {endpoints}; n=0; "
        f"while [ $n -lt {seconds} ] && ! {idle}; do sleep 1; n=$((n+1)); done"
    )
