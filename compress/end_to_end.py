"""Training of the whole model, as `perp` and `peqa` do it: the loss, the dense model beside it, and the processes.

Over the predicted real tokens of a batch, the loss is

    L = (1 − distill) · CE + distill · T² · KL(p_dense^T ‖ p^T) + hidden · mean_k ‖h_k − h_k^dense‖² / ‖h_k^dense‖²

with CE the cross-entropy, p^T the softmax of logits / T (Hinton et al. 2015, arXiv 1503.02531) and h_k the
outputs of the blocks. The dense model is a second one in memory where distill or hidden ask for it. Where several
processes share a batch, the last term is the mean of theirs, weighed by their tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from compress.distributed import Share
from compress.training import Training, Watcher, train

if TYPE_CHECKING:
    from compress.adapting import AdaptedLinear
    from compress.barrier import WholeModel
    from compress.calibration.tokens import TokenSet


@dataclass(frozen=True)
class Loss:
    """What a training minimizes: see the formula above."""

    distill: float = 0.0
    temperature: float = 1.0
    hidden: float = 0.0

    def value(self, model: WholeModel, teacher: nn.Module | None, ids: Tensor, mask: Tensor) -> Tensor:
        """The mean over predicted real tokens of samples (rows, length)."""
        device = model.device
        logits, states = model.logits(ids, hidden=self.hidden > 0)
        targets, real = ids[:, 1:].to(device), mask[:, 1:].to(device)  # padding is on the right
        some = bool(real.any())  # else the mean would be 0 / 0
        student = logits[:, :-1][real].float()
        total = torch.zeros((), device=device)
        if self.distill < 1:
            mean = nn.functional.cross_entropy(student, targets[real], reduction="mean" if some else "sum")
            total = total + (1 - self.distill) * mean
        if teacher is None:
            return total
        with torch.no_grad():
            dense, wanted = model.logits(ids, hidden=self.hidden > 0, of=teacher)
        if self.distill > 0:
            T = self.temperature
            p = (dense[:, :-1][real].float() / T).log_softmax(-1)
            q = (student / T).log_softmax(-1)
            mean = nn.functional.kl_div(q, p, reduction="batchmean" if some else "sum", log_target=True)
            total = total + self.distill * T * T * mean
        if self.hidden > 0:
            inside = mask.to(device)
            pairs = zip(states, wanted, strict=True)
            gaps = [(a[inside] - b[inside]).square().sum() / b[inside].square().sum() for a, b in pairs]
            total = total + self.hidden * torch.stack(gaps).mean()
        return total


def train_whole(
    model: WholeModel,
    modules: dict[str, AdaptedLinear],
    others: dict[str, nn.Parameter],
    settings: Training,
    loss: Loss,
    tokens: TokenSet,
    watcher: Watcher | None = None,
) -> tuple[int, dict[str, float]]:
    """Train what `modules` learn, and `others`, and settle the states of the modules.

    Args:
        model: in which the modules are in place.
        modules: by linear.
        others: parameters by full name.
        settings: of the loop.
        loss: to minimize.
        tokens: the samples.
        watcher: takes part in the training.

    Returns:
        how many numbers were trained, and those of `train`.

    Raises:
        RunError, SettingError: as `train`.
    """
    names = [f"{name}.{key}" for name, module in modules.items() for key, _ in module.trained()] + list(others)
    for name in names:
        model.module.get_parameter(name).requires_grad_(True)
    if settings.gradient_checkpointing:
        model.checkpoint_blocks()
    teacher = model.dense() if loss.distill or loss.hidden else None
    model.shard(teacher)
    parameters = {name: model.module.get_parameter(name) for name in names}
    ids, mask = tokens.ids, tokens.mask
    chosen, held = settings.split(len(ids))
    tokens.check_targets(chosen)
    if len(held):
        tokens.check_targets(held, "held-out sample")
    share = Share(model.world, lambda chosen: int(mask[chosen][:, 1:].sum()))

    def of(chosen: Tensor) -> Tensor:
        return loss.value(model, teacher, ids[chosen], mask[chosen])

    blame = lambda chosen: model.blame(ids[chosen])  # noqa: E731
    numbers = train(parameters, of, len(ids), settings, model.store, share, blame, watcher)
    for p in parameters.values():
        p.requires_grad_(False)
    model.finish(modules)
    model.changed |= set(others)
    return sum(p.numel() for p in parameters.values()), numbers
