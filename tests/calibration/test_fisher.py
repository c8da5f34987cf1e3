"""The diagonal Fisher information against per-sequence autograd and against a closed form, in float64."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

from compress.calibration.fisher import diagonal_fisher
from compress.errors import RunError
from tests.models import VOCABULARY, tiny_model
from tests.passes import draw


def tokens(sequences: int, length: int, *, seed: int, vocabulary: int = VOCABULARY) -> Tensor:
    return torch.randint(0, vocabulary, (sequences, length), generator=torch.Generator().manual_seed(seed))


class Softmax(nn.Module):
    """``p(next) = softmax(W x)`` with a fixed vector x for each token: the smallest model of which F is known."""

    def __init__(self, vocabulary: int, width: int) -> None:
        super().__init__()
        self.inputs = nn.Parameter(draw(vocabulary, width, seed=1))
        self.head = nn.Linear(width, vocabulary, bias=False)
        self.head.weight = nn.Parameter(draw(vocabulary, width, seed=2))

    def forward(self, input_ids: Tensor, use_cache: bool) -> SimpleNamespace:
        return SimpleNamespace(logits=self.head(self.inputs[input_ids]))


def by_hand(model: nn.Module, ids: Tensor, mask: Tensor, names: list[str]) -> dict[str, Tensor]:
    """Σ over sequences of the squared gradient of −log p(sequence), one call of autograd for each sequence."""
    sums = {name: torch.zeros(model.get_parameter(name).shape, dtype=torch.float64) for name in names}
    for sequence, real in zip(ids, mask, strict=True):
        kept = sequence[real].unsqueeze(0)
        if kept.shape[1] < 2:
            continue  # nothing is predicted
        log_p = model(input_ids=kept, use_cache=False).logits[0].double().log_softmax(-1)
        nll = -sum(log_p[place, kept[0, place + 1]] for place in range(kept.shape[1] - 1))
        assert isinstance(nll, Tensor)
        found = torch.autograd.grad(nll, [model.get_parameter(name) for name in names], allow_unused=True)
        for name, gradient in zip(names, found, strict=True):
            sums[name] += 0 if gradient is None else gradient.double().square()
    return sums


def close(ours: dict[str, Tensor], exact: dict[str, Tensor]) -> None:
    assert list(ours) == list(exact)
    for name, value in exact.items():
        assert ours[name].dtype == torch.float32
        torch.testing.assert_close(ours[name].double(), value, rtol=1e-3, atol=float(value.max()) * 1e-5)
        assert (ours[name] >= 0).all()


def test_of_one_layer_it_is_the_closed_form() -> None:
    """``∂L/∂W = Σ_t (p_t − y_t) x_tᵀ``."""
    model, ids = Softmax(11, 5), tokens(4, 9, seed=3, vocabulary=11)
    x, W = model.inputs.detach().double(), model.head.weight.detach().double()
    exact = torch.zeros(11, 5, dtype=torch.float64)
    for sequence in ids:
        gradient = torch.zeros(11, 5, dtype=torch.float64)
        for now, following in zip(sequence[:-1].tolist(), sequence[1:].tolist(), strict=True):
            scores = (W @ x[now]).exp()
            p = scores / scores.sum()
            gradient += torch.outer(p - torch.eye(11, dtype=torch.float64)[following], x[now])
        exact += gradient**2
    ours = diagonal_fisher(model, ids, torch.ones_like(ids, dtype=torch.bool), ["head.weight"])
    close(ours, {"head.weight": exact})


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2"])
@pytest.mark.parametrize("padded", [False, True])
def test_it_is_the_sum_of_squared_gradients_of_single_sequences(family: str, padded: bool) -> None:
    model = tiny_model(family, tied=True, gqa=True, blocks=2)
    names = [name for name, one in model.named_parameters() if one.ndim == 2 and ".0." in name]
    ids = tokens(5, 12, seed=4)
    mask = torch.ones_like(ids, dtype=torch.bool)
    if padded:
        for row, count in enumerate((12, 7, 2, 1, 0)):
            mask[row, count:] = False
    close(diagonal_fisher(model, ids, mask, names), by_hand(model, ids, mask, names))


def test_padding_does_not_count_whatever_it_holds_and_on_either_side() -> None:
    model, ids = tiny_model("llama", tied=True, gqa=True, blocks=1), tokens(1, 10, seed=5)
    name = "model.layers.0.mlp.up_proj.weight"
    plain = diagonal_fisher(model, ids, torch.ones_like(ids, dtype=torch.bool), [name])[name]
    for left, right in ((0, 6), (6, 0), (3, 3)):
        padding = [tokens(1, width, seed=6) for width in (left, right)]
        padded = torch.cat([padding[0], ids, padding[1]], dim=1)
        mask = torch.zeros_like(padded, dtype=torch.bool)
        mask[:, left : left + 10] = True
        assert torch.equal(diagonal_fisher(model, padded, mask, [name])[name], plain)


def test_sequences_add_up_and_their_order_hardly_matters() -> None:
    model, ids = tiny_model("llama", tied=True, gqa=True, blocks=1), tokens(6, 8, seed=7)
    mask, names = torch.ones_like(ids, dtype=torch.bool), ["model.layers.0.self_attn.q_proj.weight"]
    whole, first, rest, backwards = (
        diagonal_fisher(model, part, mask[: len(part)], names)[names[0]]
        for part in (ids, ids[:2], ids[2:], ids.flip(0))
    )
    torch.testing.assert_close(first + rest, whole)
    torch.testing.assert_close(backwards, whole)


def test_a_tied_parameter_has_the_gradient_of_all_its_uses() -> None:
    model, ids = tiny_model("llama", tied=True, gqa=True, blocks=1), tokens(2, 8, seed=8)
    mask, names = torch.ones_like(ids, dtype=torch.bool), ["model.embed_tokens.weight", "lm_head.weight"]
    assert model.get_parameter(names[0]) is model.get_parameter(names[1])
    ours = diagonal_fisher(model, ids, mask, names)
    assert torch.equal(ours[names[0]], ours[names[1]])
    close({names[0]: ours[names[0]]}, by_hand(model, ids, mask, names[:1]))


def test_one_gradient_is_held_at_a_time_and_none_of_other_parameters_is_made() -> None:
    model, ids = tiny_model("llama", tied=True, gqa=True, blocks=2), tokens(3, 8, seed=9)
    names = [name for name, one in model.named_parameters() if "proj" in name and ".0." in name]
    others = [name for name, _ in model.named_parameters() if name not in names]
    held: list[int] = []
    for name in names:
        model.get_parameter(name).register_post_accumulate_grad_hook(
            lambda one: held.append(sum(p.grad is not None for p in model.parameters()))
        )
    diagonal_fisher(model, ids, torch.ones_like(ids, dtype=torch.bool), names)
    assert held == [1] * (3 * len(names))
    assert all(model.get_parameter(name).grad is None for name in others)


def test_dropout_plays_no_part_and_the_model_is_left_as_it_was() -> None:
    model = tiny_model("gpt2", tied=True, gqa=True, blocks=1, resid_pdrop=0.5, attn_pdrop=0.5, embd_pdrop=0.5)
    ids, name = tokens(2, 8, seed=10), "transformer.h.0.mlp.c_fc.weight"
    mask = torch.ones_like(ids, dtype=torch.bool)
    calm = diagonal_fisher(model, ids, mask, [name])[name]
    model.train()
    model.transformer.ln_f.eval()
    frozen = model.get_parameter("transformer.wpe.weight").requires_grad_(False)
    parameter = model.get_parameter(name)
    parameter.grad = gradient = torch.ones_like(parameter)
    with torch.no_grad():  # as the pipeline runs
        assert torch.equal(diagonal_fisher(model, ids, mask, [name])[name], calm)
        assert not torch.is_grad_enabled()
    assert model.training
    assert model.transformer.h[0].mlp.training
    assert not model.transformer.ln_f.training
    assert parameter.grad is gradient
    assert not frozen.requires_grad
    assert all(one.requires_grad for one in model.parameters() if one is not frozen)
    assert not parameter._post_accumulate_grad_hooks


def test_a_model_that_overflows_is_told() -> None:
    model = Softmax(11, 5)
    with torch.no_grad():
        model.inputs[3] = torch.inf
    ids = torch.full((1, 4), 3)
    with pytest.raises(RunError, match=r"Fisher information of head\.weight holds NaN") as failure:
        diagonal_fisher(model, ids, torch.ones_like(ids, dtype=torch.bool), ["head.weight"])
    assert "another one" in str(failure.value)
    assert all(one.requires_grad and one.grad is None for one in model.parameters())


def test_an_unknown_name_is_refused() -> None:
    with pytest.raises(AttributeError, match="nothing"):
        diagonal_fisher(Softmax(5, 3), tokens(1, 4, seed=1), torch.ones(1, 4, dtype=torch.bool), ["head.nothing"])
