"""Linears that learn: what they compute at first, what learns, and what is left of it (METHODS sections 5 and 8)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch
from torch import nn

from compress.adapting import AdaptedLinear, Form
from compress.calibration.moments import Moments, Statistics
from compress.passes import RTN, LinearState
from compress.state import LowRank
from tests.models import tiny_model
from tests.passes import draw, group_zeros, state_of

if TYPE_CHECKING:
    from torch import Tensor

FORMS: list[Form] = ["fixed", "lora", "lora-prune", "masklora", "scalelora", "weights", "scales"]
FACTORED: list[Form] = ["lora", "lora-prune", "masklora", "scalelora"]
OUT, WIDTH, RANK, ALPHA = 12, 16, 4, 6.0


def sparse(*, dtype: torch.dtype = torch.float32, grid: bool = False, symmetric: bool = True) -> LinearState:
    """A layer (12, 16) of which 2:4 is kept; with 4-bit codes if wanted."""
    state = state_of(draw(OUT, WIDTH, seed=1).to(dtype).float(), dtype)
    scores = state.weight.abs().view(OUT, -1, 4)
    state.prune((scores < scores.sort(-1).values[..., 2:3]).view(OUT, WIDTH))
    assert (group_zeros(state, 4) == 2).all()
    if grid:
        RTN(bits=4, group_size=8, symmetric=symmetric).apply(state, Moments(WIDTH, Statistics.NONE))
    return state


def adapted(state: LinearState, form: Form, bias: Tensor | None = None, *, rank: int = RANK) -> AdaptedLinear:
    return AdaptedLinear(state, bias, form, rank=rank, alpha=ALPHA, seed=3)


def inputs_of(count: int = 40) -> Tensor:
    return draw(count, WIDTH, seed=5)


def learn(module: AdaptedLinear, steps: int = 30, rate: float = 0.05) -> None:
    """Towards other outputs, with Adam."""
    x, wanted = inputs_of(), draw(40, OUT, seed=6)
    optimizer = torch.optim.Adam([p for _, p in module.trained()], lr=rate)
    for _ in range(steps):
        optimizer.zero_grad()
        (module(x) - wanted).square().mean().backward()
        optimizer.step()


def as_emitted(state: LinearState, x: Tensor, bias: Tensor | None = None) -> Tensor:
    return nn.functional.linear(x, state.effective(), bias)


# ---------------------------------------------------------------- at first


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("masked", [True, False], ids=["sparse", "dense"])
def test_at_first_nothing_has_changed(form: Form, masked: bool) -> None:
    state = sparse(grid=form == "scales") if masked or form == "scales" else state_of(draw(OUT, WIDTH, seed=1))
    bias, x = draw(OUT, seed=2), inputs_of()
    before = nn.functional.linear(x, state.base(), bias)
    after = adapted(state, form, bias)(x)
    if form == "scalelora":  # B A is 1 up to rounding
        assert torch.allclose(after, before, rtol=0, atol=1e-5 * float(before.abs().max()))
    else:
        assert torch.equal(after, before)


@pytest.mark.parametrize("rank", [1, 2, 8])
def test_the_scale_of_weights_is_one_at_first(rank: int) -> None:
    module = adapted(sparse(), "scalelora", rank=rank)
    product = module.B.detach().double() @ module.A.detach().double()
    assert torch.allclose(product, torch.ones_like(product), rtol=0, atol=rank * 2**-23)


@pytest.mark.parametrize("form", ["fixed", "lora"])
def test_a_branch_that_is_there_counts_once(form: Form) -> None:
    """Whatever alpha is; and where it is trained, it is the branch that is trained."""
    state = sparse()
    state.low_rank = LowRank(draw(OUT, 3, seed=7), draw(3, WIDTH, seed=8))
    x = inputs_of()
    wanted = as_emitted(state, x)
    module = adapted(state, form)
    assert torch.allclose(module(x), wanted, rtol=1e-5, atol=1e-5)
    assert {name: tuple(p.shape) for name, p in module.trained()} == (
        {"up": (OUT, 3), "down": (3, WIDTH)} if form == "lora" else {}
    )
    if form == "lora":
        learn(module)
        before = module(x)
        assert not torch.allclose(before, wanted, rtol=1e-2)
        module.finish()
        assert torch.equal(state.low_rank.up, module.up)
        assert torch.equal(state.low_rank.down, module.down)
        assert torch.allclose(as_emitted(state, x), before, rtol=1e-5, atol=1e-5)


def test_a_branch_is_extended_and_its_own_ranks_stay() -> None:
    """At first nothing has changed; then the new ranks are beside the old ones, which are the same to the last bit."""
    state, x = sparse(), inputs_of()
    state.low_rank = LowRank(draw(OUT, 3, seed=7), draw(3, WIDTH, seed=8))
    old = state.low_rank
    wanted = as_emitted(state, x)
    module = AdaptedLinear(state, None, "lora", rank=RANK, alpha=ALPHA, seed=3, extend=True)
    assert torch.allclose(module(x), wanted, rtol=1e-5, atol=1e-5)
    assert {name: tuple(p.shape) for name, p in module.trained()} == {"B": (OUT, RANK), "A": (RANK, WIDTH)}
    assert not module.up.requires_grad
    learn(module)
    before = module(x)
    assert not torch.allclose(before, wanted, rtol=1e-2)
    module.finish()
    assert state.low_rank.rank == 3 + RANK
    assert torch.equal(state.low_rank.up[:, :3], old.up)
    assert torch.equal(state.low_rank.down[:3], old.down)
    assert torch.allclose(as_emitted(state, x), before, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["attn.c_attn", "mlp.c_proj"])
def test_it_stands_for_a_conv1d(name: str) -> None:
    """GPT-2 stores weights as (in, out); the state, and what replaces the module, have them as (out, in)."""
    old = tiny_model("gpt2", tied=True, gqa=False).get_submodule(f"transformer.h.0.{name}")
    weight = old.weight.detach().T.contiguous()
    state = LinearState(name, weight, weight, torch.float32)
    x = draw(2, 5, weight.shape[1], seed=9)  # (rows, length, in)
    for form in ("fixed", "lora", "masklora", "weights"):
        assert torch.allclose(adapted(state, form, old.bias)(x), old(x), rtol=1e-5, atol=1e-5)  # type: ignore[arg-type]


# ---------------------------------------------------------------- what learns


def test_how_many_parameters_learn() -> None:
    counts = {form: sum(p.numel() for _, p in adapted(sparse(grid=True), form).trained()) for form in FORMS}
    factors = RANK * (OUT + WIDTH)
    assert counts == dict.fromkeys(FACTORED, factors) | {"weights": OUT * WIDTH, "scales": OUT * 2, "fixed": 0}


@pytest.mark.parametrize("form", FORMS)
def test_nothing_else_has_a_gradient(form: Form) -> None:
    module = adapted(sparse(grid=form == "scales"), form, draw(OUT, seed=2))
    learning = {id(p) for _, p in module.trained()}
    assert all(p.requires_grad == (id(p) in learning) for p in module.parameters())


def test_gradients_pass_the_mask_by() -> None:
    """With G = ∂L/∂W: ``s (G ⊙ M) Aᵀ`` and ``s Bᵀ (G ⊙ M)`` for B and A of masklora, ``G ⊙ M`` for weights."""
    x, g = inputs_of(), draw(40, OUT, seed=10)  # L = Σ g ⊙ y
    state = sparse()
    assert state.mask is not None
    G = g.double().T @ x.double() * state.mask
    module = adapted(state, "masklora")
    with torch.no_grad():
        module.B.copy_(draw(OUT, RANK, seed=11))  # not 0, or A had no gradient
    (module(x) * g).sum().backward()
    s = ALPHA / RANK
    for found, wanted in (
        (module.B.grad, s * G @ module.A.detach().double().T),
        (module.A.grad, s * module.B.detach().double().T @ G),
    ):
        assert found is not None
        assert torch.allclose(found.double(), wanted, rtol=1e-4, atol=1e-4)
    module = adapted(state, "weights")
    (module(x) * g).sum().backward()
    assert module.free.grad is not None
    assert not module.free.grad[~state.mask].any()
    assert torch.allclose(module.free.grad.double(), G, rtol=1e-4, atol=1e-4)


def test_gradients_of_scales() -> None:
    """``∂L/∂δ_g = s_g Σ_j G_j (c_j − z)`` over the columns j of the group."""
    x, g = inputs_of(), draw(40, OUT, seed=10)
    state = sparse(grid=True, symmetric=False)
    assert state.grid is not None
    module = adapted(state, "scales")
    (module(x) * g).sum().backward()
    steps = state.grid.codes.double().view(OUT, 2, 8) - state.grid.zero.double().unsqueeze(-1)
    wanted = state.grid.scale.double() * ((g.double().T @ x.double()).view(OUT, 2, 8) * steps).sum(-1)
    assert module.delta.grad is not None
    assert torch.allclose(module.delta.grad.double(), wanted, rtol=1e-4, atol=1e-4)


def ratio_of_ranks(module: AdaptedLinear) -> float:
    """The second singular value of B A over the first."""
    values = torch.linalg.svdvals((module.B @ module.A).detach().double())
    return float(values[1] / values[0])


def test_all_ranks_of_scalelora_learn() -> None:
    """With the constant first values of the paper every rank has the same gradient, and B A stays of rank one."""
    usual = adapted(sparse(), "scalelora")
    constant = adapted(sparse(), "scalelora")
    with torch.no_grad():
        constant.A.fill_(1 / RANK**0.5)
    for module in (usual, constant):
        learn(module, steps=60)
        assert not torch.allclose(module.B @ module.A, torch.ones(OUT, WIDTH), atol=0.05)
    assert ratio_of_ranks(usual) > 1e-2
    assert ratio_of_ranks(constant) < 1e-6


def test_seeds() -> None:
    """The first values are those of the seed."""
    one, same, other = (AdaptedLinear(sparse(), None, "lora", rank=4, alpha=8.0, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(one.A, same.A)
    assert not torch.equal(one.A, other.A)


# ---------------------------------------------------------------- what is left


@pytest.mark.parametrize(
    ("form", "grid"),
    [("lora", False), ("lora", True), ("masklora", False), ("scalelora", False), ("weights", False)],
)
def test_merging_loses_nothing(form: Form, grid: bool) -> None:
    """The output stays, and the mask with its pattern; what is pruned is +0. A branch leaves weight and codes alone."""
    state, x, bias = sparse(grid=grid), inputs_of(), draw(OUT, seed=2)
    assert state.mask is not None
    mask, weight, codes = state.mask.clone(), state.weight.clone(), state.grid and state.grid.codes.clone()
    module = adapted(state, form, bias)
    first = module(x).detach()
    learn(module)
    before = module(x).detach()
    assert not torch.allclose(before, first, rtol=0.1)
    assert module.finish() is state
    assert torch.allclose(as_emitted(state, x, bias), before, rtol=1e-5, atol=1e-5)
    assert torch.equal(state.mask, mask)
    assert (state.base()[~mask].view(torch.int32) == 0).all()
    if form == "lora":
        assert torch.equal(state.base(), weight)
        assert codes is None or torch.equal(state.grid.codes, codes)  # type: ignore[union-attr]
        assert state.low_rank is not None
        assert state.low_rank.rank == RANK
        wanted = ALPHA / RANK * module.B.double() @ module.A.double()
        assert torch.allclose(state.low_rank.product().double(), wanted, rtol=1e-5, atol=1e-6)
    else:
        assert state.low_rank is None


def test_merging_without_a_mask_jumps_by_what_the_mask_cuts() -> None:
    """lora-prune: ``‖s (B A ⊙ ¬M) X‖``."""
    state, x = sparse(), inputs_of()
    assert state.mask is not None
    mask = state.mask.clone()
    module = adapted(state, "lora-prune")
    learn(module)
    before = module(x).detach().double()
    cut = ALPHA / RANK * (module.B.detach().double() @ module.A.detach().double()) * ~mask
    module.finish()
    jump = before - as_emitted(state, x).double()
    assert torch.allclose(jump, x.double() @ cut.T, rtol=0, atol=1e-5)
    assert float(jump.norm()) == pytest.approx(float((cut @ x.double().T).norm()), rel=1e-5)
    assert float(jump.norm()) > 0.1 * float(before.norm())
    assert torch.equal(state.mask, mask)
    assert (state.weight[~mask].view(torch.int32) == 0).all()


@pytest.mark.parametrize("form", ["lora", "lora-prune", "masklora", "scalelora", "weights", "scales"])
def test_it_is_settled(form: Form) -> None:
    """What is left is what a float16 file holds."""
    state = sparse(dtype=torch.float16, grid=form == "scales")
    module = adapted(state, form)
    learn(module)
    module.finish()
    kept = [state.weight] if state.low_rank is None else [state.weight, state.low_rank.up, state.low_rank.down]
    assert all(torch.equal(one, one.half().float()) for one in kept)
    if state.grid is not None:
        assert state.grid.scale.dtype == torch.float16
        assert torch.equal(state.weight, state.grid.dequantize(torch.float16))


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_scales_change_and_codes_do_not(symmetric: bool, dtype: torch.dtype) -> None:
    state = sparse(dtype=dtype, grid=True, symmetric=symmetric)
    grid, weight = state.grid, state.weight.clone()
    assert grid is not None
    assert state.mask is not None
    mask = state.mask.clone()
    adapted(state, "scales").finish()
    assert torch.equal(state.weight, weight)  # δ = 0
    module = adapted(state, "scales")
    learn(module)
    with torch.no_grad():
        module.delta[0, 0] = -3.0  # would make the scale negative
    before = module(inputs_of()).detach()
    module.finish()
    assert state.grid is not None
    assert torch.equal(state.grid.codes, grid.codes)
    assert torch.equal(state.grid.zero, grid.zero)
    assert torch.equal(state.mask, mask)
    assert not state.weight[~mask].any()
    assert (state.grid.scale > 0).all()
    assert not torch.equal(state.grid.scale, grid.scale)
    # Scale and product are rounded once each.
    loose = 1e-5 if dtype == torch.float32 else 2**-9
    assert torch.allclose(as_emitted(state, inputs_of()), before, rtol=0, atol=loose * float(before.abs().max()))
