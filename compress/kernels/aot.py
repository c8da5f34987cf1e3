"""Compile Triton kernels without a GPU, and read what the compiler made of them from the machine code.

    python -m compress.kernels.aot [--arch 80 90]

prints a line of JSON for every configuration that `compress.kernels.int4` may run: registers, bytes of stack (spills),
shared memory, and the instructions of the main loop per weight of W. The disassembler comes with Triton.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import tempfile
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from compress.kernels.int4 import TILES, Tile, int4_kernel

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
POINTERS = ("x", "words", "scale", "offset", "up", "dx", "y")
ALIGNED = (*POINTERS, "N", "columns", "rows")  # multiples of 16, as the launcher finds them


class Configuration(NamedTuple):
    """One specialization of the kernel."""

    tile: Tile
    half: str  # fp16 or bf16
    group: int
    rank: int
    split: bool
    whole: bool


def configurations() -> Iterator[Configuration]:
    """Those that may run: each tile with each kind of group, and the branches and splits of the usual one."""
    for tile, half, group in product(TILES.values(), ("fp16", "bf16"), (32, 64, 128)):
        yield Configuration(tile, half, group, 0, True, True)
    for tile, half in product(TILES.values(), ("fp16", "bf16")):
        yield Configuration(tile, half, 128, 64, False, False)


def compile_one(one: Configuration, arch: int) -> dict[str, Any]:
    """Compile a configuration for sm_`arch`, and measure its machine code."""
    constants = {
        "GROUP": one.group,
        "TILES": 4 if one.group % 64 == 0 else 2,
        "BM": one.tile.rows,
        "BN": one.tile.outputs,
        "RANK": one.rank,
        "SPLIT": one.split,
        "UNROLL": one.tile.unroll,
        "WHOLE": one.whole,
    }
    types = dict.fromkeys(POINTERS, f"*{one.half}") | {"words": "*i32", "y": "*fp32" if one.split else f"*{one.half}"}
    names = list(int4_kernel.arg_names)
    signature = {name: "constexpr" if name in constants else types.get(name, "i32") for name in names}
    fixed = {(names.index(name),): value for name, value in constants.items()}
    attributes = {(names.index(name),): [["tt.divisibility", 16]] for name in ALIGNED}
    source = ASTSource(int4_kernel, signature, fixed, attributes)
    options = {"num_warps": one.tile.warps, "num_stages": one.tile.stages}
    made = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
    registers, stack, loop = read_machine_code(made.asm["cubin"])
    weights = one.tile.unroll * one.tile.outputs * one.group / (32 * one.tile.warps)  # of a thread, each time around
    return {
        "arch": arch,
        **one._asdict(),
        "tile": one.tile._asdict(),
        "registers": registers,
        "stack_bytes": stack,
        "shared_bytes": made.metadata.shared,
        "instructions_per_weight": loop / weights,
    }


def read_machine_code(cubin: bytes) -> tuple[int, int, int]:
    """Registers, bytes of stack and instructions of the longest loop of a cubin with one kernel."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage = _run("cuobjdump", "-res-usage", file.name)
        listing = _run("nvdisasm", "-c", file.name)
    found = re.search(r"REG:(\d+) STACK:(\d+)", usage)
    assert found is not None
    labels: dict[str, int] = {}
    loop = count = 0
    for line in listing.splitlines():
        label = re.match(r"^(\.L_x_\d+):", line)
        if label:
            labels[label[1]] = count
        if re.match(r"^\s+/\*[0-9a-f]+\*/", line):
            count += 1
            back = re.search(r"BRA.*?`\((\.L_x_\d+)\)", line)
            if back and back[1] in labels:
                loop = max(loop, count - labels[back[1]])
    return int(found[1]), int(found[2]), loop


def _run(tool: str, *arguments: str) -> str:
    found = subprocess.run([str(TOOLS / tool), *arguments], capture_output=True, text=True, check=True)
    return found.stdout + found.stderr


def main() -> None:
    """Print a line for each configuration and architecture."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", type=int, nargs="+", default=[80, 90])
    for arch in parser.parse_args().arch:
        for one in configurations():
            print(json.dumps(compile_one(one, arch)), flush=True)


if __name__ == "__main__":
    main()
