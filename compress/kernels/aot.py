"""Compile the Triton kernels without a GPU, and read what the compiler made of them.

    python -m compress.kernels.aot [--arch 80 90] [--all] [--processes N] [--json OUT]

prints a line of JSON for every configuration: registers, bytes of stack (spills), shared memory, the instructions of
the main loop per weight of W, and whether each PTX instruction got one value for each thread
(`compress.kernels.instructions` says why it must). Without `--all` these are a few; with it every tile that may run,
each as plain as it may be in both dtypes, and in bfloat16 with all that there may be besides: groups of 32, offsets, a
branch, columns that warps share unevenly.

With `--json` the lines are also kept in a file, by the version of Triton; what is there from the same source is not
compiled again, so that a run that was stopped goes on. The disassembler comes with Triton.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import re
import subprocess
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor, as_completed
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from compress.kernels import multiply_portable, multiply_prompt
from compress.kernels.fragments import PACKED_ROWS, Fragments
from compress.kernels.multiply import (
    LARGE_TILE,
    WIDE_TILES,
    Tile,
    WideTile,
    constants,
    cut,
    register_options,
    tile_for,
    wide_constants,
)  # fmt: skip
from compress.kernels.operands import FUSED
from compress.kernels.portable import portable_kernel, portable_weight_kernel
from compress.kernels.product import product_kernel, weight_kernel
from compress.kernels.prompt import prompt_kernel
from compress.kernels.wide import wide_kernel

if TYPE_CHECKING:
    from collections.abc import Iterator

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
KINDS = ("int4", "sparse24", "sparse24_int4")
HALVES = {"fp16": torch.float16, "bf16": torch.bfloat16}
FROM_REGISTERS = r"wgmma\.mma_async[^;]*\},\s*\{[^}]*\},"  # a warp-group product whose first operand is there
PROCESSORS = (40, 84, 108, 132)  # multiprocessors of GPUs, an L4's to an H100's


class Configuration(NamedTuple):
    """One specialization of a kernel: "product", "weight", "prompt", "wide", "portable" or "portable_weight"."""

    kernel: str
    kind: str
    half: str
    tile: Tile | WideTile | multiply_portable.Tile | multiply_prompt.Tile | None = None
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


def all_tiles(kind: str) -> set[Tile]:
    """Those of any shape."""
    some = product(
        (1, 3, 5, 9, 17, 33, 65, 97, 129, 161),
        [16 * tiles for tiles in (1, 2, 3, 5, 8, 16, 40, 90, 200, 400, 700, 1100, 2500, 5000, 9000)],
        (64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384),
        PROCESSORS,
    )
    return {
        tile_for(rows, fragments(kind, out, width), processors)
        for rows, out, width, processors in some
        if rows <= PACKED_ROWS
    }


def usual(arch: int) -> Iterator[Configuration]:
    """A minute's worth: an H100's tiles for one row of the smallest shape that is measured and 16 of the largest."""
    least = {kind: tile_for(1, fragments(kind, 4096, 4096), 132) for kind in KINDS}
    most = {kind: tile_for(16, fragments(kind, 28672, 8192), 132) for kind in KINDS}
    for kind in KINDS:
        yield Configuration("product", kind, "fp16", least[kind])
        yield Configuration("product", kind, "fp16", most[kind])
        yield Configuration("portable", kind, "fp16", multiply_portable.TILES[1])
    yield Configuration("product", "int4", "bf16", least["int4"])
    yield Configuration("product", "int4", "fp16", most["int4"]._replace(once=True, split=2))
    yield Configuration("product", KINDS[2], "bf16", least[KINDS[2]], 32, offsets=True, branch=True, even=False)
    yield Configuration("weight", "int4", "bf16", offsets=True)
    yield Configuration("portable_weight", KINDS[2], "fp16", offsets=True)
    if arch == 90:
        yield Configuration("wide", "int4", "fp16", WIDE_TILES[65])
        yield Configuration("prompt", "int4", "fp16", multiply_prompt.TILES[-1])
        yield Configuration("prompt", KINDS[2], "bf16", multiply_prompt.TILES[-1], 64, offsets=True)


def every(arch: int) -> Iterator[Configuration]:
    """All tiles, plain and with the most that there may be."""
    for kind in KINDS:
        codes = kind != "sparse24"
        least = 32 if codes else 128
        for tile in sorted(all_tiles(kind)):
            yield Configuration("product", kind, "fp16", tile)
            yield Configuration("product", kind, "bf16", tile)
            yield Configuration("product", kind, "bf16", tile, least, offsets=codes, branch=True, even=False)
        yield Configuration("weight", kind, "bf16", offsets=codes)
        for portable, half in product(multiply_portable.TILES.values(), HALVES):
            yield Configuration("portable", kind, half, portable)
            if codes:
                yield Configuration("portable", kind, half, portable, least, offsets=codes)
        yield Configuration("portable_weight", kind, "fp16", group=least, offsets=codes)
    if arch == 90:
        for wide, half in product({LARGE_TILE, *WIDE_TILES.values()}, HALVES):
            yield Configuration("wide", "int4", half, wide)
            yield Configuration("wide", "int4", half, wide, 64, offsets=True)
        for kind, prompt in product(KINDS, multiply_prompt.TILES):
            yield Configuration("prompt", kind, "fp16", prompt)
            yield Configuration("prompt", kind, "bf16", prompt, 128 if kind == "sparse24" else 64, kind != "sparse24")


class Job(NamedTuple):
    """What the compiler gets: kernel, its constants, its options, and weights of a lane in a turn of the loop."""

    kernel: Any
    fixed: dict[str, Any]
    options: dict[str, Any]
    weights: float


def job_of(one: Configuration, arch: int) -> Job:
    """The kernel of a configuration, as it is launched."""
    weight = fragments(one.kind, 4096, 4096, one.group, offsets=one.offsets)
    fixed: dict[str, Any] = constants(HALVES[one.half], weight) | {"DEPENDENT": arch >= 90}
    tile = one.tile
    if isinstance(tile, Tile):
        fixed |= cut(tile, weight, branch=one.branch) | {"EVEN": one.even}
        if tile.split == 1:
            fixed |= {"partial": None, "counters": None}
        options = {"num_warps": tile.across * tile.along, "num_stages": 1} | FUSED | register_options(tile, weight)
        return Job(product_kernel, fixed, options, weight.step * 16 * tile.tiles / 32)
    if tile is None:
        if one.kernel == "portable_weight":
            fixed = multiply_portable.constants(weight)
            return Job(portable_weight_kernel, fixed, {"num_warps": 1} | FUSED, 0)
        return Job(weight_kernel, fixed, {"num_warps": 1} | FUSED, 0)
    if isinstance(tile, multiply_prompt.Tile):
        fixed = multiply_prompt.cut(tile, HALVES[one.half], weight)
        return Job(prompt_kernel, fixed, {"num_warps": tile.warps, "num_stages": 1} | FUSED, weight.step * 16 / 32)
    options = {"num_warps": tile.warps, "num_stages": tile.stages} | FUSED
    if isinstance(tile, WideTile):
        fixed = wide_constants(tile, HALVES[one.half], weight)
        return Job(wide_kernel, fixed, options, 64 * tile.outputs / (32 * tile.warps))
    fixed = multiply_portable.constants(weight) | multiply_portable.cut(tile)
    return Job(portable_kernel, fixed, options, weight.step * tile.outputs / (32 * tile.warps))


def identity(one: Configuration, arch: int) -> dict[str, Any]:
    """What a configuration is compiled from: its line begins so."""
    kernel, _, options, _ = job_of(one, arch)
    tile = one.tile and one.tile._asdict()
    return {"arch": arch, **one._asdict(), "tile": tile, "options": options, "source": kernel.cache_key[:16]}


def compile_one(one: Configuration, arch: int) -> dict[str, Any]:
    """Compile a configuration for sm_`arch`, and measure its machine code."""
    kernel, fixed, options, weights = job_of(one, arch)
    names = list(kernel.arg_names)
    pointers = dict.fromkeys(("x", "dx", "y", "w"), f"*{one.half}") | {"sums": "*fp32", "partial": "*fp32"}
    pointers |= dict.fromkeys(("words", "positions", "kept", "scale", "offset", "zeros", "up", "counters"), "*i32")
    made = triton.compile(
        ASTSource(
            kernel,
            {name: "constexpr" if name in fixed else pointers.get(name, "i32") for name in names},
            {(names.index(name),): value for name, value in fixed.items()},
            {
                (number,): [["tt.divisibility", 16]]
                for number, name in enumerate(names)
                if name in pointers or (kernel is wide_kernel and name == "N")
            },
        ),
        target=GPUTarget("cuda", arch, 32),
        options=options,
    )
    usage, listing = machine_code(made.asm["cubin"])
    registers, stack, shared, loop = measured(usage, listing)
    found = identity(one, arch)
    found |= {"registers": registers, "stack_bytes": stack, "shared_bytes": made.metadata.shared + shared}
    if weights:
        found["instructions_per_weight"] = loop / weights
    if re.search(FROM_REGISTERS, made.asm["ptx"]):
        found["awaited"] = re.findall(r"wgmma\.wait_group[^;]*(\d+);", made.asm["ptx"])
    if one.kernel == "prompt":
        found["written_early"] = written_early(listing)
    if one.kernel == "wide":  # which asks no layout, but must not put W into shared memory
        found["from_registers"] = "awaited" in found
    elif one.kernel in ("product", "weight"):
        warps = options["num_warps"]
        found["one_value_a_thread"] = layouts(made.asm["ttgir"]) == {f"[1] [32] [{warps}] [0]"}
    return found


def layouts(text: str) -> set[str]:
    """Values and lanes of a thread, warps and order, of every tensor that a PTX instruction has or gives."""
    known = {}
    pattern = (
        r"^(#\w+) = #ttg\.blocked<\{sizePerThread = (.*), threadsPerWarp = (.*), warpsPerCTA = (.*), order = (.*)\}>"
    )
    for name, *parts in re.findall(pattern, text, re.MULTILINE):
        known[name] = " ".join(parts)
    lines = [
        line.partition("loc(")[0]
        for line in text.splitlines()
        if "elementwise_inline_asm" in line and "tensor<" in line
    ]
    # without PTX, as in decoding 2:4 without codes, nothing is asked
    warps = re.search(r'"ttg.num-warps" = (\d+)', text)
    assert warps is not None
    if not lines:
        return {f"[1] [32] [{warps[1]}] [0]"}
    return {known.get(name, name) for line in lines for name in re.findall(r"tensor<[^>]*?, (#[\w.<{]+)", line)}


def machine_code(cubin: bytes) -> tuple[str, str]:
    """What a cubin with one kernel uses, and its instructions, as text."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        return _run("cuobjdump", "-res-usage", file.name), _run("nvdisasm", "-c", file.name)


def instructions(listing: str) -> tuple[list[tuple[str, str]], dict[str, int]]:
    """Names and operands of all instructions, and where labels stand among them."""
    labels: dict[str, int] = {}
    found: list[tuple[str, str]] = []
    for line in listing.splitlines():
        label = re.match(r"^(\.L_x_\d+):", line)
        if label:
            labels[label[1]] = len(found)
        instruction = re.match(r"^\s+/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+ )?\s*([\w.]+)\s*(.*?)\s*;", line)
        if instruction:
            found.append((instruction[1], instruction[2]))
    return found, labels


def measured(usage: str, listing: str) -> tuple[int, int, int, int]:
    """Registers, bytes of stack and of shared memory, and instructions of the longest loop."""
    found = re.search(r"REG:(\d+) STACK:(\d+) SHARED:(\d+)", usage)
    assert found is not None
    loops = [place + 1 - start for start, place in loops_of(*instructions(listing))]
    return int(found[1]), int(found[2]), int(found[3]), max(loops, default=0)


def loops_of(found: list[tuple[str, str]], labels: dict[str, int]) -> Iterator[tuple[int, int]]:
    """First and last instruction of each loop."""
    for place, (name, operands) in enumerate(found):
        back = re.search(r"`\((\.L_x_\d+)\)", operands)
        if name == "BRA" and back and labels.get(back[1], place + 1) <= place:
            yield labels[back[1]], place


def written_early(listing: str) -> list[str]:
    """Instructions that write to registers that a warp-group product on its way still reads, or adds to.

    The compiler does not say that it knows these registers to be in use, so the machine code is asked: from a product
    to the wait for it, also over the end of a loop.
    """
    found, labels = instructions(listing)
    order = list(range(len(found)))
    for start, place in loops_of(found, labels):
        after = order.index(place) + 1
        order[after:after] = range(start, place + 1)
    busy: set[int] = set()
    early = []
    for place in order:
        name, operands = found[place]
        registers = [int(number) for number in re.findall(r"\bR(\d+)\b", operands)]
        if name.startswith("HGMMA"):
            width = re.search(r"64x(\d+)x", name)
            assert width is not None
            busy |= {*range(registers[0], registers[0] + int(width[1]) // 2), *range(registers[1], registers[1] + 4)}
        elif name.startswith("WARPGROUP.DEPBAR"):
            busy = set()
        elif operands.startswith("R") and registers and not name.startswith(("ST", "LDGSTS")):
            size = 4 if ".128" in name else 2 if ".64" in name or "WIDE" in name else 1
            if busy & set(range(registers[0], registers[0] + size)):
                early.append(f"{name} {operands}")
    return list(dict.fromkeys(early))


def _run(tool: str, *arguments: str) -> str:
    found = subprocess.run([str(TOOLS / tool), *arguments], capture_output=True, text=True, check=True)
    return found.stdout + found.stderr


class Kept:
    """Lines in a file, by the version of Triton: the file is written anew with each line."""

    def __init__(self, path: Path | None) -> None:
        """Read what is there."""
        self.path = path
        self.all: dict[str, list[dict[str, Any]]] = {}
        if path is not None and path.exists():
            self.all = json.loads(path.read_text(encoding="utf-8"))
        self.lines = self.all.setdefault(triton.__version__, [])

    def find(self, known: dict[str, Any]) -> dict[str, Any] | None:
        """The line that begins so."""
        known = json.loads(json.dumps(known))
        return next((line for line in self.lines if known.items() <= line.items()), None)

    def keep(self, lines: list[dict[str, Any]]) -> None:
        """Put these lines in place of all of this version."""
        self.lines[:] = lines
        if self.path is None:
            return
        rows = [
            f"{json.dumps(version)}: [\n" + ",\n".join(map(json.dumps, found)) + "\n]"
            for version, found in sorted(self.all.items())
        ]
        part = self.path.with_suffix(".part")
        part.write_text("{\n" + ",\n".join(rows) + "\n}\n", encoding="utf-8")
        part.replace(self.path)


def compile_all(jobs: list[tuple[Configuration, int]], path: Path | None, processes: int) -> None:
    """Print a line for each, in the order in which they are done; progress goes to stderr."""
    kept = Kept(path)
    lines = {number: kept.find(identity(*job)) for number, job in enumerate(jobs)}
    missing = [number for number, line in lines.items() if line is None]
    for line in filter(None, lines.values()):
        print(json.dumps(line), flush=True)
    with ProcessPoolExecutor(processes, multiprocessing.get_context("spawn")) as pool:
        futures = {pool.submit(compile_one, *jobs[number]): number for number in missing}
        for done, future in enumerate(as_completed(futures), len(jobs) - len(missing) + 1):
            line = lines[futures[future]] = future.result()
            kept.keep([one for one in lines.values() if one is not None])
            print(json.dumps(line), flush=True)
            print(f"{done} of {len(jobs)} compiled", file=sys.stderr, flush=True)


def main() -> None:
    """Print a line for each configuration and architecture."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", type=int, nargs="+", default=[80, 90])
    parser.add_argument("--all", action="store_true")
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    jobs = [(one, arch) for arch in arguments.arch for one in (every if arguments.all else usual)(arch)]
    compile_all(jobs, arguments.json, arguments.processes)


if __name__ == "__main__":
    main()
