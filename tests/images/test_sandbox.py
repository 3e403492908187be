"""What a codec that a hostile image has taken over can do in a worker: tried by processes that were confined alike.

The filter is also run by an interpreter of the kernel's instructions, which knows nothing of how it was made: so both
architectures are held on either.
"""

from __future__ import annotations

import asyncio
import errno
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sidecar.images.service import ImageService
from sidecar.images.worker import landlock, sandbox, seccomp
from sidecar.images.worker.seccomp import AARCH64, MACHINES, X86_64, Machine
from sidecar.kernels.grid import ProcessorSpec
from sidecar.runtime.prctl import SET_NO_NEW_PRIVS
from sidecar.tools import synthetic_photos
from tests.waiting import PATIENCE

from .conftest import Server

HEADERS = {"x86_64": "/usr/include/x86_64-linux-gnu/asm/unistd_64.h", "aarch64": "/usr/include/asm-generic/unistd.h"}
ALLOW, EPERM, KILL = "allow", "EPERM", "kill"

needs_seccomp = pytest.mark.skipif(os.uname().machine not in MACHINES, reason="no filter for this architecture")


def confined(body: str, tmp_path: Path, enter: str = "sandbox.enter((1, 2))") -> Any:
    """What a confined process makes of `body`, whose `out` it prints as JSON."""
    code = f"""
import ctypes, json, mmap, os, resource, signal, socket, sys, threading
from pathlib import Path
from sidecar.images.worker import landlock, sandbox, seccomp
def tried(call, *arguments):
    try:
        call(*arguments)
    except OSError as e:
        return e.errno
    except RuntimeError:  # threads
        return -1
    return 0
here = {str(tmp_path)!r}
listening = socket.create_server(("127.0.0.1", 0))
outside = listening.getsockname()
sandbox.drop_capabilities()
missing = {enter}
out = None
{body}
print(json.dumps(out))
"""
    env = os.environ | {"SECRET_OF_THE_SIDECAR": "xyzzy"}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=env, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@needs_seccomp
def test_nothing_can_be_opened_started_or_reached(tmp_path: Path) -> None:
    """Sockets, files, processes, programs and signals are refused, each by itself."""
    (tmp_path / "secret").write_text("xyzzy")
    attempts = {
        "tcp": "socket.socket",
        "unix": "socket.socket, socket.AF_UNIX",
        "pair": "socket.socketpair",
        "pipe": "os.pipe",
        "read a file": "os.open, here + '/secret', os.O_RDONLY",
        "write a file": "os.open, here + '/new', os.O_WRONLY | os.O_CREAT",
        "list": "os.listdir, here",
        "stat": "os.stat, here + '/secret'",
        "remove": "os.unlink, here + '/secret'",
        "link": "os.symlink, 'a', here + '/b'",
        "chdir": "os.chdir, here",
        "fork": "os.fork",
        "exec": "os.execv, '/bin/true', ['true']",
        "memfd": "os.memfd_create, 'x'",
        "kill the parent": "os.kill, os.getppid(), 0",
        "kill itself by number": "os.kill, 1, 0",
        "nice": "os.nice, -1",
        "another's limits": "resource.prlimit, os.getppid(), 7",
        "uid": "os.setuid, 0",
    }
    body = "out = {\n" + "".join(f"{name!r}: tried({call}),\n" for name, call in attempts.items()) + "}"
    got = confined(body, tmp_path)
    assert got == dict.fromkeys(attempts, errno.EPERM)
    assert {path.name for path in tmp_path.iterdir()} == {"secret"}


@needs_seccomp
def test_memory_and_time_go_on(tmp_path: Path) -> None:
    """What codecs need: large memory, locks, timers, clocks, randomness."""
    body = """
found = len(bytearray(30 << 20))
with threading.Lock():
    signal.setitimer(signal.ITIMER_REAL, 50); signal.setitimer(signal.ITIMER_PROF, 50)
import time
time.sleep(0.001)
out = [found, len(os.urandom(8)), os.getpid() > 0, len(mmap.mmap(-1, 1 << 20)), time.time() > 0]
"""
    assert confined(body, tmp_path) == [30 << 20, 8, True, 1 << 20, True]


@needs_seccomp
def test_no_thread_starts_and_every_decoder_works(tmp_path: Path) -> None:
    """Pictures large enough for decoders that would divide their work: WebP's does from 512 pixels, with threads."""
    body = """
out = [tried(threading.Thread(target=print).start)]
for format, options in saved:
    data = io.BytesIO(); picture.save(data, format, **options); data = data.getvalue()
    decoded = decode(data, file_headers.read(data), ImageLimits(20 << 20, 20_000_000))
    out.append(decoded.shape == (900, 1400, 3))
"""
    enter = """(warm_up.preimport(), sandbox.enter((1, 2)))[1]"""
    code = """
import io
from PIL import Image
from sidecar.images import file_headers
from sidecar.images.protocol import ImageLimits
from sidecar.images.worker import warm_up
from sidecar.images.worker.decode import decode
from sidecar.tools.synthetic_photos import pixels
picture = Image.fromarray(pixels(1400, 900, 1))
saved = [("JPEG", {}), ("JPEG", {"progressive": True}), ("PNG", {}), ("WEBP", {}), ("WEBP", {"lossless": True}),
         ("WEBP", {"save_all": True, "append_images": [picture.rotate(9)]}), ("TIFF", {"compression": "tiff_lzw"}),
         ("TIFF", {"compression": "jpeg"}), ("GIF", {}), ("BMP", {})]
for format, _ in saved:  # each codec once: it is what the warm-up does
    picture.resize((9, 9)).save(io.BytesIO(), format)
"""
    assert confined(body, tmp_path, f"None\n{code}missing = {enter}") == [-1, *[True] * 10]


@needs_seccomp
def test_threads_started_before_are_confined_too(tmp_path: Path) -> None:
    """A thread that was there when the filter came meets it as well."""
    body = """
def late():
    begun.set()
    entered.wait()
    out.append(tried(socket.socket))
out, begun, entered = [], threading.Event(), threading.Event()
thread = threading.Thread(target=late)
thread.start()
begun.wait()
why = seccomp.install()
entered.set()
thread.join()
out.append(why)
"""
    assert confined(body, tmp_path, enter="()") == [errno.EPERM, ""]


@needs_seccomp
def test_no_memory_becomes_executable(tmp_path: Path) -> None:
    """Neither a new mapping nor an old one: injected code cannot run."""
    body = """
libc = ctypes.CDLL(None, use_errno=True)
libc.mmap.restype = ctypes.c_void_p
libc.mprotect.argtypes = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int
plain = libc.mmap(None, ctypes.c_size_t(4096), 3, 0x22, -1, ctypes.c_long(0))
out = [libc.mprotect(plain, 4096, 1), libc.mprotect(plain, 4096, 5), ctypes.get_errno()]
out.append(tried(mmap.mmap, -1, 4096, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, mmap.PROT_EXEC | mmap.PROT_READ))
"""
    assert confined(body, tmp_path) == [0, -1, errno.EPERM, errno.EPERM]


def test_environment_and_descriptors_are_gone(tmp_path: Path) -> None:
    """No variable is left, not even in the kernel's view; of the descriptors only those that are named."""
    body = """
libc = ctypes.CDLL(None)
libc.getenv.restype = ctypes.c_char_p
out = [dict(os.environ), libc.getenv(b"SECRET_OF_THE_SIDECAR"), listed, view]
"""
    enter = "sandbox._erase_environment(), sandbox._close_all_but({1, 2})\n"
    enter += "listed = sorted(map(int, os.listdir('/proc/self/fd')))[:-1]\n"
    enter += "view = Path('/proc/self/environ').read_bytes().strip(b'\\0').decode()"
    assert confined(body, tmp_path, enter) == [{}, None, [0, 1, 2], ""]


@pytest.mark.skipif(not landlock.version(), reason="this kernel has no Landlock")
def test_landlock_alone_keeps_files_and_ports_away(tmp_path: Path) -> None:
    """Where there is no filter: no file can be read, written, listed or run; open ones stay readable."""
    (tmp_path / "secret").write_text("xyzzy")
    body = """
out = [why, tried(os.open, here + "/secret", os.O_RDONLY), tried(os.open, here + "/new", os.O_WRONLY | os.O_CREAT),
       tried(os.listdir, here), tried(os.unlink, here + "/secret"), tried(os.execv, "/bin/true", ["true"]),
       os.read(opened, 5).decode()]
"""
    enter = 'os.open(here + "/secret", os.O_RDONLY)\nopened, why = missing, landlock.install()'
    assert confined(body, tmp_path, enter) == ["", *[errno.EACCES] * 5, "xyzzy"]
    if landlock.version() >= min(landlock.NETWORK_RIGHTS):
        body = "out = [tried(socket.create_connection, outside), tried(socket.create_server, ('127.0.0.1', 0))]"
        assert confined(body, tmp_path, "landlock.install()") == [errno.EACCES] * 2


def test_the_image_server_gets_no_secret(tmp_path: Path) -> None:
    """Neither the engine's key nor a variable that only the sidecar reads; what libraries are steered by stays."""
    server = tmp_path / "server"
    server.write_text("#!/bin/sh\nenv\ncat\n")
    server.chmod(0o700)
    code = f"""
import socket, sys
from sidecar.launch import process_tree
from sidecar.settings import Settings
sys.executable = {str(server)!r}
process_tree._exec_image_server(Settings(engine_key="xyzzy", image_workers=3), socket.socket(), 0)
"""
    env = os.environ | {"SIDECAR_ENGINE_KEY": "xyzzy", "HF_TOKEN": "xyzzy", "CUDA_VISIBLE_DEVICES": "7"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env, timeout=60, check=True)
    assert "xyzzy" not in done.stdout
    assert "CUDA_VISIBLE_DEVICES=7" in done.stdout and '"image_workers":3' in done.stdout.replace(" ", "")


def environment(pid: int) -> bytes:
    """The environment of a process, as the kernel shows it."""
    return Path(f"/proc/{pid}/environ").read_bytes().strip(b"\0")


def status(pid: int) -> dict[str, str]:
    """What the kernel says of a process."""
    return dict(re.findall(r"(\w+):\s+(.*)", Path(f"/proc/{pid}/status").read_text()))


def open_files(pid: int) -> dict[int, str]:
    """What the descriptors of a process are."""
    return {int(fd.name): str(fd.readlink()) for fd in Path(f"/proc/{pid}/fd").iterdir()}


def idle_files(pid: int) -> dict[int, str]:
    """The descriptors of a worker that has closed the connection of its last job; all that it has after a while."""
    deadline = time.monotonic() + PATIENCE
    while len(files := open_files(pid)) > 5 and time.monotonic() < deadline:
        time.sleep(0.01)  # a closed descriptor gives no event
    return files


async def test_real_workers_are_confined(start_server: Callable[..., Server], spec: ProcessorSpec) -> None:
    """A worker that has served an image: a filter, no environment, and no descriptors but socket, log and nowhere."""
    server = start_server({"SECRET_OF_THE_SIDECAR": "xyzzy"}, image_workers=1)
    images = ImageService(server.path, server.settings, spec)
    assert (await images.tensors([(synthetic_photos.photo(64, 64), False)]))[0].prepared.outcome == "ok"
    (worker,) = server.workers()
    assert environment(worker) == b"" and b"xyzzy" in environment(server.pid)
    found = status(worker)
    assert found["Seccomp"] == ("2" if os.uname().machine in MACHINES else "0") and found["NoNewPrivs"] == "1"
    files = await asyncio.to_thread(idle_files, worker)
    assert {files.pop(fd) for fd in (0, 1, 2)} == {"/dev/null"}
    assert len(files) == 2 and sum(name.startswith("socket:") for name in files.values()) >= 1, files
    server.stop()


def test_the_probe_says_what_this_machine_lacks() -> None:
    """Here nothing, or Landlock, or a filter for this architecture: exactly what the kernel and the tables say."""
    missing = dict(line.split(": ", 1) for line in sandbox.probe())
    assert ("Landlock" in missing) == (landlock.version() == 0)
    assert ("seccomp" in missing) == (os.uname().machine not in MACHINES)


# --- the filter itself, as the kernel would run it ---


def run(program: list[seccomp.Instruction], audit: int, number: int, *arguments: int) -> str:
    """The decision of a filter: an interpreter of the instructions that linux/filter.h describes."""
    words = {0: number, 4: audit}
    for index in range(6):
        value = arguments[index] if index < len(arguments) else 0
        words[16 + 8 * index], words[20 + 8 * index] = value & 0xFFFFFFFF, value >> 32
    at, loaded = 0, 0
    while True:
        code, yes, no, constant = program[at]
        at += 1
        if code == 0x20:  # BPF_LD | BPF_W | BPF_ABS
            loaded = words[constant]
        elif code == 0x15:  # BPF_JMP | BPF_JEQ | BPF_K
            at += yes if loaded == constant else no
        elif code == 0x45:  # BPF_JMP | BPF_JSET | BPF_K
            at += yes if loaded & constant else no
        else:
            assert code == 0x06  # BPF_RET | BPF_K
            return {0x7FFF0000: ALLOW, 0x50001: EPERM, 0x80000000: KILL}[constant]


@pytest.mark.parametrize("name", MACHINES)
def test_the_numbers_are_the_kernels(name: str) -> None:
    """Each call has the number of the kernel's headers, that of seccomp itself included."""
    header = Path(HEADERS[name])
    if not header.is_file():
        pytest.skip(f"needs {header}")
    text = header.read_text()
    if name == "aarch64":  # 64-bit systems take the calls with one name
        text = re.sub(r"__NR3264_(\w+) (\d+)", r"__NR_\1 \2", text)
    theirs = {call: int(number) for call, number in re.findall(r"#define __NR_(\w+) (\d+)$", text, re.MULTILINE)}
    machine = MACHINES[name]
    assert machine.calls == {call: theirs[call] for call in machine.calls}
    assert machine.seccomp == theirs["seccomp"]
    absent = {*seccomp.PLAIN, *seccomp.CONDITIONS} - set(machine.calls)
    assert not absent & set(theirs), "a call that this architecture has is on the list, without its number"


@pytest.mark.parametrize("machine", [X86_64, AARCH64])
def test_every_other_call_is_refused(machine: Machine) -> None:
    """All numbers of the table and beyond: those on the list pass, the others do not, nor the x32 forms."""
    program = seccomp.program(machine)
    known = set(machine.calls.values())
    plain = {machine.calls[call] for call in seccomp.PLAIN if call in machine.calls}
    for number in (*range(600), *(0x40000000 + n for n in range(600)), 0xFFFFFFFF):
        if number in plain:
            assert run(program, machine.audit, number) == ALLOW
        elif number not in known:
            assert run(program, machine.audit, number) == EPERM
    other = AARCH64 if machine is X86_64 else X86_64
    assert run(program, other.audit, 0) == KILL and run(program, 0x40000003, 0) == KILL  # the latter: i386


@pytest.mark.parametrize("machine", [X86_64, AARCH64])
def test_arguments_decide(machine: Machine) -> None:
    """No executable memory; no control of terminals and no signals by descriptors."""
    program = seccomp.program(machine)
    cases = [
        ("mmap", (0, 4096, 3), ALLOW), ("mmap", (0, 4096, 7), EPERM), ("mmap", (0, 4096, 4), EPERM),
        ("mprotect", (1 << 40, 4096, 1), ALLOW), ("mprotect", (1 << 40, 4096, 5), EPERM),
        ("ioctl", (0, 0x5421), ALLOW), ("ioctl", (0, 0x5412), EPERM),  # FIONBIO, TIOCSTI
        ("fcntl", (0, 4, 0), ALLOW), ("fcntl", (0, 8, 1), EPERM), ("fcntl", (0, 10, 9), EPERM),  # SETFL, SETOWN, SETSIG
        ("prlimit64", (0, 7), ALLOW), ("prlimit64", (1, 7), EPERM),
    ]  # fmt: skip
    for call, arguments, wanted in cases:
        assert run(program, machine.audit, machine.calls[call], *arguments) == wanted, (call, arguments)


def test_without_no_new_privs_the_reason_is_said(tmp_path: Path) -> None:
    """Where the kernel refuses, the reason comes back as words, and nothing is raised."""
    body = "out = [why, tried(socket.socket)]"
    enter = "None\nlibc = ctypes.CDLL(None)\nwhy = seccomp.install()"
    assert SET_NO_NEW_PRIVS == 38
    assert confined(body, tmp_path, enter)[0] == (
        "" if os.uname().machine in MACHINES else f"no filter for {os.uname().machine}"
    )
