"""LoRAPrune: low-rank training that says which heads and channels can go (Zhang et al. 2023, arXiv 2305.18403).

While B A learns beside a frozen W, with ``y = W x + s B A x``, one step of the factors would change the weight along

    Ĝ = ∂B A + B ∂A − ∂B ∂A = B A − (B − ∂B)(A − ∂A)

(equation 8 there), a stand-in for the gradient of W that needs the gradients of the factors only. The importance of an
entry is ``(Ĝ ⊙ (W + s B A))²`` (equation 6), that of a unit the sum over its rows and columns in all linears that it
goes through, and a moving average over the steps, ``Ī ← λ Ī + (1 − λ) I`` (equation 10), ranks the units of a block.
They are masked little by little, by a cubic schedule that ends at the target; in the end they are removed, and B A is
merged. Where blocks may differ (``heterogeneous = true``), the units of all blocks are ranked together, by their shares
of what the units of their block that are left have (`compress.spread`).

Gradients are read as the backward leaves them, unclipped. A unit that was masked stays so: its gradient is zero.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, Literal

import torch
from pydantic import Field, model_validator

from compress.distributed import whole
from compress.end_to_end import Loss, train_whole
from compress.passes.base import ModelPass, Note, SettingError
from compress.passes.structured import Narrowing
from compress.spread import shares, spread
from compress.training import Training

if TYPE_CHECKING:
    from torch import Tensor, nn

    from compress.adapting import AdaptedLinear
    from compress.architecture import Architecture, Width
    from compress.barrier import WholeModel
    from compress.lock import Lock
    from compress.structure import Sizes


class LoRAPrune(Training, Narrowing, ModelPass):
    """Train low-rank factors, mask heads and MLP channels by what the factors' gradients say, then remove them."""

    rank: int = Field(default=8, ge=1, description="of the factors")
    alpha: float | None = Field(default=None, gt=0, description="the product counts alpha / rank; default: 2 · rank")
    initialize: Literal["principal", "zero"] = Field(
        default="principal", description="B A begins as the largest singular directions of W, or as 0"
    )
    average: float = Field(default=0.9, ge=0, lt=1, description="λ of the moving average of importance")
    prune_every: int = Field(default=10, ge=1, description="steps between changes of the masks")
    start: float = Field(default=0.1, ge=0, lt=1, description="fraction of the steps before the first unit is masked")
    end: float = Field(default=0.3, gt=0, le=1, description="fraction of the steps after which all of them are")
    normalize: bool = Field(default=True, description="weigh the linears of a unit alike in its importance")
    distill: float = Field(default=0.0, ge=0, le=1, description="share of the loss that compares with the dense model")
    temperature: float = Field(default=1.0, gt=0, description="of that comparison")

    @model_validator(mode="after")
    def _has_a_schedule(self) -> LoRAPrune:
        if not (self.heads or self.channels):
            raise SettingError("nothing is to be removed", "give channels or heads, such as channels = 0.25")
        if self.start >= self.end:
            problem = f"pruning starts at {self.start:g} of the steps and ends at {self.end:g}"
            raise SettingError(problem, "start < end", ("start",))
        return self

    def learns(self) -> bool:
        """It does."""
        return True

    def left(self, sizes: Sizes, architecture: Architecture, config: Any) -> Sizes:
        """Fewer heads and channels."""
        after = self.narrowed(sizes, architecture, config)
        self.check_heads(sizes, after, architecture, config)
        return after

    def check_shape(self, out_features: int, in_features: int) -> None:
        """The factors are smaller than the weight."""
        most = min(out_features, in_features)
        if self.rank > most:
            problem = f"rank {self.rank} is above {most}, the smaller side of a {out_features} × {in_features} linear"
            raise SettingError(problem, f"rank = {most} or less")

    def check_lock(self, lock: Lock, index: int) -> None:
        """Samples to train on, and all blocks alike."""
        Training.check_lock(self, lock, index)
        Narrowing.check_lock(self, lock, index)

    def share_masked(self, steps: int) -> float:
        """The fraction of the units to be removed that are masked after so many steps: cubic, exactly 1 at `end`."""
        first, last = math.floor(self.start * self.steps), math.ceil(self.end * self.steps)
        if steps >= last:
            return 1.0
        steps -= (steps - first) % self.prune_every
        return 1.0 - (1.0 - max(0.0, (steps - first) / (last - first))) ** 3

    def apply_model(self, model: WholeModel) -> dict[str, Note]:
        """Train, mask, merge; which units are left goes into `model.found`."""
        alpha = 2.0 * self.rank if self.alpha is None else self.alpha
        modules = model.adapt("lora-merge", rank=self.rank, alpha=alpha, seed=self.seed)
        if self.initialize == "principal":
            for module in modules.values():
                begin_principal(module, self.seed)
        lock = model.lock
        sizes = lock.sizes
        after = self.left(sizes, lock.architecture, lock.config)
        contests = []
        for width in lock.architecture.widths:
            if after.total(width.name) == sizes.total(width.name):
                continue
            rivals = [Group(model, modules, block, width, sizes.at(width.name, block)) for block in range(lock.blocks)]
            if width.name in after.different:
                contests.append(Contest(rivals, after.total(width.name), self.step(width.name)))
            else:
                contests += [Contest([group], after.at(width.name, group.block), 1) for group in rivals]
        masking = Masking(self, contests)
        trained, numbers = train_whole(
            model, modules, {}, self, Loss(self.distill, self.temperature), model.tokens, masking
        )
        detail = f"{trained:,} trained, loss {numbers['first']:.4f} to {numbers['best']:.4f}"
        notes: dict[str, Note] = {name: {"detail": detail} for name in modules}
        for group in masking.groups:
            kept = group.alive.nonzero().flatten().cpu()
            model.found.setdefault(group.block, {})[f"{group.width.name}:kept"] = kept
            state = model.states[group.reader]
            state.weight = state.weight * group.mask.to(state.weight)
            notes[group.reader] = {"detail": f"{len(kept)} of {len(group.alive)} {group.width.name}; {detail}"}
        return notes


@torch.no_grad()
def begin_principal(module: AdaptedLinear, seed: int) -> None:
    """Have s B A be the best approximation of W at its rank, and the fixed weight the rest (PiSSA, arXiv 2404.02948).

    From B = 0 the first steps see the gradient through a random projection of the inputs, which tells little of the
    columns of W; from here they see it along the directions that W has.
    """
    rank = module.B.shape[1]
    with torch.random.fork_rng(devices=[module.weight.device] if module.weight.is_cuda else []):
        torch.manual_seed(seed)
        U, S, V = torch.svd_lowrank(module.weight, q=min(rank + 8, *module.weight.shape), niter=4)
    root = (S[:rank] / module.factor).sqrt()
    module.B.copy_(U[:, :rank] * root)
    module.A.copy_((V[:, :rank] * root).T)
    module.weight.sub_(module.factor * (module.B @ module.A))


class Group:
    """The units of one width of one block: which are alive, and how important they have been."""

    def __init__(
        self, model: WholeModel, modules: dict[str, AdaptedLinear], block: int, width: Width, units: int
    ) -> None:
        """`units`: how many there are."""
        prefix, config = model.lock.skeleton.prefix(block), model.lock.config
        self.block, self.width = block, width
        self.name, self.reader = f"{prefix}{width.name}", prefix + width.columns[0]
        reader = modules[self.reader]
        columns = width.unit_columns(units, reader.weight.shape[1])
        self.parts: list[tuple[AdaptedLinear, int, Tensor]] = [(reader, 1, columns)]
        for name in width.rows:
            module = modules[prefix + name]
            self.parts.append((module, 0, width.unit_rows(name, units, module.weight.shape[0], config)))
        device = reader.weight.device
        self.alive = torch.ones(units, dtype=torch.bool)
        self.average = torch.zeros(units)
        self.columns = columns
        self.mask = torch.ones(reader.weight.shape[1], device=device)
        reader.register_forward_pre_hook(self._mask)

    def _mask(self, _: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """A unit is gone when nobody reads it."""
        return (inputs[0] * self.mask.to(inputs[0].device, inputs[0].dtype), *inputs[1:])

    def importance(self, *, normalize: bool) -> Tensor:
        """(units,) of the step whose gradients are there."""
        total = torch.zeros(len(self.alive))
        for module, dim, units in self.parts:
            entries = importance_of(module).sum(1 - dim).cpu()  # per row, or per column
            found = entries[units].sum(1)
            total += found / found.norm().clamp_min(1e-30) if normalize else found
        return total

    def comparable(self) -> Tensor:
        """(units,) averages as other blocks have them; of what is masked, none."""
        scores = torch.full((len(self.alive),), -torch.inf, dtype=torch.float64)
        scores[self.alive] = shares(self.average[self.alive])
        return scores

    def drop(self, count: int) -> None:
        """Have `count` units masked, the least important first; those that are masked stay so."""
        more = count - int((~self.alive).sum())
        if more > 0:
            order = torch.where(self.alive, self.average, torch.inf).argsort(stable=True)
            self.alive[order[:more]] = False
            self.show()

    def show(self) -> None:
        """Have the mask show what is alive."""
        dead = self.columns[~self.alive].flatten()
        self.mask.fill_(1.0)
        self.mask[dead.to(self.mask.device)] = 0.0


def importance_of(module: AdaptedLinear) -> Tensor:
    """``(Ĝ ⊙ (W + s B A))²`` (out, in), from the factors and their gradients."""
    B, A = whole(module.B.detach()), whole(module.A.detach())
    if module.B.grad is None or module.A.grad is None:  # nothing came through it
        return torch.zeros(B.shape[0], A.shape[1], device=B.device)
    dB, dA = whole(module.B.grad), whole(module.A.grad)
    direction = dB @ (A - dA) + B @ dA
    weight = whole(module.weight.detach()) + module.factor * (B @ A)
    return direction.mul_(weight).square_()


class Contest:
    """Units of which a number is to stay: those of one block, or of all blocks together."""

    def __init__(self, groups: list[Group], left: int, step: int) -> None:
        """`left` units of all `groups` are to stay, in each a multiple of `step`."""
        self.groups, self.left, self.step = groups, left, step

    @property
    def decided(self) -> bool:
        """Whether no more than these are left."""
        return sum(int(group.alive.sum()) for group in self.groups) <= self.left

    def mask(self, share: float) -> None:
        """Have a share of those that are to go masked, the least important first."""
        if not share:
            return
        most = sum(len(group.alive) // self.step for group in self.groups)
        left = most - round(share * (most - self.left // self.step))
        counts = spread([group.comparable() for group in self.groups], left * self.step, self.step)
        for group, count in zip(self.groups, counts, strict=True):
            group.drop(len(group.alive) - count)


class Masking:
    """Takes part in the training: averages importance after each backward, and masks by schedule."""

    def __init__(self, settings: LoRAPrune, contests: list[Contest]) -> None:
        """`contests`: all units that may go."""
        self.settings, self.contests = settings, contests
        self.groups = [group for contest in contests for group in contest.groups]

    @torch.no_grad()
    def observe(self, step: int) -> None:
        """See the gradients of a step; what is masked now counts from the next."""
        one = self.settings
        share = one.share_masked(step + 1)
        for contest in self.contests:
            if share == 1.0 and contest.decided:
                continue
            for group in contest.groups:
                found = group.importance(normalize=one.normalize)
                group.average = one.average * group.average + (1 - one.average) * found
            contest.mask(share)

    def settled(self, steps: int) -> bool:
        """Once all are masked."""
        return self.settings.share_masked(steps) == 1.0

    def state(self) -> dict[str, Tensor]:
        """Averages and what is alive."""
        found: dict[str, Tensor] = {}
        for group in self.groups:
            found |= {f"{group.name}:average": group.average, f"{group.name}:alive": group.alive}
        return found

    def restore(self, tensors: dict[str, Tensor]) -> None:
        """The inverse."""
        for group in self.groups:
            group.average = tensors[f"{group.name}:average"].clone()
            group.alive = tensors[f"{group.name}:alive"].clone()
            group.show()
