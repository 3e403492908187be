"""The core's tests on Pythons newer than this machine's, in a root of Debian sid: `make test-python`.

    .venv/bin/python -m tests.newer_pythons [VERSION ...] [-- PYTEST ARGUMENTS]

Rules: root only, standard library only. The root is made once, by debootstrap, and kept in the cache; the checkout and
an environment for each version are made again in each run. Mounts live in a namespace of their own and end with it.
Where the root cannot be made the run is skipped with the reason; TEST_REQUIRE=1 makes that an error.

What is left out is in the table below: torch and what needs it (`tests/images`: bits are compared on Python 3.11 to
3.13), and packages that have no wheel for a version.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from .environments import NotMade, cache, find_uv, say

CHECKOUT = Path(__file__).resolve().parent.parent
MIRROR = "http://deb.debian.org/debian"
CERTIFICATES = Path("etc/ssl/certs/ca-certificates.crt")
FREE_BYTES = 3 << 30
MAKE_SECONDS, INSTALL_SECONDS = 1800, 1800
OF_THE_HOST = ("http_proxy", "https_proxy", "no_proxy", "HTTP_PROXY", "HTTPS_PROXY", "NO_PROXY", "TEST_REQUIRE")
EXTRAS = "images,diagnose,orca,postgres,tokenizer,test"
MARKERS = " and ".join(
    f"not {name}"
    for name in ("vllm", "engines", "clients", "charts", "fixtures", "containers", "site", "matrix", "slow")
)


@dataclass(frozen=True, slots=True)
class Python:
    """A version of Python. `unpinned`: packages whose pinned release has no wheel for it. `ignored`: tests' paths."""

    version: str
    unpinned: frozenset[str] = frozenset()
    ignored: tuple[str, ...] = ("tests/images",)


PYTHONS = (
    Python("3.14"),
    # cel-python needs google-re2, which has no wheel either
    Python("3.15", frozenset({"numpy", "pyyaml"}), ("tests/images", "tests/tools/test_cel.py")),
)
PACKAGES = ("ca-certificates", "g++", "git", "make", "procps", *(f"python{each.version}-dev" for each in PYTHONS))


def made_root() -> Path:
    """The root of Debian sid, made unless it exists. Raises NotMade."""
    root = cache() / "sid-root"
    if (root / "made").exists():
        return root
    if os.geteuid() != 0:
        raise NotMade("only root can make and enter a root of Debian")
    if not shutil.which("debootstrap"):
        raise NotMade("debootstrap is not installed: apt-get install debootstrap")
    cache().mkdir(parents=True, exist_ok=True)
    if (free := shutil.disk_usage(cache()).free) < FREE_BYTES:
        raise NotMade(f"{FREE_BYTES >> 30} GiB of free disk are needed under {cache()}: {free >> 30} are free")
    say(f"making {root}, once")
    shutil.rmtree(root, ignore_errors=True)
    command = ("debootstrap", "--variant=minbase", f"--include={','.join(PACKAGES)}", "sid", str(root), MIRROR)
    done = subprocess.run(command, capture_output=True, text=True, timeout=MAKE_SECONDS)
    if done.returncode:
        last = (done.stdout + done.stderr).strip().splitlines()[-3:]
        raise NotMade(f"debootstrap could not make {root} from {MIRROR}: {' / '.join(last)}")
    if Path("/", CERTIFICATES).exists():  # it trusts whom this machine trusts
        shutil.copy(Path("/", CERTIFICATES), root / CERTIFICATES)
    for waste in (root / "var/cache/apt/archives").glob("*.deb"):
        waste.unlink()
    (root / "made").touch()
    return root


def inside(root: Path, command: list[str], seconds: float | None = None) -> int:
    """Run a command in the root, in the checkout's copy. Returns its exit code."""
    enter = (
        'root=$1; shift; mount -t proc proc "$root/proc"; mount -t tmpfs tmpfs "$root/tmp";'
        'for each in dev sys; do mount --rbind "/$each" "$root/$each"; done;'
        'exec chroot "$root" env -C /checkout "$@"'
    )
    kept = [f"{name}={os.environ[name]}" for name in OF_THE_HOST if name in os.environ]
    ours = [
        "HOME=/root",
        "PATH=/usr/local/bin:/usr/bin:/usr/sbin:/bin",
        "LANG=C.UTF-8",
        f"SSL_CERT_FILE=/{CERTIFICATES}",
    ]
    words = ["unshare", "--mount", "sh", "-ec", enter, "sh", str(root), "-i", *ours, *kept, *command]
    return subprocess.run(words, stdin=subprocess.DEVNULL, timeout=seconds, check=False).returncode


def copy_checkout(root: Path) -> None:
    """The checkout's files, those that are not committed yet included, and the installer."""
    there = root / "checkout"
    shutil.rmtree(there, ignore_errors=True)
    there.mkdir()
    listed = ("git", "ls-files", "-z", "--cached", "--others", "--exclude-standard", "--deduplicate")
    names = subprocess.run(listed, cwd=CHECKOUT, capture_output=True, check=True).stdout.decode().split("\0")
    for name in filter(None, names):
        if os.path.lexists(CHECKOUT / name):  # deleted files are still listed
            (there / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(CHECKOUT / name, there / name, follow_symlinks=False)
    shutil.copy(find_uv(), root / "usr/local/bin/uv")
    if Path("/etc/resolv.conf").exists():
        shutil.copy("/etc/resolv.conf", root / "etc/resolv.conf")


def test(root: Path, python: Python, args: list[str]) -> int:
    """Install the sidecar and what its tests need for a version, and run the tests. Returns pytest's exit code."""
    pins = (CHECKOUT / "constraints.txt").read_text().splitlines(keepends=True)
    wanted = "".join(line for line in pins if line.partition("==")[0] not in python.unpinned)
    (root / "checkout" / "constraints.txt").write_text(wanted)
    home = f"/venv-{python.version}"
    options = ("--compile-bytecode", "-c", "constraints.txt")
    say(f"installing the sidecar on Python {python.version}")
    for command in (
        ["uv", "venv", "--quiet", "--clear", "--python", f"/usr/bin/python{python.version}", home],
        ["uv", "pip", "install", "--quiet", "--python", f"{home}/bin/python", *options, "-e", f".[{EXTRAS}]"],
    ):
        if code := inside(root, command, INSTALL_SECONDS):
            print(f"Python {python.version}: `{' '.join(command)}` ended with {code}", file=sys.stderr)
            return code
    say(f"testing on Python {python.version}")
    ignored = [f"--ignore={path}" for path in python.ignored]
    return inside(root, [f"{home}/bin/python", "-m", "pytest", "-m", MARKERS, *ignored, *args])


def main(words: list[str]) -> int:
    """Test on the versions that are named, or on all. Returns 0 if all passed, or were skipped."""
    cut = words.index("--") if "--" in words else len(words)
    names, args = words[:cut], words[cut + 1 :]
    known = {each.version: each for each in PYTHONS}
    if unknown := [name for name in names if name not in known]:
        print(f"no such version here: {', '.join(unknown)}; there are {', '.join(known)}", file=sys.stderr)
        return 2
    try:
        root = made_root()
        copy_checkout(root)
    except NotMade as e:
        print(f"tests on newer Pythons are skipped: {e}", file=sys.stderr)
        return int(os.environ.get("TEST_REQUIRE") == "1")
    codes = {name: test(root, known[name], args) for name in names or known}
    print("; ".join(f"Python {name}: {'passed' if code == 0 else f'failed ({code})'}" for name, code in codes.items()))
    return max(codes.values())


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
