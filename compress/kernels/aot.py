"""Compile the Triton kernels without a GPU, and read what the compiler made of them.

    python -m compress.kernels.aot [--arch 80 90] [--all]

prints a line of JSON for every configuration: registers, bytes of stack (spills), shared memory, the instructions of
the main loop per weight of W, and whether each PTX instruction got one value for each thread
(`compress.kernels.instructions` says why it must). Without `--all` these are the tiles that the shapes of
`compress.kernels.bench` get for few rows, with it all that may run. The disassembler comes with Triton.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import tempfile
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from compress.kernels.fragments import Fragments, rows_for
from compress.kernels.multiply import FUSED, WIDE_TILES, Tile, WideTile, constants, cut, tile_for, wide_constants
from compress.kernels.product import product_kernel, weight_kernel
from compress.kernels.wide import wide_kernel

if TYPE_CHECKING:
    from collections.abc import Iterator

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
KINDS = ("int4", "sparse24", "sparse24_int4")
HALVES = {"fp16": torch.float16, "bf16": torch.bfloat16}
PROCESSORS = (40, 84, 108, 132)  # multiprocessors of GPUs, an L4's to an H100's


class Configuration(NamedTuple):
    """One specialization of `product_kernel` or, by its tile, of `wide_kernel`; with no tile, of `weight_kernel`."""

    kind: str
    half: str
    tile: Tile | WideTile | None
    group: int = 128
    offsets: bool = False
    branch: bool = False
    even: bool = True


def fragments(kind: str, out: int, width: int, group: int = 128, *, offsets: bool = False) -> Fragments:
    """A weight without data."""
    sparse, codes = kind != "int4", kind != "sparse24"
    columns = (32 if codes else 8) if sparse else 16  # of a lane's word
    step = 128 if sparse else max(group, 64)
    words = torch.empty(-(-out // 16), -(-width // step) * step // columns, 32, dtype=torch.int32, device="meta")
    return Fragments(
        words, words if sparse else None, words if codes else None, words if codes and offsets else None, group, step
    )


def usual_tiles(kind: str) -> set[Tile]:
    """Those of an H100 for up to 16 rows and the smallest and largest shape that are measured; one for more rows."""
    cases = product((1, 16), ((4096, 4096), (28672, 8192)))
    found = {tile_for(rows, fragments(kind, *shape), shape[1], 132) for rows, shape in cases}
    return found | {tile_for(32, fragments(kind, 4096, 4096), 4096, 132)}


def all_tiles(kind: str) -> set[Tile]:
    """Those of any shape."""
    some = product(
        (1, 5, 9, 17, 33, 65, 129, 257),
        [16 * tiles for tiles in (1, 2, 3, 5, 8, 16, 40, 90, 200, 400, 700, 1100, 2500, 5000, 9000)],
        (64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384),
        PROCESSORS,
    )
    return {
        tile_for(rows, fragments(kind, out, width), width - ragged, processors)
        for rows, out, width, processors in some
        for ragged in (0, 8)
        if rows <= rows_for(sparse=kind != "int4")
    }


def configurations(arch: int, *, everything: bool) -> Iterator[Configuration]:
    """The tiles with float16 and groups of 128; on one or, of everything, on all with the most that there may be."""
    for kind in KINDS:
        tiles = sorted((all_tiles if everything else usual_tiles)(kind))
        codes = kind != "sparse24"
        for tile in tiles:
            yield Configuration(kind, "fp16", tile)
        for tile in tiles if everything else tiles[:1]:
            least = 32 if codes else 128
            yield Configuration(kind, "bf16", tile, least, offsets=codes, branch=True, even=tile.along == 1)
        if not everything:
            yield Configuration(kind, "bf16", tiles[0])
            yield Configuration(kind, "fp16", tiles[0], 64 if codes else 128, offsets=codes, even=False)
        yield Configuration(kind, "bf16", None, offsets=codes)
    if arch == 90:
        for wide, half in product(WIDE_TILES.values(), HALVES):
            yield Configuration("int4", half, wide)
            yield Configuration("int4", half, wide, 64, offsets=True)


def compile_one(one: Configuration, arch: int) -> dict[str, Any]:
    """Compile a configuration for sm_`arch`, and measure its machine code."""
    weight = fragments(one.kind, 4096, 4096, one.group, offsets=one.offsets)
    fixed: dict[str, int | bool] = dict(constants(HALVES[one.half], weight))
    kernel, warps, stages = weight_kernel, 1, 1
    if isinstance(one.tile, WideTile):
        kernel, warps, stages = wide_kernel, one.tile.warps, one.tile.stages
        fixed = wide_constants(one.tile, HALVES[one.half], weight)
    elif one.tile is not None:
        kernel, warps = product_kernel, one.tile.across * one.tile.along
        fixed |= cut(one.tile, weight, branch=one.branch) | {"EVEN": one.even}
    names = list(kernel.arg_names)
    pointers = dict.fromkeys(("x", "dx", "y", "w"), f"*{one.half}")
    pointers |= dict.fromkeys(("words", "positions", "scale", "offset", "up"), "*i32")
    made = triton.compile(
        ASTSource(
            kernel,
            {name: "constexpr" if name in fixed else pointers.get(name, "i32") for name in names},
            {(names.index(name),): value for name, value in fixed.items()},
            {(number,): [["tt.divisibility", 16]] for number, name in enumerate(names) if name in pointers},
        ),
        target=GPUTarget("cuda", arch, 32),
        options={"num_warps": warps, "num_stages": stages} | FUSED,
    )
    registers, stack, loop = read_machine_code(made.asm["cubin"])
    found = {"arch": arch, **one._asdict(), "tile": one.tile and one.tile._asdict()}
    found |= {"registers": registers, "stack_bytes": stack, "shared_bytes": made.metadata.shared}
    if isinstance(one.tile, WideTile):  # which asks no layout, but must not put W into shared memory
        found["instructions_per_weight"] = loop / (64 * one.tile.outputs / (32 * warps))
        return found | {"from_registers": bool(re.search(r"wgmma\.mma_async[^;]*\},\s*\{[^}]*\},", made.asm["ptx"]))}
    if one.tile is not None:
        found["instructions_per_weight"] = loop / (weight.step * 16 * one.tile.tiles / 32)  # of a lane, in a step
    return found | {"one_value_a_thread": layouts(made.asm["ttgir"]) == {f"[1] [32] [{warps}] [0]"}}


def layouts(text: str) -> set[str]:
    """Values and lanes of a thread, warps and order, of every tensor that a PTX instruction has or gives."""
    known = {}
    pattern = (
        r"^(#\w+) = #ttg\.blocked<\{sizePerThread = (.*), threadsPerWarp = (.*), warpsPerCTA = (.*), order = (.*)\}>"
    )
    for name, *parts in re.findall(pattern, text, re.MULTILINE):
        known[name] = " ".join(parts)
    lines = [line.partition("loc(")[0] for line in text.splitlines() if "elementwise_inline_asm" in line]
    # without PTX, as in decoding 2:4 without codes, nothing is asked
    warps = re.search(r'"ttg.num-warps" = (\d+)', text)
    assert warps is not None
    if not lines:
        return {f"[1] [32] [{warps[1]}] [0]"}
    return {known.get(name, name) for line in lines for name in re.findall(r"tensor<[^>]*?, (#[\w.<{]+)", line)}


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
    parser.add_argument("--all", action="store_true")
    arguments = parser.parse_args()
    for arch in arguments.arch:
        for one in configurations(arch, everything=arguments.all):
            print(json.dumps(compile_one(one, arch)), flush=True)


if __name__ == "__main__":
    main()
