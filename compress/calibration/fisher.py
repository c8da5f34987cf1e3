"""The diagonal of the empirical Fisher information: how much the loss would feel a change of each single weight.

``F = Σ_s (∂L_s / ∂W)²``, elementwise, over sequences s. ``L_s`` is the summed negative log-likelihood of a sequence's
own next tokens, that is −log p of the whole sequence: with the mean over tokens, as LQ-LoRA has it for sequences of one
length (Guo et al. 2023, arXiv 2311.12023), a short sequence would outweigh long ones. For equal lengths the two differ
by a constant factor. The square is taken of a whole sequence's gradient, so sequences run one at a time; and the model
runs in eval mode, because dropout would add the variance of its noise to every entry.
"""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch

from compress.errors import RunError

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from torch import Tensor, nn


def diagonal_fisher(model: nn.Module, ids: Tensor, mask: Tensor, names: Iterable[str]) -> dict[str, Tensor]:
    """F of each named parameter, float32.

    A gradient is squared, added and dropped as soon as the backward pass has made it: beside the sums, only one is
    ever held. The model's own state (mode, gradients, which parameters require one) is as before afterwards.

    Args:
        model: a causal language model, called as ``model(input_ids=…, use_cache=False)``, that returns `logits`. Its
            parameters should be float32: squares of float16 gradients underflow.
        ids: (sequences, length) int64.
        mask: (sequences, length) bool, True = a real token; the others are left out of the sequence.
        names: full names of parameters.

    Raises:
        RunError: a gradient is not finite.
        AttributeError: the model has no parameter of a name.
    """
    parameters = {name: model.get_parameter(name) for name in names}
    # Tied parameters are one, whose gradient holds all its uses.
    sums = {one: torch.zeros_like(one, dtype=torch.float32, requires_grad=False) for one in parameters.values()}
    with _accumulating(model, sums), torch.enable_grad():
        for sequence, real in zip(ids, mask, strict=True):
            tokens = sequence[real]  # (tokens,): without padding there is nothing to mask, on either side
            if len(tokens) < 2:
                continue
            logits = model(input_ids=tokens.unsqueeze(0), use_cache=False).logits[0, :-1]  # (tokens − 1, vocabulary)
            loss = torch.nn.functional.cross_entropy(logits.float(), tokens[1:], reduction="sum")
            loss.backward()  # type: ignore[no-untyped-call]
    for name, one in parameters.items():
        if not bool(torch.isfinite(sums[one]).all()):
            raise RunError(
                f"the Fisher information of {name} holds NaN or infinity",
                fix="the model overflows on this text; calibrate on another one",
            )
    return {name: sums[one] for name, one in parameters.items()}


@contextmanager
def _accumulating(model: nn.Module, sums: dict[nn.Parameter, Tensor]) -> Iterator[None]:
    """Have every backward pass add the squares of gradients to `sums`, and compute no other parameter's gradient."""
    training = {one: one.training for one in model.modules()}
    before = {one: (one.requires_grad, one.grad) for one in model.parameters()}
    model.eval()
    for one in model.parameters():
        one.requires_grad_(False)
    hooks = []
    for one, total in sums.items():
        one.requires_grad_(True)
        one.grad = None
        hooks.append(one.register_post_accumulate_grad_hook(_adding_to(total)))  # type: ignore[no-untyped-call]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
        for one, (required, gradient) in before.items():
            one.requires_grad_(required)
            one.grad = gradient
        for module, mode in training.items():
            module.training = mode


def _adding_to(total: Tensor) -> Any:
    def add(parameter: Tensor) -> None:
        assert parameter.grad is not None
        gradient = parameter.grad.float()
        total.addcmul_(gradient, gradient)
        parameter.grad = None

    return add
