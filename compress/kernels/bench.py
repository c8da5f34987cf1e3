"""Check the Triton kernels against float64 and time them on the GPU at hand.

    python -m compress.kernels.bench [--check] [--json OUT]

Times are of CUDA graphs that go through copies of the weight larger than the L2 cache together, beside the same product
in float16 by cuBLAS. `--check` only compares; where TRITON_INTERPRET=1 is set it does so without a GPU, on small shapes.
"""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path
from typing import Any

import torch

from compress.errors import CompressError, RunError
from compress.grid import Grid, GridSpec
from compress.kernels.gpu import TritonInt4
from compress.kernels.pack import Layout, pack_part, unpack_weight

SHAPES = ((4096, 4096), (14336, 4096), (28672, 8192))  # (out, in)
ROWS = (1, 4, 16, 64, 256, 2048)
CACHE = 256 << 20  # bytes of copies that no L2 cache holds


def kernel_of(out: int, width: int, dtype: torch.dtype, device: str) -> tuple[TritonInt4, torch.Tensor]:
    """A kernel for random codes in groups of 128, and the weight (out, in) that they stand for."""
    spec = GridSpec(4, 128 if width % 128 == 0 else 32)
    generator = torch.Generator().manual_seed(out + width)
    scale = (torch.rand(out, spec.groups(width), generator=generator) * 0.02 + 0.01).to(dtype)
    codes = torch.randint(0, 16, (out, width), generator=generator, dtype=torch.uint8)
    grid = Grid(spec, scale, torch.full(scale.shape, 8, dtype=torch.uint8), codes)
    layout = Layout(out, width, dtype, spec)
    parts = {suffix: pack_part(layout, suffix, grid, None, None) for suffix in layout.tensors()}
    return TritonInt4(layout, parts, dtype).to(device), unpack_weight(layout, parts)


def check(device: str) -> list[dict[str, Any]]:
    """The largest error of each case in units of the largest output. Raises RunError above 2⁻⁹ (2⁻⁶ in bfloat16)."""
    small = device == "cpu"
    found = []
    for dtype, tolerance in ((torch.float16, 2**-9), (torch.bfloat16, 2**-6)):
        if small and dtype is torch.bfloat16:
            continue  # the interpreter's arithmetic in it is wrong
        for out, width in ((128, 256), (200, 96)) if small else ((512, 1024), *SHAPES):
            kernel, weight = kernel_of(out, width, dtype, "cpu")
            kernel.device = torch.device(device)
            kernel = kernel.to(device)
            for rows in (1, 9, 17) if small else (1, 3, 16, 17, 64, 100, 2048):
                x = torch.randn(rows, width, generator=torch.Generator().manual_seed(rows)).to(dtype)
                exact = (x.to(device).double() @ weight.to(device).double().T).cpu()
                error = float((kernel(x.to(device)).cpu().double() - exact).abs().max() / exact.abs().max())
                found.append({"dtype": str(dtype), "shape": [out, width], "rows": rows, "error": error})
                if not error <= tolerance:
                    raise RunError(f"{found[-1]} is above {tolerance:g}", fix="report it with the name of the GPU")
    return found


def seconds(calls: list[Any]) -> float:
    """The time of one of these calls, from a CUDA graph of all, the best of 20 replays."""
    for call in calls:
        call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    best = float("inf")
    for _ in range(20):
        began, ended = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        began.record()
        graph.replay()
        ended.record()
        ended.synchronize()
        best = min(best, began.elapsed_time(ended) / 1000 / len(calls))
    return best


def times() -> list[dict[str, Any]]:
    """Seconds of the kernel and of cuBLAS, by shape and rows; and the bytes of weights read a second."""
    found = []
    for out, width in SHAPES:
        made, weight = kernel_of(out, width, torch.float16, "cpu")
        packed = sum(buffer.numel() * buffer.element_size() for buffer in made.buffers())
        kernels = [kernel_of(out, width, torch.float16, "cuda")[0] for _ in range(-(-CACHE // packed))]
        dense = [weight.cuda() for _ in range(max(1, CACHE // (2 * out * width)))]
        for rows in ROWS:
            x = torch.randn(rows, width, dtype=torch.float16, device="cuda")
            ours = seconds([lambda kernel=kernel: kernel(x) for kernel in kernels])
            theirs = seconds([lambda one=one: torch.nn.functional.linear(x, one) for one in dense])
            line = {"shape": [out, width], "rows": rows, "seconds": ours, "cublas_seconds": theirs}
            found.append(line | {"speed_up": theirs / ours, "bytes_per_second": packed / ours})
            print(json.dumps(found[-1]), flush=True)
    return found


def main() -> None:
    """Check, then time."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    here = torch.cuda.is_available()
    if not here and os.environ.get("TRITON_INTERPRET") != "1":
        raise SystemExit("torch finds no GPU; with TRITON_INTERPRET=1, --check runs in Triton's interpreter")
    try:
        result: dict[str, Any] = {"device": torch.cuda.get_device_name() if here else "interpreter"}
        result["check"] = check("cuda" if here else "cpu")
        print(f"{len(result['check'])} products agree with float64", flush=True)
        if here and not arguments.check:
            result["times"] = times()
    except CompressError as error:
        raise SystemExit(f"error: {error}") from None
    if arguments.json:
        arguments.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
