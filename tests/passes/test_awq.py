"""AWQ: the function and the masks stay, the search never loses, and only what can take a scale is scaled."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import compress
from compress.architecture import architecture_for
from compress.calibration.moments import Moments, Statistics
from compress.compiling import compile_plan
from compress.errors import PlanError
from compress.evals.perplexity import evaluate
from compress.passes import AWQ, GPTQ, RTN, BlockState, LinearState, LQLoRA, Pass, SparseGPT
from compress.passes.awq import _rounded, _usable
from tests.conftest import tiny_directory
from tests.models import FAMILIES, GROUPED, tiny_model

if TYPE_CHECKING:
    from pathlib import Path


def weight_of(module: nn.Module, *, transposed: bool) -> Tensor:
    weight = module.weight.detach().float()
    return weight.T.contiguous() if transposed else weight.clone()


def block_state(model: Any, family: str, inputs: Tensor, quantizer: Any) -> tuple[BlockState, nn.Module]:
    """The first block as a block pass sees it, with moments from hooks on the whole model; the block itself, too."""
    architecture = architecture_for(family)
    block = model.get_submodule(architecture.blocks)[0]
    moments: dict[str, Moments] = {}
    hooks = []
    for name in architecture.linears:

        def seen(_: nn.Module, args: tuple[Tensor, ...], name: str = name) -> None:
            flat = args[0].reshape(-1, args[0].shape[-1])
            moments[name] = Moments(flat.shape[1], Statistics.GRAM)
            moments[name].add(flat)

        hooks.append(block.get_submodule(name).register_forward_pre_hook(seen))
    with torch.no_grad():
        model(inputs)
    for hook in hooks:
        hook.remove()
    linears = {}
    for name in architecture.linears:
        weight = weight_of(block.get_submodule(name), transposed=name in architecture.transposed)
        linears[name] = LinearState(name, weight, weight, torch.float32)
    weights = {f"{name}.weight" for name in linears}
    parameters = {name: p.detach().clone() for name, p in block.named_parameters() if name not in weights}
    followers = dict.fromkeys(linears, quantizer)
    return BlockState(architecture, model.config, linears, moments, parameters, followers), block


def write_back(state: BlockState, block: nn.Module) -> None:
    with torch.no_grad():
        for name, linear in state.linears.items():
            transposed = name in state.architecture.transposed
            block.get_submodule(name).weight.copy_(linear.weight.T if transposed else linear.weight)
        for name, value in state.parameters.items():
            block.get_parameter(name).copy_(value)


@pytest.mark.parametrize("gqa", [True, False], ids=["gqa", "mha"])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_function_stays(family: str, gqa: bool) -> None:
    if not gqa and family not in GROUPED:
        pytest.skip("the family has no KV groups")
    model = tiny_model(family, tied=True, gqa=gqa)
    inputs = torch.randint(0, 64, (4, 32), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        before = model(inputs).logits
    state, block = block_state(model, family, inputs, RTN(bits=2, group_size=-1))
    dense = {name: linear.weight.clone() for name, linear in state.linears.items()}
    notes = AWQ().apply(state)
    assert set(notes) == {name for one in _usable(state.architecture, model.config) for name in one.inputs}
    changed = [name for name, linear in state.linears.items() if not torch.equal(linear.weight, dense[name])]
    assert changed, "2 bits on rows of unequal inputs must be worth a scale somewhere"
    write_back(state, block)
    with torch.no_grad():
        after = model(inputs).logits
    # Each channel is multiplied and divided once, in float32.
    assert torch.allclose(after, before, rtol=0, atol=2e-5 * float(before.abs().max()))


@pytest.mark.parametrize("family", FAMILIES)
def test_moments_are_those_of_the_scaled_inputs(family: str) -> None:
    """What the pass says the moments are now is what a forward of the changed block collects."""
    model = tiny_model(family, tied=True, gqa=True)
    inputs = torch.randint(0, 64, (4, 32), generator=torch.Generator().manual_seed(1))
    state, block = block_state(model, family, inputs, RTN(bits=2, group_size=-1))
    AWQ().apply(state)
    write_back(state, block)
    fresh, _ = block_state(model, family, inputs, None)
    for name, moments in state.moments.items():
        wanted = fresh.moments[name].gram()
        assert torch.allclose(moments.gram(), wanted, rtol=1e-4, atol=1e-4 * float(wanted.abs().max())), name


def test_the_search_never_loses_to_no_scale() -> None:
    """For one set of linears: the error of rounding after the chosen scale is at most that of rounding alone."""
    model = tiny_model("llama", tied=True, gqa=True)
    inputs = torch.randint(0, 64, (4, 32), generator=torch.Generator().manual_seed(2))
    quantizer = RTN(bits=3, group_size=8)
    state, _ = block_state(model, "llama", inputs, quantizer)
    name = "self_attn.q_proj"
    x = state.moments[name]
    dense = state.linears[name].weight.clone()

    def rounded(weight: Tensor) -> Tensor:
        one = LinearState("x", weight, weight, torch.float32)
        quantizer.apply(one, Moments(weight.shape[1], Statistics.NONE))
        return one.weight

    plain = sum(
        x.error(rounded(state.linears[n].weight) - state.linears[n].weight)
        for n in ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
    )
    AWQ().apply(state)
    scale = state.linears[name].columns
    assert scale is not None
    assert torch.allclose(state.linears[name].weight, dense * scale)
    # v_proj has also got rows from o_proj's scale: undo them to compare.
    scaled = 0.0
    for n in ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"):
        linear = state.linears[n]
        rows = linear.rows if linear.rows is not None else torch.ones(linear.out_features)
        weight = linear.weight / rows.unsqueeze(1)
        scaled += x.error((rounded(weight) - weight) / scale)
    assert scaled <= plain * (1 + 1e-5)


def test_one_point_is_no_scale() -> None:
    """α = 0 alone: nothing changes, bit for bit."""
    model = tiny_model("llama", tied=True, gqa=True)
    inputs = torch.randint(0, 64, (2, 16), generator=torch.Generator().manual_seed(3))
    state, _ = block_state(model, "llama", inputs, RTN(bits=3, group_size=8))
    before = {name: linear.weight.clone() for name, linear in state.linears.items()}
    norms = {name: value.clone() for name, value in state.parameters.items()}
    AWQ(points=1).apply(state)
    assert all(torch.equal(state.linears[name].weight, weight) for name, weight in before.items())
    assert all(torch.equal(state.parameters[name], value) for name, value in norms.items())


def plan_of(folder: Path, *passes: Any, refresh: str = "block", form: str = "huggingface") -> compress.Plan:
    return compress.Plan(
        model=compress.Model(path=str(folder / "model")),
        calibration=compress.Calibration(source=str(folder / "text.txt"), samples=8, length=32),
        run=compress.Run(output=str(folder / "out"), refresh=refresh),
        passes=passes,
        exports=[compress.Export(format=form)],
    )


@pytest.mark.parametrize("refresh", ["block", "subset"])
@pytest.mark.parametrize("form", ["huggingface", "compressed-tensors"])
def test_what_was_scaled_is_emitted(tmp_path: Path, refresh: str, form: str) -> None:
    """8 bits are nearly exact: a norm or a row that was scaled and not emitted would make another model of it."""
    tiny_directory(tmp_path / "model", "llama")
    report = compress.run(plan_of(tmp_path, AWQ(), GPTQ(bits=8, group_size=16), refresh=refresh, form=form))
    assert any(line.detail not in (None, "alpha 0.00") for line in report.linears)
    settings = compress.Evaluate(perplexity=(str(tmp_path / "text.txt"),), window=32, windows=8)
    (line,) = evaluate(tmp_path / "out", settings, dense=tmp_path / "model")
    assert line.divergence is not None
    assert line.divergence.kl_mean is not None
    assert line.divergence.kl_mean < 0.005


@pytest.mark.parametrize("refresh", ["block", "subset"])
def test_masks_stay(tmp_path: Path, refresh: str) -> None:
    tiny_directory(tmp_path / "model", "llama")
    plan = plan_of(tmp_path, SparseGPT(pattern="2:4"), AWQ(), GPTQ(group_size=16), refresh=refresh)
    assert compile_plan(plan).sweeps == ((0,), (1, 2))
    report = compress.run(plan)
    assert {line.sparsity for line in report.linears} == {0.5}
    compress.run(
        plan_of(tmp_path, SparseGPT(pattern="2:4"), refresh=refresh).model_copy(
            update={"run": compress.Run(output=str(tmp_path / "pruned"), refresh=refresh)}
        )
    )
    after, before = (load_file(tmp_path / name / "model.safetensors") for name in ("out", "pruned"))
    for name, weight in before.items():
        if name.endswith("_proj.weight"):
            assert bool((after[name][weight == 0] == 0).all()), name


def test_a_family_without_the_place_is_not_scaled_there() -> None:
    """GPT-2's second MLP linear follows a GELU, which no scale passes."""
    taken = AWQ().takes(
        architecture_for("gpt2"),
        tiny_model("gpt2", tied=True, gqa=False).config,
        ["attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"],
        {"attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"},
    )
    assert "mlp.c_proj" not in taken


def test_asking_for_it_there_is_refused(tmp_path: Path) -> None:
    tiny_directory(tmp_path / "model", "gpt2")
    plan = plan_of(tmp_path, AWQ(match=("*.mlp.c_proj",)), RTN(group_size=16))
    with pytest.raises(PlanError, match=r"nothing that precedes mlp\.c_proj can take its scale"):
        compile_plan(plan)


def test_half_a_set_is_refused(tmp_path: Path) -> None:
    """q and k cannot be scaled without v: they read the same norm."""
    tiny_directory(tmp_path / "model", "llama")
    with pytest.raises(PlanError, match="left out") as caught:
        compile_plan(plan_of(tmp_path, AWQ(match=("*.q_proj",)), RTN(group_size=16)))
    assert "self_attn.q_proj, self_attn.v_proj" in str(caught.value)


@pytest.mark.parametrize("after", [(), (LQLoRA(bits=4, group_size=16, rank=2),)], ids=["nothing", "lqlora"])
def test_without_a_quantizer_it_is_refused(tmp_path: Path, after: tuple[Pass, ...]) -> None:
    """What lqlora leaves to round is known only once it is decomposed."""
    tiny_directory(tmp_path / "model", "llama")
    with pytest.raises(PlanError, match="awq has no quantizer after it"):
        compile_plan(plan_of(tmp_path, AWQ(), *after))


def test_after_a_grid_it_is_refused(tmp_path: Path) -> None:
    """Rows of v_proj would leave its grid; the MLP, on no grid yet, is free."""
    tiny_directory(tmp_path / "model", "llama")
    attention, mlp = ("*.q_proj", "*.k_proj", "*.v_proj"), ("*.gate_proj", "*.up_proj")
    first, last = RTN(group_size=16, match=attention), RTN(group_size=16, match=(*mlp, "*.o_proj"))
    with pytest.raises(PlanError, match="rule 1"):
        compile_plan(plan_of(tmp_path, first, AWQ(), last))
    compile_plan(plan_of(tmp_path, first, AWQ(match=mlp), last))


def test_the_ranges_that_are_foreseen_are_the_quantizers() -> None:
    """Where it looks for least error, so does the search, among a quarter of the ranges."""
    weight = torch.randn(24, 64, generator=torch.Generator().manual_seed(0))
    linear, scale = LinearState("q_proj", weight, weight, torch.float32), torch.linspace(0.5, 2, 64)
    errors = []
    for clip in ("minmax", "mse"):
        settings = RTN(bits=2, group_size=32, clip=clip)
        errors.append(float((_rounded(linear, scale, settings) - weight * scale).square().sum()))
        state = LinearState("q_proj", weight * scale, weight * scale, torch.float32)
        settings.apply(state, Moments(64, Statistics.NONE))
        errors.append(float((state.weight - weight * scale).square().sum()))
    foreseen, made, foreseen_clipped, made_clipped = errors
    assert foreseen == made
    assert made_clipped <= foreseen_clipped <= 1.02 * made_clipped
    assert foreseen_clipped < 0.8 * foreseen
