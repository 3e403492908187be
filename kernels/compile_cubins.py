"""Compile the Triton kernels ahead of time, for every architecture: `python -m sidecar.kernels.compile_cubins`.

    --check    compile again and compare with what is shipped; exit status 1 if it differs
    --table    print what the machine code of each kernel needs, without a GPU

Rules: no GPU is needed, and Triton only here. Triton makes PTX; the ptxas of CUDA 12 in its package makes machine code
for plain architectures, such as sm_90 and not sm_90a: that runs on every later device of the same generation, and on
drivers of CUDA 12 and 13. Line numbers are left out, so that the same source gives the same bytes in any folder.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import os
import re
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Any, Final

from sidecar.kernels import cubins, ragged, ragged_jpeg

PTX_VERSION: Final = 87  # the least that knows sm_120
POINTERS: Final = {
    "across": {"words": "*i32", "tables": "*i32", "descriptors": "*i64", "owners": "*i32", "scratch": "*u8"},
    "down": {"scratch": "*u8", "tables": "*i32", "descriptors": "*i64", "owners": "*i32"},
    "inverse": dict.fromkeys(("coefficients", "tables", "owners", "samples", "flags"), "*i32")
    | {"descriptors": "*i64"},
    "colour": {"samples": "*u8", "descriptors": "*i64", "owners": "*i32", "rgb": "*u8"},
}
# Values are only moved: 2 or 4 bytes of any type. Bytes need no table.
VALUE_TYPES: Final = {1: "*u8", 2: "*i16", 4: "*i32"}
EPOCH: Final = (1980, 1, 1, 0, 0, 0)  # of every entry, so that archives compare


def variants() -> dict[str, tuple[str, dict[str, str], dict[str, Any]]]:
    """Each shipped kernel: the Triton function, the types of its pointers, its constants."""
    rows, width = ragged.GPU_TILES.across
    made: dict[str, tuple[str, dict[str, str], dict[str, Any]]] = {
        cubins.ACROSS: ("across", POINTERS["across"], {"TILE_ROWS": rows, "TILE_WIDTH": width})
    }
    height, width = ragged.GPU_TILES.down
    for size, name in cubins.DOWN.items():
        pointers = POINTERS["down"] | {"values": VALUE_TYPES[size], "out": VALUE_TYPES[size]}
        made[name] = ("down", pointers, {"LOOK_UP": size > 1, "TILE_HEIGHT": height, "TILE_WIDTH": width})
    made[cubins.INVERSE] = ("inverse", POINTERS["inverse"], {"BLOCKS": ragged_jpeg.BLOCKS})
    rows, width = ragged_jpeg.COLOUR_TILE
    made[cubins.COLOUR] = ("colour", POINTERS["colour"], {"TILE_ROWS": rows, "TILE_WIDTH": width})
    return made


def to_ptx(name: str, architecture: int) -> tuple[str, dict[str, Any]]:
    """A kernel's PTX for a plain architecture, whose entry is named like the kernel, and Triton's metadata."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from sidecar.kernels import gpu, gpu_jpeg

    function_name, pointers, constants = variants()[name]
    function = getattr(gpu if hasattr(gpu, function_name) else gpu_jpeg, function_name)
    names = list(function.arg_names)
    signature = {n: pointers.get(n, "constexpr") for n in names}
    aligned = {(names.index(n),): [["tt.divisibility", 16]] for n in pointers}
    source = ASTSource(function, signature, {(names.index(n),): v for n, v in constants.items()}, aligned)
    options = {"num_warps": gpu.NUM_WARPS, "ptx_version": PTX_VERSION}
    made = triton.compile(source, GPUTarget("cuda", architecture, 32), options)
    ptx = re.sub(r"\.target sm_\d+a?", f".target sm_{architecture}", made.asm["ptx"])
    return re.sub(rf"\b{function_name}\b", name, ptx), made.metadata._asdict()


def assemble(ptx: str, architecture: int, folder: Path) -> tuple[bytes, dict[str, int]]:
    """Machine code, and what it needs. Raises CalledProcessError."""
    source, target = folder / "kernel.ptx", folder / "kernel.cubin"
    source.write_text(ptx)
    command = [tool("ptxas"), "-v", f"-arch=sm_{architecture}", str(source), "-o", str(target)]
    said = subprocess.run(command, check=True, capture_output=True, text=True, timeout=120).stderr
    return target.read_bytes(), {
        "registers": _number(r"Used (\d+) registers", said),
        "barriers": _number(r"used (\d+) barriers", said),
        "spilled_bytes": _number(r"(\d+) bytes spill stores", said),
    }


def tool(name: str) -> str:
    """A program of the CUDA toolkit that Triton's package brings."""
    import triton

    return str(Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name)


def _number(pattern: str, text: str) -> int:
    found = re.search(pattern, text)
    return int(found[1]) if found else 0


def _ptxas_version() -> str:
    said = subprocess.run([tool("ptxas"), "--version"], check=True, capture_output=True, text=True, timeout=60).stdout
    return re.search(r"V([\d.]+)", said)[1]  # type: ignore[index]


def compile_all() -> bytes:
    """The whole archive."""
    import triton

    entries: dict[str, bytes] = {}
    kernels: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory() as folder:
        for name in variants():
            for architecture in cubins.ARCHITECTURES:
                ptx, metadata = to_ptx(name, architecture)
                if metadata["global_scratch_size"] or metadata["profile_scratch_size"]:
                    raise RuntimeError(f"{name}: Triton wants scratch memory, which our launcher does not give")
                code, needs = assemble(ptx, architecture, Path(folder))
                entries[cubins.entry(name, architecture)] = code
                kernels.setdefault(name, {})[str(architecture)] = {
                    "parameters": len(re.findall(r"^\s*\.param ", ptx.partition("{")[0], re.MULTILINE)),
                    "threads": 32 * metadata["num_warps"],
                    "shared_bytes": metadata["shared"],
                    **needs,
                }
    manifest = {
        "source": cubins.source_hash(),
        "triton": triton.__version__,
        "ptxas": _ptxas_version(),
        "sha256": {name: hashlib.sha256(code).hexdigest() for name, code in entries.items()},
        "kernels": kernels,
    }
    return _archive({cubins.MANIFEST: json.dumps(manifest, indent=1, sort_keys=True).encode(), **entries})


def _archive(entries: dict[str, bytes]) -> bytes:
    made = io.BytesIO()
    with zipfile.ZipFile(made, "w", zipfile.ZIP_LZMA) as archive:
        for name, data in entries.items():
            archive.writestr(zipfile.ZipInfo(name, EPOCH), data, zipfile.ZIP_LZMA)
    return made.getvalue()


def differences(fresh: cubins.Archive, shipped: cubins.Archive) -> list[str]:
    """What the shipped archive has otherwise than a fresh one."""
    mine, theirs = fresh.manifest, shipped.manifest
    return [key for key in ("triton", "ptxas", "source", "sha256", "kernels") if mine[key] != theirs[key]]


def instructions(code: bytes, folder: Path) -> int:
    """The number of instructions in machine code, as the disassembler of Triton's package lists them."""
    path = folder / "kernel.cubin"
    path.write_bytes(code)
    command = [tool("nvdisasm"), "-c", str(path)]
    listing = subprocess.run(command, check=True, capture_output=True, text=True, timeout=120).stdout
    return len(re.findall(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?!NOP|BRA `\(\.L_x)", listing, re.MULTILINE))


def table(shipped: cubins.Archive) -> str:
    """What each kernel needs, as Markdown. Occupancy: warps of a multiprocessor that registers allow, of 64 or 48."""
    rows = ["| kernel | architecture | instructions | registers | spilled bytes | barriers | occupancy | bytes |"]
    rows.append("|---" * 8 + "|")
    with tempfile.TemporaryDirectory() as folder:
        for name, architectures in shipped.manifest["kernels"].items():
            for architecture, needs in sorted(architectures.items(), key=lambda item: int(item[0])):
                code = shipped.code(name, int(architecture))
                share = occupancy(needs["registers"], needs["threads"], int(architecture))
                count = instructions(code, Path(folder))
                rows.append(
                    f"| {name} | sm_{architecture} | {count} | {needs['registers']} | {needs['spilled_bytes']} | "
                    f"{needs['barriers']} | {share:.0%} | {len(code):,} |"
                )
    return "\n".join(rows)


def occupancy(registers: int, threads: int, architecture: int) -> float:
    """The share of a multiprocessor's warps that fit its 65,536 registers, which a warp takes in units of 256."""
    most = 48 if architecture in (89, 120) else 64
    warps = threads // 32
    a_warp = -(-registers * 32 // 256) * 256
    return min(most // warps, 65_536 // (a_warp * warps)) * warps / most


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="compile again and compare; write nothing")
    parser.add_argument("--table", action="store_true", help="print what the shipped machine code needs")
    chosen = parser.parse_args()
    if chosen.table:
        print(table(cubins.Archive()))
        return 0
    os.environ["TRITON_DISABLE_LINE_INFO"] = "1"
    with tempfile.TemporaryDirectory() as folder:
        os.environ["TRITON_CACHE_DIR"] = folder
        made = compile_all()
    if chosen.check:
        changed = differences(cubins.Archive(io.BytesIO(made)), cubins.Archive())
        print(f"differs: {', '.join(changed)}; run make cubins" if changed else "equal")
        return bool(changed)
    cubins.PATH.write_bytes(made)
    print(f"{cubins.PATH.name}: {len(made):,} bytes")
    return 0


if __name__ == "__main__":
    sys.exit(main())
