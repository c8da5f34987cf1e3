"""The Triton kernels on a GPU: against float64, under torch.compile, and in models. Nothing here is interpreted."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch

import compress
from compress.passes import RTN, EoRA, Magnitude
from tests.test_runtime import emit, tokens, wide_directory

if TYPE_CHECKING:
    from pathlib import Path

    from compress.passes import LinearPass

pytestmark = pytest.mark.gpu
if not torch.cuda.is_available():  # and Triton must not be imported before others ask for its interpreter
    pytest.skip("needs a CUDA device", allow_module_level=True)
pytest.importorskip("triton")
from compress.kernels import bench  # noqa: E402


def test_all_kernels_agree_with_float64() -> None:
    assert len(list(bench.check_all())) > 12 * sum(len(case.rows) for case in bench.CASES) - 1


@pytest.mark.parametrize("kind", list(bench.KERNELS))
def test_they_compile_without_a_break(kind: str) -> None:
    kernel, _, _ = bench.kernel_of(kind, bench.Case(64, 128, rank=16), torch.float16, "cuda")
    x = torch.randn(3, 128, dtype=torch.float16, device="cuda")
    torch.testing.assert_close(torch.compile(kernel, fullgraph=True)(x), kernel(x))


@pytest.mark.parametrize("rows", [1, 8, 16, 40, 300])
@pytest.mark.parametrize("kind", ["int4", "sparse24_int4"])
def test_products_wait_for_each_other(kind: str, rows: int) -> None:
    """Kernels start before the one before them ends; in a graph of 24 the results are those of one at a time."""
    kernel, _, _ = bench.kernel_of(kind, bench.Case(2048, 2048, rank=16), torch.float16, "cuda")
    x = torch.randn(rows, 2048, dtype=torch.float16, device="cuda")

    def chained(wait: bool) -> torch.Tensor:
        y = x
        for _ in range(24):
            y = kernel(y) / 16
            if wait:
                torch.cuda.synchronize()
        return y

    wanted = chained(wait=True)
    assert bool(torch.isfinite(wanted).all())
    assert bool(wanted.any())
    assert torch.equal(chained(wait=False), wanted)
    assert all(torch.equal(again, wanted) for again in bench.replayed(lambda: chained(wait=False)))


@pytest.mark.parametrize(
    ("passes", "name"),
    [
        ((RTN(bits=4, group_size=32),), "triton-int4"),
        ((Magnitude(pattern="2:4"),), "triton-sparse24"),
        ((Magnitude(pattern="2:4"), RTN(bits=3, group_size=32), EoRA(rank=2)), "triton-sparse24-int4"),
    ],
)
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_a_model_runs_with_them(tmp_path: Path, passes: tuple[LinearPass, ...], name: str, dtype: str) -> None:
    """Logits as with decoded weights, up to what rounding each linear's output does."""
    wide_directory(tmp_path / "model", "llama")
    folder = emit(tmp_path, "packed", passes)
    logits = {}
    for kernels in ("auto", "both", "decoded"):
        model = compress.load(folder, device="cuda", dtype=dtype, kernels=kernels)  # type: ignore[arg-type]
        names = {chosen["kernel"] for chosen in model.compress_kernels.values()}
        assert names == {"decoded" if kernels == "decoded" else name}
        with torch.no_grad():
            logits[kernels] = model(tokens(3, 40).cuda(), use_cache=False).logits.double()
    assert torch.equal(logits["both"], logits["decoded"])  # of 120 rows
    unit = 2**-10 if dtype == "float16" else 2**-7
    difference = (logits["auto"] - logits["decoded"]).abs().max() / logits["decoded"].abs().max()
    assert float(difference) <= 16 * unit
