"""Codes as tensors of files, against streams of bits as Python integers, and back; exact sizes; equal perplexities."""

from __future__ import annotations

import json
import os
from itertools import product
from typing import TYPE_CHECKING, Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

import compress
from compress.checkpoint import DTYPE_NAMES, INDEX, Checkpoint
from compress.compiling import compile_plan
from compress.errors import PlanError
from compress.evals.perplexity import evaluate
from compress.export.bitstream import pack, unpack, words
from compress.export.compressed_tensors import CompressedTensors
from compress.export.formats import CodesFormat, known_formats
from compress.export.gptq import GPTQFormat
from compress.export.reader import open_model
from compress.grid import Grid, GridSpec
from compress.passes import RTN, Magnitude
from compress.plan import Evaluate
from tests.conftest import same_bits, tiny_directory
from tests.models import FAMILIES

if TYPE_CHECKING:
    from pathlib import Path

    from compress.passes import LinearPass
    from compress.report import Report

BITS = [2, 3, 4, 8]
quick = settings(max_examples=60, deadline=None)


def stream(codes: list[int], bits: int) -> list[int]:
    """The int32 words of a row of codes: one long integer, cut."""
    whole = sum(code << (i * bits) for i, code in enumerate(codes))
    cut = [(whole >> (32 * word)) & 0xFFFFFFFF for word in range(-(-len(codes) * bits // 32))]
    return [word - (1 << 32) if word >> 31 else word for word in cut]


# ---------------------------------------------------------------- streams of bits


@quick
@given(bits=st.sampled_from(BITS), count=st.integers(1, 70), rows=st.integers(1, 5), data=st.data())
def test_packed_codes_are_one_long_integer_cut_into_words(
    bits: int, count: int, rows: int, data: st.DataObject
) -> None:
    code = st.integers(0, 2**bits - 1)
    table = data.draw(st.lists(st.lists(code, min_size=count, max_size=count), min_size=rows, max_size=rows))
    codes = torch.tensor(table, dtype=torch.uint8)
    expected = [stream(row, bits) for row in table]
    assert words(count, bits) == len(expected[0])
    for given_codes in (codes, codes.T.contiguous().T):
        packed = pack(given_codes, bits)
        assert packed.dtype == torch.int32
        assert packed.tolist() == expected
        assert torch.equal(unpack(packed, bits, count), codes)
        column_major = packed.T.clone(memory_format=torch.contiguous_format).T
        assert torch.equal(unpack(column_major, bits, count), codes)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("compress.export.bitstream.SLICE", data.draw(st.integers(1, 90)))
        assert pack(codes, bits).tolist() == expected
        assert torch.equal(unpack(packed, bits, count), codes)


@pytest.mark.parametrize("bits", BITS)
def test_a_whole_word_of_ones_is_minus_one(bits: int) -> None:
    full = torch.full((1, 32), 2**bits - 1, dtype=torch.uint8)
    assert pack(full, bits).tolist() == [[-1] * bits]
    assert torch.equal(unpack(torch.full((1, bits), -1, dtype=torch.int32), bits, 32), full)


@pytest.mark.parametrize("bits", BITS)
def test_a_column_of_single_words_is_unpacked(bits: int) -> None:
    """torch calls it contiguous whatever its strides are."""
    codes = torch.tensor([[1, 2], [3, 0], [2, 3]], dtype=torch.uint8)
    column = torch.tensor([stream(row, bits) for row in codes.tolist()], dtype=torch.int32).view(1, 3).T
    assert column.stride() == (1, 3)
    assert torch.equal(unpack(column, bits, 2), codes)


# ---------------------------------------------------------------- tensors of a linear


def some_grid(spec: GridSpec, out: int, width: int, dtype: torch.dtype = torch.float16) -> Grid:
    generator = torch.Generator().manual_seed(out + width)
    shape = out, spec.groups(width)
    zero = torch.randint(0, spec.largest + 1, shape, generator=generator, dtype=torch.uint8)
    return Grid(
        spec,
        torch.rand(shape, generator=generator).add(0.1).to(dtype),
        torch.full_like(zero, spec.middle) if spec.symmetric else zero,
        torch.randint(0, spec.largest + 1, (out, width), generator=generator, dtype=torch.uint8),
    )


SPECS = [GridSpec(bits, group, symmetric) for bits, group, symmetric in product(BITS, (-1, 16), (True, False))]
each_spec = pytest.mark.parametrize("spec", SPECS, ids=lambda one: "-".join(map(str, one[:3])))
each_form = pytest.mark.parametrize("form", [GPTQFormat(), CompressedTensors()], ids=lambda one: one.name)


@each_form
@each_spec
@pytest.mark.parametrize("shape", [(64, 32), (32, 96)])
def test_a_grid_comes_back_from_its_tensors(form: CodesFormat, spec: GridSpec, shape: tuple[int, int]) -> None:
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        grid = some_grid(spec, *shape, dtype)
        wanted = form.parts(*shape, spec)
        parts = {suffix: form.part(suffix, grid) for suffix in wanted}
        for suffix, (name, size) in wanted.items():
            assert tuple(parts[suffix].shape) == size
            assert DTYPE_NAMES[parts[suffix].dtype] == (name or DTYPE_NAMES[dtype])
            assert parts[suffix].is_contiguous()
        again = form.grid(parts, spec)
        assert again.spec == spec
        for kind in ("scale", "zero", "codes"):
            assert same_bits(getattr(again, kind), getattr(grid, kind)), kind
        assert torch.equal(again.dequantize(dtype), grid.dequantize(dtype))


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("shape", [(5, 16), (7, 48), (33, 80)])
@pytest.mark.parametrize("symmetric", [True, False])
def test_compressed_tensors_pads_rows_that_fill_no_whole_words(
    bits: int, shape: tuple[int, int], symmetric: bool
) -> None:
    spec, form = GridSpec(bits, 16, symmetric), CompressedTensors()
    grid = some_grid(spec, *shape)
    parts = {suffix: form.part(suffix, grid) for suffix in form.parts(*shape, spec)}
    for suffix, (_, size) in form.parts(*shape, spec).items():
        assert tuple(parts[suffix].shape) == size
    again = form.grid(parts, spec)
    assert torch.equal(again.codes, grid.codes)
    assert torch.equal(again.zero, grid.zero)


@each_spec
def test_the_layout_of_gptq(spec: GridSpec) -> None:
    """Codes down the columns, zero-points along the rows; the first version stores these less one."""
    out, width = 64, 32
    grid, form = some_grid(spec, out, width), GPTQFormat()
    for column in range(out):
        codes = grid.codes[column].tolist()
        assert form.part("qweight", grid)[:, column].tolist() == stream(codes, spec.bits)
    groups = 1 if spec.group_size == -1 else 2
    for group in range(groups):
        zeros = [int(zero) - spec.symmetric for zero in grid.zero[:, group]]
        assert form.part("qzeros", grid)[group].tolist() == stream(zeros, spec.bits)
        assert form.part("scales", grid)[group].tolist() == grid.scale[:, group].tolist()
    assert form.part("g_idx", grid).tolist() == [i // (width // groups) for i in range(width)]


@each_spec
def test_the_layout_of_compressed_tensors(spec: GridSpec) -> None:
    """Codes along the rows; the signed codes that its readers think of are ours less 2^(bits−1)."""
    out, width = 64, 32
    grid, form = some_grid(spec, out, width), CompressedTensors()
    for row in range(out):
        assert form.part("weight_packed", grid)[row].tolist() == stream(grid.codes[row].tolist(), spec.bits)
    assert form.part("weight_scale", grid).tolist() == grid.scale.tolist()
    assert form.part("weight_shape", grid).tolist() == [out, width]
    assert ("weight_zero_point" in form.parts(out, width, spec)) == (not spec.symmetric)
    if not spec.symmetric:
        for group in range(grid.zero.shape[1]):
            zeros = form.part("weight_zero_point", grid)[:, group].tolist()
            assert zeros == stream(grid.zero[:, group].tolist(), spec.bits)


def test_an_index_of_gathered_groups_is_not_read() -> None:
    spec, form = GridSpec(4, 16), GPTQFormat()
    grid = some_grid(spec, 32, 32)
    parts = {suffix: form.part(suffix, grid) for suffix in form.suffixes}
    parts["g_idx"] = parts["g_idx"].flip(0)
    with pytest.raises(ValueError, match="desc_act"):
        form.grid(parts, spec)


# ---------------------------------------------------------------- whole outputs


@pytest.fixture
def _no_sync(monkeypatch: pytest.MonkeyPatch) -> None:
    """Half of the time of a tiny run is waiting for the disk."""
    monkeypatch.setattr(os, "fsync", lambda _: None)


def plan_of(model: Path, output: Path, form: str, *passes: LinearPass, **export: Any) -> compress.Plan:
    return compress.Plan(
        model=compress.Model(path=str(model)),
        run=compress.Run(output=str(output), device="cpu", threads=1),
        passes=list(passes),
        exports=[compress.Export(format=form, **export)],
    )


def emitted(model: Path, output: Path, form: str, *passes: LinearPass, **export: Any) -> Report:
    """Carry out a plan, and compare every byte that was written with the lock's forecast."""
    plan = plan_of(model, output, form, *passes, **export)
    lock = compile_plan(plan)
    report = compress.run(plan)
    sizes = {path.name: path.stat().st_size for path in output.glob("*.safetensors")}
    assert sizes == {shard.file: shard.bytes for shard in lock.shards}
    index = output / INDEX
    assert sum(sizes.values()) + (index.stat().st_size if index.exists() else 0) == lock.output_bytes
    stored = {name: tensor for path in output.glob("*.safetensors") for name, tensor in load_file(path).items()}
    slots = {slot.name: (slot.dtype, slot.shape) for shard in lock.shards for slot in shard.slots}
    assert {name: (DTYPE_NAMES[t.dtype], tuple(t.shape)) for name, t in stored.items()} == slots
    return report


def scored(directory: Path, text: Path) -> tuple[float, float | None]:
    (line,) = evaluate(directory, Evaluate(perplexity=str(text), window=24, windows=6))
    return line.compressed.nll, line.compressed.bits_per_byte


@pytest.mark.usefixtures("_no_sync")
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_in_every_format_that_takes_it(family: str, tmp_path: Path) -> None:
    """All formats give the perplexity of plain weights, to the last bit, and exactly the bytes that the lock says."""
    dtype = (torch.float16, torch.bfloat16, torch.float32)[FAMILIES.index(family) % 3]
    model = tiny_directory(tmp_path / "model", family, blocks=2, tied=bool(FAMILIES.index(family) % 2), dtype=dtype)
    passes = (
        Magnitude(pattern="2:4", match=("*.0.*",)),
        RTN(bits=4, group_size=16, symmetric=bool(FAMILIES.index(family) % 3), clip="minmax"),
    )
    scores, sizes = {}, {}
    for form in known_formats():
        output = tmp_path / form
        if family == "gpt2" and form == "compressed-tensors":
            with pytest.raises(PlanError, match=r"do not take transposed linears \(Conv1D\)"):
                emitted(model, output, form, *passes)
            continue
        emitted(model, output, form, *passes)
        scores[form] = scored(output, tmp_path / "text.txt")
        sizes[form] = sum(path.stat().st_size for path in output.glob("model*.safetensors"))
        assert ("quantization_config" in json.loads((output / "config.json").read_text())) == (form != "huggingface")
    assert len(scores) == (3 if family == "gpt2" else 4)
    assert len(set(scores.values())) == 1, scores
    assert scores["huggingface"] != scored(model, tmp_path / "text.txt")  # quantized it is
    assert max(size for form, size in sizes.items() if form != "huggingface") < sizes["huggingface"]


MIXED: list[dict[str, Any]] = [
    {"bits": 8, "group_size": -1, "symmetric": True},
    {"bits": 2, "group_size": 16, "symmetric": False},
    {"bits": 4, "group_size": 16, "symmetric": False, "scale_dtype": "float16"},
]


@pytest.mark.usefixtures("_no_sync")
@pytest.mark.parametrize("form", ["gptq", "compressed-tensors", "packed"])
@pytest.mark.parametrize("settings", MIXED, ids=lambda one: "-".join(map(str, one.values())))
def test_grids_that_differ_between_linears_and_linears_without_any(
    form: str, settings: dict[str, Any], tmp_path: Path
) -> None:
    model = tiny_directory(tmp_path / "model", "llama", blocks=2, dtype=torch.float32)
    passes = (
        RTN(
            **settings,
            except_=("*.1.mlp.up_proj",),
            where=({"match": "*.v_proj", "bits": 4}, {"match": "*.0.*.q_proj", "group_size": 16, "bits": 8}),
        ),
        Magnitude(sparsity=0.25, match=("*.up_proj",)),  # one of which has no grid: its zeros are plain
    )
    outputs = {name: tmp_path / name for name in ("huggingface", form)}
    for name, output in outputs.items():
        emitted(model, output, name, *passes, shard_size=20_000)
    _, plain = open_model(outputs["huggingface"])
    _, packed = open_model(outputs[form])
    assert packed.tensors.keys() == plain.tensors.keys()
    for name in plain.tensors:
        assert same_bits(packed.read(name), plain.read(name)), name
    stored = Checkpoint(outputs[form]).tensors
    assert "model.layers.1.mlp.up_proj.weight" in stored
    assert "model.layers.0.mlp.up_proj.weight" not in stored
    assert scored(outputs[form], tmp_path / "text.txt") == scored(outputs["huggingface"], tmp_path / "text.txt")
    masks = load_file(outputs[form] / "masks.safetensors")
    blocks = (0,) if form == "packed" else (0, 1)  # which leaves the mask of a plain weight to its zeros
    assert sorted(masks) == [f"model.layers.{block}.mlp.up_proj.mask" for block in blocks]


@pytest.mark.usefixtures("_no_sync")
def test_what_is_not_quantized_stays_a_plain_model_in_every_format(tmp_path: Path) -> None:
    """Then the format has nothing to say, but masks stand beside the weights where it packs."""
    model = tiny_directory(tmp_path / "model", "llama", blocks=1)
    for form in known_formats():
        emitted(model, tmp_path / form, form, Magnitude(sparsity=0.5))
        assert "quantization_config" not in json.loads((tmp_path / form / "config.json").read_text())
        assert (tmp_path / form / "masks.safetensors").exists() == (form not in ("huggingface", "packed"))
    weights = [load_file(tmp_path / form / "model.safetensors") for form in known_formats()]
    assert all(same_bits(one[name], weights[0][name]) for one in weights for name in weights[0])
