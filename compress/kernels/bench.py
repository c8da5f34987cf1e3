"""Check the Triton kernels against float64 on the GPU at hand, and time them beside torch's own.

    python -m compress.kernels.bench [--check] [--ways] [--json OUT]

With `--check` it first compares: a minute. Times are of CUDA graphs that go through copies of the weight larger than
the L2 cache together: medians of replays. Beside ours are cuBLAS in float16, torch's int4 operator for GPUs
(`_weight_int4pack_mm`, in bfloat16) and its semi-structured one (cuSPARSELt); the bandwidths of copying and of reading
are of the same run. With `--ways` it times, in place of these, the ways among which `compress.kernels.multiply`
chooses. OUT is written anew with each result, so that one that is stopped keeps what there was.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import replace
from functools import partial
from itertools import product
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import linear

from compress.errors import CompressError, RunError
from compress.grid import Grid, GridSpec
from compress.kernels.fragments import Fragments
from compress.kernels.gpu import PARTS, Triton, TritonInt4, TritonPortable, TritonSparse24, TritonSparse24Int4
from compress.kernels.pack import PAIRS, Layout, pack_part, unpack_weight
from compress.state import LowRank

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    Way = Callable[[Tensor, Fragments, int], Tensor]

SHAPES = ((4096, 4096), (14336, 4096), (4096, 14336), (28672, 8192))  # (out, in)
ROWS = (1, 4, 8, 16, 32, 48, 64, 96, 128, 192, 256, 512, 1024, 2048, 4096)
CACHE = 192 << 20  # bytes of copies that no L2 cache holds
KERNELS: dict[str, type[Triton]] = {"int4": TritonInt4, "sparse24": TritonSparse24, "sparse24_int4": TritonSparse24Int4}
KINDS = tuple(KERNELS)  # that are timed
KERNELS |= {f"portable_{kind}": TritonPortable for kind in KERNELS}
TOLERANCE = {torch.float16: 2**-9, torch.bfloat16: 2**-6}  # of the largest output


class Case(NamedTuple):
    """A linear to compare, and the rows of x."""

    out: int
    width: int
    group: int = 128
    symmetric: bool = True
    rank: int = 0
    rows: tuple[int, ...] = (1, 17)


CASES = (
    Case(512, 1024, rows=(1, 3, 5, 8, 9, 16, 17, 64, 100, 320, 700)),
    Case(200, 448, group=64, symmetric=False, rank=24, rows=(1, 16, 40, 130, 700)),
    Case(96, 256, group=32),
    Case(72, 200, group=-1, symmetric=False, rank=16, rows=(1, 9, 33)),  # no whole steps
    Case(8, 64, group=32),
    Case(4096, 4096, rows=(16, 48, 128, 640)),  # more programs than multiprocessors
)


def kernel_of(kind: str, case: Case, dtype: torch.dtype, device: str) -> tuple[Triton, Tensor, LowRank | None]:
    """A kernel for random weights, the weight (out, in) that they stand for, and the branch."""
    random = torch.Generator(device).manual_seed(case.out + case.width)
    made_by, kind = KERNELS[kind], kind.removeprefix("portable_")
    out, width = case.out, case.width
    options: dict[str, Any] = {"generator": random, "device": device}
    mask = None
    if kind != "int4":
        pairs = torch.zeros(len(PAIRS), 4, dtype=torch.bool, device=device)
        for number, pair in enumerate(PAIRS):
            pairs[number, list(pair)] = True
        mask = pairs[torch.randint(len(PAIRS), (out, width // 4), **options)].view(out, width)
    branch = None
    if case.rank:
        branch = LowRank(torch.randn(out, case.rank, **options), torch.randn(case.rank, width, **options) / 16)
    if kind == "sparse24":
        assert mask is not None
        layout = Layout(out, width, dtype, None, True, case.rank)
        made: Tensor | Grid = torch.randn(out, width, **options).to(dtype) * mask
    else:
        spec = GridSpec(4, case.group, case.symmetric)
        scale = (torch.rand(out, spec.groups(width), **options) * 0.02 + 0.01).to(dtype)
        zero = torch.randint(1, 15, scale.shape, dtype=torch.uint8, **options)
        codes = torch.randint(0, 16, (out, width), dtype=torch.uint8, **options)
        made = Grid(spec, scale, torch.full_like(zero, 8) if case.symmetric else zero, codes)
        made = made if mask is None else made.zeroed(~mask)
        layout = Layout(out, width, dtype, spec, mask is not None, case.rank)
    parts = {suffix: pack_part(layout, suffix, made, mask, branch).to(device) for suffix in layout.tensors()}
    return made_by(layout, parts, dtype), unpack_weight(layout, parts), branch


def check(kind: str, dtype: torch.dtype, device: str = "cuda", cases: tuple[Case, ...] = CASES) -> list[dict[str, Any]]:
    """The largest error of each case in units of the largest output.

    Raises:
        RunError: it is above 2⁻⁹ (2⁻⁶ in bfloat16), or the same input gives other bits, also from a CUDA graph.
    """
    found = []
    for case in cases:
        kernel, weight, branch = kernel_of(kind, case, dtype, device)
        for rows in case.rows:
            x = torch.randn(rows, case.width, generator=torch.Generator().manual_seed(rows)).to(device, dtype)
            exact = x.double() @ weight.double().T
            if branch is not None:
                down, up = (part.to(dtype).double() for part in (branch.down, branch.up))
                exact += (x.double() @ down.T).to(dtype).double() @ up.T
            y = kernel(x)
            error = float((y.double() - exact).abs().max() / exact.abs().max())
            line = {"kernel": kernel.name, "dtype": str(dtype).removeprefix("torch."), **case._asdict(), "rows": rows}
            found.append(line | {"error": error})
            fix = "report it with the name of the GPU"
            if not error <= TOLERANCE[dtype]:
                raise RunError(f"{found[-1]} is above {TOLERANCE[dtype]:g}", fix=fix)
            repeats = replayed(partial(kernel, x)) if device == "cuda" else [kernel(x)]
            if not all(torch.equal(y, again) for again in repeats):
                raise RunError(f"{line}: the same product has other bits", fix=fix)
    return found


def replayed(call: Callable[[], Tensor], times: int = 8) -> Iterator[Tensor]:
    """What a call gives in a CUDA graph, so many times."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = call()
    for _ in range(times):
        found.fill_(float("nan"))
        graph.replay()
        torch.cuda.synchronize()
        yield found


def check_all() -> Iterator[dict[str, Any]]:
    """`check` of all kernels, each in a process of its own: most of the time is compiling."""
    with ProcessPoolExecutor(16, multiprocessing.get_context("spawn")) as pool:
        for done in as_completed([pool.submit(check, kind, dtype) for kind, dtype in product(KERNELS, TOLERANCE)]):
            yield from done.result()


def seconds(calls: list[Callable[[], Tensor]]) -> float:
    """The time of one of these calls, from a CUDA graph of all: the median of ten replays."""
    for call in calls[:2]:
        call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    times = []
    for _ in range(10):
        began, ended = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        began.record()
        graph.replay()
        ended.record()
        ended.synchronize()
        times.append(began.elapsed_time(ended) / 1000 / len(calls))
    return float(median(times))


def bandwidth() -> dict[str, float]:
    """Bytes a second of copying, read and written, and of reading."""
    one, other = (torch.ones(1 << 28, device="cuda") for _ in range(2))
    size = 4 * one.numel()
    return {"copy": 2 * size / seconds([lambda: other.copy_(one)]), "read": size / seconds([lambda: one.sum()])}


def repeated(kernel: Triton, times: int) -> Triton:
    """A kernel of so many times as many rows, elsewhere in memory."""
    other = object.__new__(type(kernel))
    torch.nn.Module.__init__(other)
    other.layout = replace(kernel.layout, out_features=times * kernel.layout.out_features)
    other.dtype, other.device, other.group, other.step = kernel.dtype, kernel.device, kernel.group, kernel.step
    other.hold("low_rank_down", None)
    other.hold("low_rank_up", None)
    for name in PARTS:
        held = kernel._buffers[name]
        tiles = 1 if name in ("scale", "offset") else 0
        other.hold(name, None if held is None else torch.cat([held] * times, tiles))
    return other


def dense_calls(out: int, width: int) -> Iterator[tuple[str, torch.dtype, list[Callable[[Tensor], Tensor]]]]:
    """What torch has: name, dtype of x, and calls with copies of the weight."""
    count = max(2, -(-CACHE // (2 * out * width)))
    weights = [torch.randn(out, width, dtype=torch.float16, device="cuda") for _ in range(count)]
    yield "cublas", torch.float16, [partial(linear, weight=weight) for weight in weights]
    try:
        half = torch.tensor([True, True, False, False], device="cuda").repeat(width // 4)
        pruned = [torch.sparse.to_sparse_semi_structured(weight * half) for weight in weights]
        yield "cusparselt", torch.float16, [partial(linear, weight=weight) for weight in pruned]
    except (RuntimeError, NotImplementedError) as error:
        print(f"cusparselt: {error}")
    del weights
    count = max(2, -(-CACHE // (out * width // 2)))
    bytewise = [torch.randint(0, 256, (out, width // 2), device="cuda", dtype=torch.uint8) for _ in range(count)]
    packed = [torch.ops.aten._convert_weight_to_int4pack(one, 8) for one in bytewise]
    scales = torch.rand(width // 128, out, 2, device="cuda").bfloat16()
    multiply = torch.ops.aten._weight_int4pack_mm
    calls: list[Callable[[Tensor], Tensor]] = [
        partial(multiply, mat2=one, qGroupSize=128, qScaleAndZeros=scales) for one in packed
    ]
    yield "tinygemm", torch.bfloat16, calls


def compile_for(shape: tuple[int, int], kind: str) -> None:
    """Multiply all rows once: Triton keeps what it compiled."""
    out, width = shape
    kernel = repeated(kernel_of(kind, Case(out // 16, width), torch.float16, "cuda")[0], 16)
    for rows in ROWS:
        kernel(torch.zeros(rows, width, dtype=torch.float16, device="cuda"))
    torch.cuda.synchronize()


def times() -> Iterator[dict[str, Any]]:
    """Microseconds by shape, kernel and rows; of ours also the bytes of W a second and the speed-up over cuBLAS."""
    with ProcessPoolExecutor(12, multiprocessing.get_context("spawn")) as pool:
        for done in [pool.submit(compile_for, shape, kind) for shape, kind in product(SHAPES, KINDS)]:
            done.result()
    for out, width in SHAPES:
        cublas: dict[int, float] = {}
        for name, dtype, calls in dense_calls(out, width):
            for rows in ROWS if name == "cublas" else (1, 16, 64, 256, 2048):
                if name == "tinygemm" and rows > 256:
                    continue  # it is slower than all others by far
                x = torch.randn(rows, width, dtype=dtype, device="cuda")
                took = seconds([partial(call, x) for call in calls])
                cublas |= {rows: took} if name == "cublas" else {}
                yield {"shape": [out, width], "kernel": name, "rows": rows, "microseconds": took * 1e6}
        for kind in KINDS:
            made = kernel_of(kind, Case(out // 16, width), torch.float16, "cuda")[0]
            size = 16 * sum(held.numel() * held.element_size() for held in made.buffers())
            kernels = [repeated(made, 16) for _ in range(max(2, -(-CACHE // size)))]
            for rows in ROWS:
                x = torch.randn(rows, width, dtype=torch.float16, device="cuda")
                took = seconds([partial(one, x) for one in kernels[: None if rows <= 64 else 4]])
                line = {"shape": [out, width], "kernel": made.name, "kind": kind, "rows": rows}
                line |= {"microseconds": took * 1e6}
                yield line | {"over_cublas": cublas[rows] / took, "bytes_per_second": size / took}


def ways(
    rows: int, w: Fragments, processors: int, *, hopper: bool
) -> dict[str, Callable[[Tensor, Fragments, int], Tensor]]:
    """By name, what may multiply so many rows with a weight, and what is chosen."""
    from compress.kernels import multiply

    found: dict[str, Way] = {"chosen": partial(multiply.multiply, processors=processors, hopper=hopper)}
    if rows <= 512:
        tile = multiply.tile_for(rows, w, processors)
        found["packed"] = partial(multiply.launch, tile, dependent=hopper)
        found["packed, each after the other"] = partial(multiply.launch, tile)
    if rows > 32:
        found["decoded"] = partial(multiply.decoded, dependent=hopper)
    if hopper and 32 < rows <= 1024 and w.positions is None and w.group >= 64:
        for wide in {multiply.LARGE_TILE, *multiply.WIDE_TILES.values()}:
            found[f"wide {tuple(wide)}"] = partial(multiply.launch_wide, wide, dependent=True)
    return found


def times_of_ways() -> Iterator[dict[str, Any]]:
    """Microseconds by shape, kind, rows and way, and how many times as fast as cuBLAS with a dense weight."""
    device = torch.cuda.get_device_properties(torch.cuda.current_device())
    hopper, processors = device.major == 9, device.multi_processor_count
    for out, width in (SHAPES[3], SHAPES[0], SHAPES[1], SHAPES[2]):
        cublas: dict[int, float] = {}
        dense = [torch.randn(out, width, dtype=torch.float16, device="cuda") for _ in range(2)]
        dense *= max(1, -(-CACHE // (4 * out * width)))
        for kind in KINDS:
            made = kernel_of(kind, Case(out // 16, width), torch.float16, "cuda")[0]
            size = 16 * sum(held.numel() * held.element_size() for held in made.buffers())
            kernels = [repeated(made, 16) for _ in range(max(2, -(-CACHE // size)))]
            weights = [fragments_of(kernel) for kernel in kernels]
            for rows in ROWS:
                x = torch.randn(rows, width, dtype=torch.float16, device="cuda")
                if rows not in cublas:
                    cublas[rows] = seconds([partial(linear, x, weight) for weight in dense])
                for name, way in ways(rows, weights[0], processors, hopper=hopper).items():
                    took = seconds([partial(way, x, weight, out) for weight in weights[: None if rows <= 64 else 4]])
                    line = {"shape": [out, width], "kind": kind, "rows": rows, "way": name}
                    yield line | {"microseconds": took * 1e6, "over_cublas": cublas[rows] / took}


def fragments_of(kernel: Triton) -> Fragments:
    """The weight of a kernel, as `compress.kernels.multiply` takes it."""
    words, positions, scale, offset = (kernel._buffers[name] for name in PARTS)
    assert words is not None
    return Fragments(words, positions, scale, offset, kernel.group, kernel.step)


def collect(result: dict[str, Any], name: str, lines: Iterator[dict[str, Any]], path: Path | None) -> None:
    """Print lines and put them into the result, which is written with each."""
    result[name] = []
    for line in lines:
        result[name].append(line)
        print(json.dumps(line), flush=True)
        if path:
            part = path.with_suffix(".part")
            part.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
            part.replace(path)


def main() -> None:
    """Check, then time."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--ways", action="store_true")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("torch finds no GPU; python -m compress.kernels.aot compiles the kernels without one")
    import triton

    result: dict[str, Any] = {"device": torch.cuda.get_device_name()}
    result |= {"torch": torch.__version__, "triton": triton.__version__}
    if arguments.check:
        try:
            collect(result, "check", check_all(), arguments.json)
        except CompressError as error:
            raise SystemExit(f"error: {error}") from None
        print(f"{len(result['check'])} products agree with float64", flush=True)
    if arguments.ways:
        collect(result, "ways", times_of_ways(), arguments.json)
    else:
        result["bandwidth"] = bandwidth()
        collect(result, "times", times(), arguments.json)


if __name__ == "__main__":
    main()
