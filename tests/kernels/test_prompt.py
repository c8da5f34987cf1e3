"""The product of many rows by warp groups: its numbers where PTX is done by hand, and what its machine code writes."""

from __future__ import annotations

import pytest
import torch

if torch.cuda.is_available():
    pytest.skip("kernels run: see test_cuda.py", allow_module_level=True)
pytest.importorskip("triton")
from compress.kernels import aot, multiply_prompt
from compress.kernels.multiply_prompt import Tile
from tests.kernels import emulated
from tests.kernels.test_product import KINDS, weight_of


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("tile", "width", "rows", "group", "symmetric"),
    [
        (Tile(64, 1, 1, 3), 384, 70, 128, True),
        (Tile(64, 1, 4, 3), 200, 33, -1, False),  # two steps for four warp groups
        (Tile(128, 2, 2, 2), 320, 130, 64, False),
    ],
)
def test_products_are_those_of_the_decoded_weight(
    kind: str, tile: Tile, width: int, rows: int, group: int, symmetric: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same bits again, too, from shared memory in which is what a copy on its way leaves there."""
    emulated.install(monkeypatch)
    out = 88
    weight, exact = weight_of(kind, out, width, torch.float16, 3, group, symmetric=symmetric)
    x = torch.randn(rows, width, generator=torch.Generator().manual_seed(rows)).half()
    found = multiply_prompt.launch(tile, x, weight, out)
    wanted = x.double() @ exact.half().double().T
    assert found.shape == (rows, out)
    assert float((found.double() - wanted).abs().max()) <= 2**-9 * float(wanted.abs().max())


@pytest.mark.parametrize("tile", multiply_prompt.TILES)
def test_there_is_room(tile: Tile) -> None:
    """For stages of x, for sums of warp groups and for 64 rows of y, on a multiprocessor of 227 KiB."""
    kib = multiply_prompt.cut(tile, torch.float16, aot.fragments("int4", 4096, 4096))["KIB"]
    has = 1024 * (kib - 1) if kib else 48 << 10
    threads = 32 * tile.warps
    assert tile.rows * 64 * 2 * tile.stages * tile.along <= has <= 226 << 10
    assert tile.along == 1 or tile.rows // 2 * 4 * threads <= has
    assert 64 * 64 * tile.groups * 2 * tile.along <= has
    assert threads <= 1024


LOOP = """
.L_x_1:
        /*0010*/                   HADD2 R{first}, R60, -1032, -1032 ;
        /*0020*/                   HGMMA.64x64x16.F32 R24, R8, gdesc[UR4], R24, gsb0 ;
        /*0030*/                   {between} ;
        /*0040*/                   WARPGROUP.DEPBAR.LE gsb0, 0x0 ;
        /*0050*/                   FFMA R24, R24, R25, R26 ;
        /*0060*/               @P0 BRA `(.L_x_1) ;
"""


@pytest.mark.parametrize(
    ("between", "early"),
    [
        ("HADD2 R12, R60, -1032, -1032", False),
        ("HADD2 R11, R60, -1032, -1032", True),
        ("LDG.E.128 R4, desc[UR10][R34.64]", False),
        ("LDG.E.128 R5, desc[UR10][R34.64]", True),
        ("FADD R55, R1, R2", True),
        ("FADD R56, R1, R2", False),
        ("STS.128 [R8], R24", False),
    ],
)
def test_a_register_that_is_written_early_is_found(between: str, early: bool) -> None:
    """A product reads four registers from R8 on and adds to 32 from R24 on."""
    assert bool(aot.written_early(LOOP.format(first=8, between=between))) == early


def test_it_is_found_over_the_end_of_a_loop() -> None:
    listing = LOOP.format(first=8, between="NOP")
    product, wait = [line for line in listing.splitlines() if "HGMMA" in line or "DEPBAR" in line]
    assert not aot.written_early(listing)
    moved = listing.replace(wait + "\n", "").replace(product, wait + "\n" + product)  # waited for a turn later
    assert aot.written_early(moved) == ["FFMA R24, R24, R25, R26", "HADD2 R8, R60, -1032, -1032"]
