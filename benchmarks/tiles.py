"""Time tiles of the kernels on the GPU at hand that are not chosen (yet), beside what is.

    python benchmarks/tiles.py [--kinds int4 sparse24_int4 sparse24] [--rows 1 8 16 64 ...] [--seconds 300] [--json OUT]

Up to 32 rows these are other tiles of `compress.kernels.product`, of more `compress.kernels.prompt` (on Hopper). Each
is first compared with what is chosen, three times. Times are those of `python -m compress.kernels.bench`: CUDA graphs
through copies of the weight that exceed the L2 cache together, in float16, groups of 128. A line of JSON for each
shape, kind and number of rows has the microseconds of cuBLAS, of what is chosen and of the best tiles, and of reading
W at 70 % of 4.3 TB/s; the file has all.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import time
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch.nn.functional import linear

from compress.kernels import bench, multiply, multiply_prompt
from compress.kernels.aot import fragments
from compress.kernels.multiply import Tile

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from torch import Tensor

    from compress.kernels.fragments import Fragments

ROOM = 48 << 10  # bytes of shared memory that a kernel may have without asking
STEP = {"int4": 1152, "sparse24_int4": 896, "sparse24": 2304}  # bytes of a tile and 128 columns
FEW = 32  # rows of x, for which there are other tiles
Any_tile = Tile | multiply_prompt.Tile
Job = tuple[str, tuple[int, int], int, Any_tile]


def candidates(kind: str, shape: tuple[int, int], rows: int, processors: int) -> list[Any_tile]:
    """Those whose programs fill the multiprocessors evenly, with 3 to 36 warps on each; all for many rows."""
    if rows > FEW:
        return list(multiply_prompt.TILES)
    tiles, steps = shape[0] // 16, shape[1] // 128
    chosen = multiply.tile_for(rows, fragments(kind, *shape), processors)
    found = {chosen: None, chosen._replace(once=True): None, chosen._replace(once=True, early=chosen.arranged): None}
    cuts = product(range(1, 9), (1, 2, 4), (2, 4, 8, 16), (1, 2, 4), (0, 1, 3, 7), {1, -(-rows // 8)})
    for size, across, along, split, ahead, eights in cuts:
        programs, mine = -(-tiles // (size * across)) * split, size * across
        even = tiles * split / (-(-programs // processors) * processors * mine)
        warps = across * along * programs / processors
        if (even < 0.9 and size > 2) or not 3 <= warps <= (36 if size == 1 else 24) or 2 * along * split > steps:
            continue
        if across > 1 and (rows < 8 or even < 0.9 or mine > 8 or across * along > 16):
            continue  # they share x
        if split > 1 and (
            rows < 8 or tiles > 4 * processors or mine not in (4, 8) or size not in (2, 4) or ahead not in (1, 3)
        ):
            continue  # so do these, where W has few rows
        if (size > 4 and along > 8) or (size > 2 and kind == "sparse24") or (size > 3 and across * along > 8):
            continue  # they spill
        if size > 6 and eights > 1 and kind == "sparse24_int4":
            continue  # and so do these
        if ahead > 1 and (size > 4 or along * (ahead + 1) > min(1.5 * steps, ROOM / (mine * STEP[kind]))):
            continue
        if (ahead == 0 and size * eights < 8) or (eights * 8 < rows and size > 2) or eights > 2:
            continue
        some = {True} if split > 1 or (size > 1 and eights > 1) else {False, True} if kind == "int4" else {rows > 2}
        for arranged in some | ({True} if kind != "int4" or size > 1 or eights > 1 else set()):
            tile = Tile(eights, size, across, along, arranged, False, ahead, True, arranged, split)
            found[tile] = None
            if size > 4 and ahead == 1 and eights > 1:
                found[tile._replace(scaled=True)] = None
    return list(found)


def launch(tile: Any_tile, x: Tensor, weight: Fragments, out: int) -> Tensor:
    """The product by this tile."""
    by = multiply.launch if isinstance(tile, Tile) else multiply_prompt.launch
    return by(tile, x, weight, out, dependent=True)


def compile_one(job: Job) -> str | None:
    """Multiply once, so that Triton keeps what it compiled; what is wrong with it."""
    kind, (out, width), rows, tile = job
    made = bench.kernel_of(kind, bench.Case(out // 16, width), torch.float16, "cuda")[0]
    weight = bench.fragments_of(bench.repeated(made, 16))
    try:
        launch(tile, torch.zeros(rows, width, dtype=torch.float16, device="cuda"), weight, out)
        torch.cuda.synchronize()
    except Exception as error:
        return f"{tile}: {error!r}"[:300]
    return None


def measure(
    kind: str, shape: tuple[int, int], rows: int, tiles: list[Any_tile], processors: int, until: float
) -> dict[str, object]:
    """Microseconds of cuBLAS, of what is chosen, and of each tile, as long as there is time."""
    out, width = shape
    dense = [torch.randn(*shape, dtype=torch.float16, device="cuda") for _ in range(2)]
    dense *= max(1, -(-bench.CACHE // (4 * out * width)))
    made = bench.kernel_of(kind, bench.Case(out // 16, width), torch.float16, "cuda")[0]
    size = 16 * sum(held.numel() * held.element_size() for held in made.buffers())
    weights = [bench.fragments_of(bench.repeated(made, 16)) for _ in range(max(2, -(-bench.CACHE // size)))]
    some = None if rows <= 64 else 4
    x = torch.randn(rows, width, dtype=torch.float16, device="cuda")
    found = {"shape": shape, "kind": kind, "rows": rows, "roofline70": round(size / 4.3e6 / 0.7, 2)}
    found["cublas"] = microseconds([partial(linear, x, weight) for weight in dense[:some]])
    chosen = partial(multiply.multiply, processors=processors, hopper=True)
    found["chosen"] = microseconds([partial(chosen, x, weight, out) for weight in weights[:some]])
    wanted, times = chosen(x, weights[0], out).double(), {}
    for tile in tiles:
        if time.monotonic() > until:
            break
        repeats = [launch(tile, x, weights[0], out) for _ in range(3)]
        error = float((repeats[0].double() - wanted).abs().max() / wanted.abs().max())
        same = all(torch.equal(repeats[0], other) for other in repeats)
        took = microseconds([partial(launch, tile, x, weight, out) for weight in weights[:some]])
        name = " ".join(str(int(part)) for part in tile)
        right = same and error <= bench.TOLERANCE[torch.float16]
        times[name] = took if right else f"wrong by {error:.2g}" + ("" if same else ", and not always the same")
    return found | {"tiles": times}


def microseconds(calls: list[Callable[[], Tensor]]) -> float:
    """Of one of these calls."""
    return round(1e6 * bench.seconds(calls), 2)


def lines(arguments: argparse.Namespace) -> Iterator[dict[str, object]]:
    """Compile all, then time."""
    began, processors = time.monotonic(), torch.cuda.get_device_properties(0).multi_processor_count
    places = list(product(bench.SHAPES, arguments.kinds, arguments.rows))
    jobs = {(kind, shape, rows): candidates(kind, shape, rows, processors) for shape, kind, rows in places}
    unique = {}
    for (kind, shape, rows), tiles in jobs.items():
        for tile in tiles:
            even = shape[1] // 128 % (tile.along * tile.split) == 0
            unique.setdefault((kind, tile, even), (kind, shape, rows, tile))
    with ProcessPoolExecutor(14, multiprocessing.get_context("spawn")) as pool:
        wrong = [one for one in pool.map(compile_one, unique.values()) if one]
    print(json.dumps({"compiled": len(unique), "seconds": time.monotonic() - began, "wrong": wrong[:9]}), flush=True)
    for shape, kind, rows in places:
        yield measure(kind, shape, rows, jobs[kind, shape, rows], processors, began + arguments.seconds)


def main() -> None:
    """Print a line for each shape, kind and number of rows: the best eight tiles."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kinds", nargs="+", default=list(bench.KINDS), choices=bench.KINDS)
    parser.add_argument("--rows", nargs="+", type=int, default=[1, 8, 16, 64, 128, 256, 512, 2048])
    parser.add_argument("--seconds", type=float, default=300)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    found = []
    for line in lines(arguments):
        found.append(line)
        times = line["tiles"]
        best = sorted((took, name) for name, took in times.items() if not isinstance(took, str))[:8]
        bad = {name: took for name, took in times.items() if isinstance(took, str)}
        print(json.dumps(line | {"tiles": best, "wrong": bad}), flush=True)
        if arguments.json:
            arguments.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
