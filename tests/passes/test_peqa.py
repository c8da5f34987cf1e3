"""PEQA: the identities of METHODS section 5, in float64 where they are exact, and what a run makes of them."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest
import torch
from pydantic import ValidationError
from safetensors.torch import load_file

import compress
from compress.adapting import AdaptedLinear
from compress.calibration.moments import Moments, Statistics
from compress.compiling import compile_plan
from compress.errors import PlanError
from compress.export.reader import open_model
from compress.passes import GPTQ, PEQA, RTN, EoRA, LinearState, Magnitude
from compress.passes.grid_search import rescaled
from compress.passes.lqlora import LQLoRA
from compress.state import unpack_bits
from tests.conftest import same_bits
from tests.passes import correlated, draw, moments_of, row_errors, state_of

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor

    from compress.grid import Grid

ROWS, COLUMNS = 9, 48
SETTINGS: list[dict[str, Any]] = [
    {"bits": 4, "group_size": -1},
    {"bits": 3, "group_size": 16},
    {"bits": 2, "group_size": 6, "symmetric": False},
    {"bits": 3, "group_size": 12, "scale_dtype": "float16"},
]
each_setting = pytest.mark.parametrize("settings", SETTINGS, ids=lambda one: "-".join(map(str, one.values())))


def quantized(
    weight: Tensor, *, mask: Tensor | None = None, dtype: torch.dtype = torch.float32, **settings: Any
) -> LinearState:
    """A layer put on a grid by rounding."""
    state = state_of(weight, dtype)
    if mask is not None:
        state.prune(~mask)
    RTN(**settings).apply(state, Moments(weight.shape[1], Statistics.NONE))
    return state


def steps_of(grid: Grid) -> Tensor:
    """C = codes − zero-points (out, in), float64."""
    return grid.codes.double() - grid.spread(grid.zero).double()


def oracle(weight: Tensor, grid: Grid, H: Tensor) -> Tensor:
    """The scales (out, groups) that minimize ``(w − Σ s_g c_g) H (…)ᵀ``, by `lstsq` on a root of H, row by row."""
    values, vectors = torch.linalg.eigh(H.double())
    root = vectors * values.clamp_min(0).sqrt()  # (in, in), H = root rootᵀ
    found = []
    for w, c in zip(weight.double(), steps_of(grid), strict=True):
        groups = torch.block_diag(*c.view(grid.scale.shape[1], 1, -1))  # (groups, in): a group's steps in each row
        found.append(torch.linalg.lstsq((groups @ root).T, (w @ root).unsqueeze(1), driver="gelsd").solution.flatten())
    return torch.stack(found)


# ------------------------------------------------------------ the closed form


@each_setting
def test_rescaled_is_least_squares(settings: dict[str, Any]) -> None:
    weight, inputs = draw(ROWS, COLUMNS, seed=1), correlated(300, COLUMNS, seed=1)
    H = inputs.double().T @ inputs.double()
    state = quantized(weight, **settings)
    assert state.grid is not None
    found = rescaled(weight, state.grid, moments_of(inputs).gram(), torch.float32)
    wanted, before = oracle(weight, state.grid, H), state.grid.scale.double()
    free = (wanted > 0.1 * before).all(1)
    assert free.sum() > ROWS // 2
    assert torch.allclose(found.scale[free].double(), wanted[free], rtol=2e-3, atol=0)
    # Elsewhere the way is the same, and as far as the first scale lets it.
    way, whole = found.scale[~free].double() - before[~free], wanted[~free] - before[~free]
    part = (0.9 * before[~free] / -whole).masked_fill(whole >= 0, 1).amin(1, keepdim=True)
    assert torch.allclose(way, part * whole, rtol=2e-3, atol=2e-3 * float(before.max()))
    assert torch.equal(found.codes, state.grid.codes)
    assert torch.equal(found.zero, state.grid.zero)
    assert found.scale.dtype == state.grid.scale.dtype


def test_one_group_per_row_is_a_quotient() -> None:
    """``s = (w H cᵀ) / (c H cᵀ)``."""
    weight, inputs = draw(ROWS, COLUMNS, seed=2), correlated(300, COLUMNS, seed=2)
    state = quantized(weight, bits=3, group_size=-1)
    assert state.grid is not None
    C, H = steps_of(state.grid), inputs.double().T @ inputs.double()
    wanted = (weight.double() @ H * C).sum(1) / (C @ H * C).sum(1)
    found = rescaled(weight, state.grid, moments_of(inputs).gram(), torch.float32)
    assert torch.allclose(found.scale.flatten().double(), wanted, rtol=2e-6)


@each_setting
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("tokens", [300, 20])
def test_no_row_gets_worse(settings: dict[str, Any], dtype: torch.dtype, tokens: int) -> None:
    """As stored, rounded; with fewer tokens than columns, too, where H is singular. Most rows get better."""
    better = 0
    for seed in range(3):
        weight, inputs = draw(ROWS, COLUMNS, seed=seed).to(dtype).float(), correlated(tokens, COLUMNS, seed=seed)
        H = inputs.double().T @ inputs.double()
        state = quantized(weight, dtype=dtype, **settings)
        assert state.grid is not None
        before = row_errors(weight - state.weight, H)
        found = rescaled(weight, state.grid, moments_of(inputs).gram(), dtype)
        after = row_errors(weight - found.dequantize(dtype), H)
        assert (after <= before * (1 + 1e-5)).all()
        better += int((after < before).sum())
    assert better > 2 * ROWS


def test_a_group_of_zeros_and_dead_inputs_keep_their_scales() -> None:
    weight, inputs = draw(ROWS, COLUMNS, seed=3), correlated(300, COLUMNS, seed=3)
    mask = torch.ones(ROWS, COLUMNS, dtype=torch.bool)
    mask[:, 12:24] = False  # no step is left there
    inputs[:, 24:36] = 0.0
    state = quantized(weight, mask=mask, bits=3, group_size=12)
    assert state.grid is not None
    found = rescaled(weight, state.grid, moments_of(inputs).gram(), torch.float32)
    assert torch.equal(found.scale[:, 1:3], state.grid.scale[:, 1:3])
    assert (found.scale[:, [0, 3]] != state.grid.scale[:, [0, 3]]).all()


def test_groups_that_the_inputs_do_not_tell_apart() -> None:
    """Two groups with the same steps and the same inputs: only the sum of their scales counts, and both stay near."""
    half, x = draw(ROWS, 8, seed=4), correlated(100, 8, seed=4)
    weight, inputs = torch.cat([half, half], 1), torch.cat([x, x], 1)
    state = quantized(weight, bits=3, group_size=8)
    assert state.grid is not None
    H = inputs.double().T @ inputs.double()
    found = rescaled(weight, state.grid, moments_of(inputs).gram(), torch.float32)
    assert torch.allclose(found.scale[:, 0], found.scale[:, 1], rtol=1e-4)
    best = row_errors(weight - oracle(weight, state.grid, H).repeat_interleave(8, 1) * steps_of(state.grid), H)
    assert torch.allclose(row_errors(weight - found.dequantize(torch.float32), H), best, rtol=1e-4)


def test_a_scale_that_would_turn_negative_stops_its_row() -> None:
    """Codes of the opposite sign: the best scale is negative. The error falls on the way there."""
    weight, inputs = draw(2, COLUMNS, seed=5), correlated(300, COLUMNS, seed=5)
    state = quantized(weight, bits=3, group_size=-1)
    grid = state.grid
    assert grid is not None
    codes = grid.codes.clone()
    codes[0] = 8 - codes[0].clamp_min(1)
    found = rescaled(weight, replace(grid, codes=codes), moments_of(inputs).gram(), torch.float32)
    assert torch.allclose(found.scale[0], 0.1 * grid.scale[0])
    right = rescaled(weight, grid, moments_of(inputs).gram(), torch.float32)
    assert torch.equal(found.scale[1], right.scale[1])


def test_systems_in_slices_are_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, inputs = draw(ROWS, COLUMNS, seed=6), correlated(300, COLUMNS, seed=6)
    state = quantized(weight, bits=3, group_size=12)
    assert state.grid is not None
    whole = rescaled(weight, state.grid, moments_of(inputs).gram(), torch.float32)
    monkeypatch.setattr("compress.passes.grid_search.SYSTEMS", 2 * 4 * 4)  # two rows of four groups
    parts = rescaled(weight, state.grid, moments_of(inputs).gram(), torch.float32)
    assert torch.equal(parts.scale, whole.scale)


@pytest.mark.parametrize("one", [GPTQ, RTN])
@pytest.mark.parametrize("masked", [False, True])
def test_quantizers_rescale(one: type[GPTQ] | type[RTN], masked: bool) -> None:
    """Towards the dense weight, whatever was pruned; codes, zero-points and mask are those without it."""
    weight, inputs = draw(ROWS, COLUMNS, seed=7), correlated(300, COLUMNS, seed=7)
    mask = draw(ROWS, COLUMNS, seed=57) > -0.25
    states = []
    for rescale in (False, True):
        state = state_of(weight)
        if masked:
            state.prune(~mask)
        quantizer = one(bits=3, group_size=12, symmetric=False, rescale=rescale)
        assert quantizer.needed() == (Statistics.GRAM if rescale or one is GPTQ else Statistics.NONE)
        quantizer.apply(state, moments_of(inputs))
        states.append(state)
    (plain, better), H = states, inputs.double().T @ inputs.double()
    assert plain.grid is not None
    assert better.grid is not None
    assert torch.equal(plain.grid.codes, better.grid.codes)
    assert torch.equal(plain.grid.zero, better.grid.zero)
    wanted = oracle(weight, plain.grid, H)
    free = (wanted > 0.1 * plain.grid.scale).all(1)
    assert free.any()
    assert torch.allclose(better.grid.scale[free].double(), wanted[free], rtol=2e-3)
    assert row_errors(weight - better.weight, H).sum() < row_errors(weight - plain.weight, H).sum()
    if masked:
        assert torch.equal(better.mask, mask)
        assert (better.weight[~mask].view(torch.int32) == 0).all()


# ------------------------------------------------------------------ identities


def adapted(state: LinearState) -> AdaptedLinear:
    return AdaptedLinear(state, None, "scales", rank=1, alpha=1.0, seed=0)


@each_setting
def test_the_gradient_is_the_sum_over_the_group(settings: dict[str, Any]) -> None:
    """``∂L/∂s_g = Σ_j C_gj ∂L/∂Ŵ_gj``, autograd's against by hand; what is trained is δ, ``∂L/∂δ = s0 ∂L/∂s``."""
    state = quantized(draw(ROWS, COLUMNS, seed=8), **settings)
    x, target = draw(30, COLUMNS, seed=9), draw(30, ROWS, seed=10)
    module = adapted(state)
    (module(x) - target).square().sum().backward()
    weight = state.weight.double()
    outer = 2 * (x.double() @ weight.T - target.double()).T @ x.double()  # ∂L/∂Ŵ
    assert state.grid is not None
    scale = state.grid.scale.double()
    by_hand = (steps_of(state.grid) * outer).view(*scale.shape, -1).sum(-1)
    assert module.delta.grad is not None
    assert torch.allclose(
        module.delta.grad.double() / scale, by_hand, rtol=1e-3, atol=1e-4 * float(by_hand.abs().max())
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("symmetric", [False, True])
def test_integers_are_recovered(dtype: torch.dtype, bits: int, symmetric: bool) -> None:
    """``round(Ŵ / s) == C`` for any trained scales, from the weight and the scales as they are stored."""
    state = quantized(draw(ROWS, COLUMNS, seed=11), dtype=dtype, bits=bits, group_size=12, symmetric=symmetric)
    assert state.grid is not None
    before = steps_of(state.grid)
    module = adapted(state)
    with torch.no_grad():
        module.delta.copy_(draw(ROWS, 4, seed=12) * 0.3)
    module.finish()
    stored, scale = state.effective().to(dtype), state.grid.scale
    assert scale.dtype == dtype
    assert torch.equal((stored.double() / state.grid.spread(scale).double()).round(), before)


def test_finish_is_the_forward_of_rounded_scales() -> None:
    """What a step computes, but with the scales rounded, and the mask as it was; scales stay positive."""
    weight = draw(ROWS, COLUMNS, seed=13)
    mask = draw(ROWS, COLUMNS, seed=14) > 0
    state = quantized(weight, mask=mask, bits=3, group_size=12, scale_dtype="float16")
    module = adapted(state)
    with torch.no_grad():
        module.delta.copy_(draw(ROWS, 4, seed=15))
    module.finish()
    assert state.grid is not None
    assert (state.grid.scale > 0).all()
    x = draw(5, COLUMNS, seed=16)
    again = adapted(state)  # δ = 0 on the new scales
    assert torch.equal(again(x), torch.nn.functional.linear(x, state.effective()))
    assert torch.equal(state.effective(), state.grid.dequantize(torch.float32))
    assert torch.equal(state.mask, mask)
    assert (state.effective()[~mask].view(torch.int32) == 0).all()


def test_scales_that_float16_cannot_hold_stay() -> None:
    """The smallest one halved is 0 there, the largest one doubled infinity."""
    state = quantized(draw(2, COLUMNS, seed=17), bits=3, group_size=-1, scale_dtype="float16")
    assert state.grid is not None
    ends = torch.tensor([[2**-24], [65504.0]], dtype=torch.float16)
    state.quantize(replace(state.grid, scale=ends))
    module = adapted(state)
    with torch.no_grad():
        module.delta.copy_(torch.tensor([[-0.6], [1.0]]))
    module.finish()
    assert torch.equal(state.grid.scale, ends)


# ----------------------------------------------------------------------- runs


def plan_of(folder: Path, *passes: Any, form: str = "huggingface", output: str = "out", **export: Any) -> compress.Plan:
    return compress.Plan(
        model=compress.Model(path=str(folder / "model")),
        calibration=compress.Calibration(source=str(folder / "text.txt"), samples=12, length=32),
        run=compress.Run(output=str(folder / output)),
        passes=passes,
        exports=[compress.Export(format=form, **export)],
    )


def quick(**settings: Any) -> PEQA:
    """Two looks, on few samples."""
    return PEQA(**{"steps": 4, "evaluate_every": 2, "batch_size": 4, "learning_rate": 0.03} | settings)


QUANTIZER = RTN(bits=4, group_size=16, scale_dtype="float16")


def trained_losses(report: Any) -> tuple[float, float]:
    """The first and the best held-out loss, as the ledger has them."""
    (detail,) = {line.detail for line in report.linears if line.use == "peqa"}
    first, best = re.findall(r"\d+\.\d+", detail)
    return float(first), float(best)


@pytest.mark.parametrize("settings", [{}, {"distill": 1.0}, {"distill": 0.5, "temperature": 2.0}], ids=str)
def test_the_loss_falls(folder: Path, settings: dict[str, Any]) -> None:
    quantizer = RTN(bits=2, group_size=16)
    report = compress.run(plan_of(folder, quantizer, quick(steps=20, evaluate_every=10, **settings)))
    first, best = trained_losses(report)
    assert best < first
    assert all("scales" in line.detail for line in report.linears if line.use == "peqa")


def test_nothing_learned_is_the_quantized_model(folder: Path) -> None:
    """δ too small for 1 + δ: the same bytes as without the pass."""
    compress.run(plan_of(folder, QUANTIZER, form="gptq", output="plain"))
    compress.run(plan_of(folder, QUANTIZER, quick(learning_rate=1e-12), form="gptq"))
    assert (folder / "out/model.safetensors").read_bytes() == (folder / "plain/model.safetensors").read_bytes()


def test_what_was_trained_is_what_is_written(folder: Path) -> None:
    """Plain weights, and codes and scales of either format: the same values bit for bit; codes and masks stay."""
    passes = (Magnitude(sparsity=0.5), QUANTIZER)
    compress.run(plan_of(folder, *passes, form="gptq", output="plain"))
    outputs = {}
    for form in ("huggingface", "gptq", "compressed-tensors"):
        compress.run(plan_of(folder, *passes, quick(), form=form, output=form))
        outputs[form] = open_model(folder / form)[1]
    plain, trained = load_file(folder / "plain/model.safetensors"), load_file(folder / "gptq/model.safetensors")
    moved = {name.rpartition(".")[2] for name, tensor in plain.items() if not same_bits(tensor, trained[name])}
    assert moved == {"scales"}
    assert (folder / "plain/masks.safetensors").read_bytes() == (folder / "gptq/masks.safetensors").read_bytes()
    masks = load_file(folder / "gptq/masks.safetensors")
    for name, stored in load_file(folder / "huggingface/model.safetensors").items():
        for form in ("gptq", "compressed-tensors"):
            assert same_bits(outputs[form].read(name), stored), (form, name)
        packed = masks.get(f"{name.removesuffix('.weight')}.mask")
        if packed is not None:
            assert (stored[~unpack_bits(packed, stored.shape[1])].view(torch.int32) == 0).all()


def test_running_blocks_again_is_the_same(folder: Path) -> None:
    for checkpointing in (False, True):
        one = quick(gradient_checkpointing=checkpointing)
        compress.run(plan_of(folder, QUANTIZER, one, output=f"out-{checkpointing}"))
    first, second = (load_file(folder / f"out-{value}/model.safetensors") for value in (False, True))
    assert all(torch.allclose(first[name], second[name], rtol=1e-3, atol=1e-4) for name in first)


# ------------------------------------------------------------- what is refused


def refusal(plan: compress.Plan) -> str:
    with pytest.raises(PlanError) as caught:
        compile_plan(plan)
    return str(caught.value)


def test_it_needs_a_grid(folder: Path) -> None:
    assert "peqa needs a grid" in (said := refusal(plan_of(folder, Magnitude(sparsity=0.5), quick())))
    assert "rule 6" in said
    without = refusal(plan_of(folder, Magnitude(sparsity=0.5), EoRA(rank=2), quick()))
    assert "peqa needs a grid" in without
    assert "fix: put a quantizer before it" in without  # elsewhere it would need one, too
    assert "down_proj" in refusal(plan_of(folder, RTN(group_size=16, except_=("*.down_proj",)), quick()))
    compile_plan(plan_of(folder, RTN(group_size=16, except_=("*.down_proj",)), quick(except_=("*.down_proj",))))


def test_it_needs_integers(folder: Path) -> None:
    """Before a weight is read, and whether or not the lock knows which NormalFloat grid it will be."""
    for settings in ({"group_size": 16}, {"budget": 4.5, "choices_group": (16,)}):
        said = refusal(plan_of(folder, LQLoRA(rank=0, fisher=False, **settings), quick()))
        assert "no grid of integers" in said
        assert "gptq" in said


def test_after_a_branch_it_is_refused(folder: Path) -> None:
    """What the branch makes up for changes with the scales."""
    said = refusal(plan_of(folder, QUANTIZER, EoRA(rank=4), quick()))
    assert "would break the low-rank branch that pass[1] eora makes" in said
    compile_plan(plan_of(folder, QUANTIZER, quick(), EoRA(rank=4)))


def test_settings_that_cannot_be_are_refused(folder: Path) -> None:
    (folder / "stories.txt").write_text("x")
    (folder / "stories.bin").write_text("x")
    cases = [
        ((quick(source=str(folder / "storys.txt")),), ["no such file", 'did you mean "stories.txt"', "source"]),
        ((quick(source=str(folder / "stories.bin")),), ['".bin" is no kind of text', ".jsonl"]),
        ((quick(name="a"), quick()), ['peqa comes after the set of scales "a"', "last"]),
        ((quick(name="a"), EoRA(rank=4)), ['eora comes after the set of scales "a"']),
        ((quick(name="a"), quick(name="b"), quick(name="A")), ['two sets of scales are called "A"']),
        ((quick(holdout=0.99),), ["leave none to train on"]),
    ]
    for passes, words in cases:
        said = refusal(plan_of(folder, QUANTIZER, *passes))
        assert all(word in said for word in words), said


@pytest.mark.parametrize("name", ["", "a/b", "..", "-a", "a b", "a.b", "é", "x" * 65])
def test_a_name_is_a_file_name_everywhere(name: str) -> None:
    with pytest.raises(ValidationError, match="cannot be the name of a file"):
        PEQA(name=name)
