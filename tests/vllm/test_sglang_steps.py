"""SGLang's side of the steps: its own hook registry applies the plug-in, and its scheduler has what the hooks read.

The registry is SGLang's code, run without the rest of it; a scheduler of this test takes the place of SGLang's.
"""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

from sidecar.launch import engine_plugin
from sidecar.readings import CoreSteps, Value
from sidecar.runtime.plugin_folders import PLUGIN_FOLDER
from sidecar.signals.engine_steps import EngineSteps

from . import engine_sources

pytestmark = [pytest.mark.vllm]

VERSIONS = ("0.5.23",)
HOOKED = ("run_batch", "on_idle")
# Packages without their __init__, which load torch; then the plug-in by its entry point, as SGLang finds it.
PROCESS = """
import sys
from importlib.metadata import entry_points
from types import ModuleType, SimpleNamespace
root, version, rank = sys.argv[1:]
for name in ("sglang", "sglang.srt", "sglang.srt.plugins", "sglang.srt.managers"):
    module = sys.modules[name] = ModuleType(name)
    module.__path__ = [root + "/" + name.replace(".", "/")]
def stand_in(name, **content):
    sys.modules[name] = module = ModuleType(name)
    vars(module).update(content)
    parent, _, last = name.rpartition(".")
    setattr(sys.modules[parent], last, module)
class Scheduler:
    def __init__(self): self.running_batch, self.waiting_queue = batch(), []
    def run_batch(self, batch, proxy=None): return "result"
    def on_idle(self): return "rested"
def batch(requests=0, tokens=None, mixed=False, prefill=True):
    mode = SimpleNamespace(is_mixed=lambda: mixed, is_extend=lambda: prefill, is_target_verify=lambda: False)
    return SimpleNamespace(reqs=["r"] * requests, extend_num_tokens=tokens, forward_mode=mode)
stand_in("sglang.version", __version__=version)
stand_in("sglang.srt.managers.scheduler", Scheduler=Scheduler)
place = SimpleNamespace(pp_rank=0, attn_tp_rank=int(rank))
stand_in("sglang.srt.runtime_context", get_parallel=lambda: place)
[plugin] = entry_points(group="sglang.srt.plugins")
plugin.load()()
from sglang.srt.plugins.hook_registry import HookRegistry
HookRegistry.apply_hooks()
core = Scheduler()
print("ready", flush=True)
for line in sys.stdin:
    if line == "prefill\\n":
        core.running_batch = batch(2, 512, prefill=False)  # decodes, with the count of its prefill
        core.waiting_queue = ["r"] * 3
        print(core.run_batch(batch(1, 512)), flush=True)
    if line == "mixed\\n": print(core.run_batch(batch(3, 514, mixed=True), proxy=None), flush=True)
    if line == "decode\\n": print(core.run_batch(core.running_batch), flush=True)
    if line == "idle\\n": print(core.on_idle(), flush=True)
    if line == "break\\n": del core.waiting_queue
"""


class Process:
    """A process with SGLang's hook registry and the plug-in of a state directory."""

    def __init__(self, state: Path, version: str, rank: int) -> None:
        command = [sys.executable, "-c", PROCESS, str(source()), version, str(rank)]
        pipe = subprocess.PIPE
        self.process = subprocess.Popen(
            command, env={"PYTHONPATH": str(state / PLUGIN_FOLDER)}, stdin=pipe, stdout=pipe, stderr=pipe, text=True
        )
        assert self.process.stdout is not None and self.process.stdout.readline() == "ready\n", self.log()

    def tell(self, line: str) -> str:
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write(line + "\n")
        self.process.stdin.flush()
        return self.process.stdout.readline().strip()

    def log(self) -> str:
        return self.process.communicate()[1]


def source() -> Path:
    """Where SGLang's source is. Skips where it is not."""
    name = f"sglang-{VERSIONS[-1]}"
    if not engine_sources.complete(name):
        pytest.skip(f"no source of {name}: .venv/bin/python -m tests.vllm.engine_sources")
    return engine_sources.folder(name)


@pytest.fixture
def state(tmp_path: Path) -> Path:
    """A state directory with the plug-in."""
    assert engine_plugin.write(str(tmp_path))
    return tmp_path


def read(state: Path) -> CoreSteps | None:
    """What the one core says; None where none does."""
    reader = EngineSteps(state)
    reader.refresh()
    found = reader.read()
    return found.value[0] if isinstance(found, Value) else None


def steps(state: Path) -> tuple[int, ...]:
    """Steps, tokens in all, tokens of the last step, running and waiting requests of the one core."""
    core = read(state)
    return (core.steps, core.tokens, core.last_tokens, core.running, core.waiting) if core else ()


def test_sglangs_registry_runs_the_hooks_and_each_batch_is_seen(state: Path) -> None:
    """A prefill next to running requests, a mixed batch, a decode, and a loop with nothing to run; results pass."""
    process = Process(state, VERSIONS[-1], rank=0)
    assert steps(state) == ()
    assert process.tell("prefill") == "result" and steps(state) == (1, 512, 512, 3, 3)
    assert process.tell("mixed") == "result" and steps(state) == (2, 1026, 514, 3, 3)
    assert process.tell("decode") == "result" and steps(state) == (3, 1028, 2, 2, 3)
    assert process.tell("idle") == "rested" and steps(state) == (3, 1028, 0, 0, 0)
    before = read(state)
    assert process.tell("idle") == "rested" and read(state) == before  # a loop that spins writes nothing
    process.log()
    assert steps(state) == ()


def test_of_the_ranks_of_one_batch_the_first_writes(state: Path) -> None:
    """Each would count the same tokens."""
    process = Process(state, VERSIONS[-1], rank=1)
    assert process.tell("prefill") == "result" and process.tell("idle") == "rested"
    assert steps(state) == ()
    process.log()


def test_another_version_is_said_and_left_alone(state: Path) -> None:
    """No hook, one line, and batches run."""
    process = Process(state, "0.4.9", rank=0)
    assert process.tell("prefill") == "result" and steps(state) == ()
    assert "SGLang 0.4.9 is not known" in process.log()


def test_a_report_that_fails_fails_no_batch(state: Path) -> None:
    """What the hook reads is gone: said once, and batches run."""
    process = Process(state, VERSIONS[-1], rank=0)
    process.tell("prefill")
    assert process.process.stdin is not None
    process.process.stdin.write("break\n")
    assert process.tell("decode") == "result" and process.tell("decode") == "result"
    assert process.log().count("sees no steps") == 1


def test_sglangs_scheduler_has_what_the_hooks_need() -> None:
    """Plug-ins are loaded before a scheduler is made; the hooked methods and what the hooks read exist, by name."""
    srt = source() / "sglang" / "srt"
    text = (srt / "managers" / "scheduler.py").read_text()
    nodes = {node.name: node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.ClassDef | ast.FunctionDef)}
    scheduler = nodes["Scheduler"]
    methods = {node.name: node for node in scheduler.body if isinstance(node, ast.FunctionDef)}
    assert set(HOOKED) <= methods.keys()
    assert [each.arg for each in methods["run_batch"].args.args][:2] == ["self", "batch"]
    start = ast.unparse(nodes["run_scheduler_process"])
    assert start.index("load_plugins()") < start.index("Scheduler(")
    for name in ("self.waiting_queue: List[Req] = []", "self.running_batch: ScheduleBatch = ScheduleBatch("):
        assert name in text
    batch = (srt / "managers" / "schedule_batch.py").read_text()
    assert "extend_num_tokens: Optional[int] = None" in batch and "    reqs: List[Req]" in batch
    modes = (srt / "model_executor" / "forward_batch_info.py").read_text()
    assert all(f"def {name}(self" in modes for name in ("is_mixed", "is_extend", "is_target_verify"))
    loops = [path for path in srt.rglob("*.py") if "self.run_batch(" in path.read_text()]
    assert len(loops) > 3 and all("self.on_idle()" in path.read_text() for path in loops)
