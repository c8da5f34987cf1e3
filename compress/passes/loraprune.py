"""LoRAPrune: low-rank training that says which heads and channels can go (Zhang et al. 2023, arXiv 2305.18403).

While B A learns beside a frozen W, with ``y = W x + s B A x``, one step of the factors would change the weight along

    Ĝ = ∂B A + B ∂A − ∂B ∂A = B A − (B − ∂B)(A − ∂A)

(equation 8 there), a stand-in for the gradient of W that needs the gradients of the factors only. The importance of an
entry is ``(Ĝ ⊙ (W + s B A))²`` (equation 6), that of a unit the sum over its rows and columns in all linears that it
goes through, and a moving average over the steps, ``Ī ← λ Ī + (1 − λ) I`` (equation 10), ranks the units of a block.
They are masked little by little, by a cubic schedule that ends at the target; in the end they are removed, and B A is
merged. Whenever units are masked, what reads them is refitted by least squares to the inputs that the training has had
so far, as `width` does it (``update = true``; the paper does not). Where blocks may differ (``heterogeneous = true``),
the units of all blocks are ranked together, by their shares of what the units of their block that are left have
(`compress.spread`).

Gradients are read as the backward leaves them, unclipped. A unit that was masked stays so: its gradient is zero.
"""

from __future__ import annotations

import math
from fractions import Fraction
from typing import TYPE_CHECKING, Any, Literal

import torch
from pydantic import Field, model_validator

from compress.calibration.moments import Moments, Statistics
from compress.distributed import like, whole
from compress.end_to_end import Loss, train_whole
from compress.passes.base import ModelPass, Note, SettingError
from compress.passes.structured import Narrowing
from compress.passes.width import refitted
from compress.spread import shares, spread
from compress.training import Training

if TYPE_CHECKING:
    from torch import Tensor, nn

    from compress.adapting import AdaptedLinear
    from compress.architecture import Architecture, Width
    from compress.barrier import WholeModel
    from compress.lock import Linear, Lock
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
    update: bool = Field(
        default=True, description="refit what reads the units by least squares whenever some are masked"
    )
    damping: float = Field(default=0.01, gt=0, description="λ over the mean diagonal of H, for update")
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

    def learned(self, linear: Linear) -> int:
        """Its factors."""
        return self.rank * (linear.out_features + linear.in_features)

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
        """Samples to train on, and one setting for the whole model."""
        Training.check_lock(self, lock, index)
        Narrowing.check_lock(self, lock, index)

    def share_masked(self, steps: int) -> float:
        """The fraction of the units to be removed that are masked after so many steps: cubic, exactly 1 at `end`."""
        start, end = (Fraction(str(fraction)) * self.steps for fraction in (self.start, self.end))  # as written
        first, last = math.floor(start), math.ceil(end)
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
            rivals = [
                Group(self, model, modules, block, width, sizes.at(width.name, block)) for block in range(lock.blocks)
            ]
            if width.name in after.different:
                contests.append(Contest(rivals, after.total(width.name), self.step(width.name)))
            else:
                contests += [Contest([group], after.at(width.name, group.block), 1) for group in rivals]
        masking = Masking(self, contests, model.tokens.mask)
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
        self,
        settings: LoRAPrune,
        model: WholeModel,
        modules: dict[str, AdaptedLinear],
        block: int,
        width: Width,
        units: int,
    ) -> None:
        """`units`: how many there are."""
        self.settings, self.world = settings, model.world
        prefix, config = model.lock.skeleton.prefix(block), model.lock.config
        self.block, self.width = block, width
        self.name, self.reader = f"{prefix}{width.name}", prefix + width.columns[0]
        reader = modules[self.reader]
        columns = width.unit_columns(units, reader.weight.shape[1])
        self.parts: list[tuple[AdaptedLinear, int, Tensor]] = [(reader, 1, columns)]
        for name in width.rows:
            module = modules[prefix + name]
            self.parts.append((module, 0, width.unit_rows(name, units, module.weight.shape[0], config)))
        device = model.device  # where the weight is built may not be where it is trained
        self.alive = torch.ones(units, dtype=torch.bool)
        self.average = torch.zeros(units)
        self.columns = columns
        self.mask = torch.ones(reader.weight.shape[1], device=device)
        self.moments = Moments(len(self.mask), Statistics.GRAM, device) if settings.update else None
        self.real: Tensor | None = None  # (rows, length), where the inputs that come next are to be seen
        reader.register_forward_pre_hook(self._mask)

    def _mask(self, _: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """A unit is gone when nobody reads it."""
        if self.moments and self.real is not None:
            rows = inputs[0].detach().flatten(0, -2)  # OPT's come flat
            self.moments.add(rows[self.real.flatten().to(rows.device)])
            self.real = None  # where blocks run again in the backward, they are not seen twice
        return (inputs[0] * self.mask.to(inputs[0].device, inputs[0].dtype), *inputs[1:])

    def see_importance(self) -> None:
        """Average it over one more step, whose gradients are there."""
        found = self.importance()
        self.average = self.settings.average * self.average + (1 - self.settings.average) * found

    def importance(self) -> Tensor:
        """(units,) of the step whose gradients are there."""
        total = torch.zeros(len(self.alive))
        for module, dim, units in self.parts:
            entries = importance_of(module).sum(1 - dim).cpu()  # per row, or per column
            found = entries[units].sum(1)
            total += found / found.norm().clamp_min(1e-30) if self.settings.normalize else found
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
            if self.moments:
                self._refit(self.moments)
            self.show()

    def _refit(self, moments: Moments) -> None:
        """Have the reader make of the units that stay what it made of those before; `mask` still shows these."""
        reader = self.parts[0][0]
        W = effective(reader) * self.mask
        moments = moments.reduced(self.world)
        kept = self.columns[self.alive].flatten()
        change = refitted(W, moments, kept, self.settings.damping) - W
        reader.weight.add_(like(change, reader.weight))

    def state(self) -> dict[str, Tensor]:
        """What has been found so far."""
        found = {"average": self.average, "alive": self.alive}
        if self.settings.update:
            found["weight"] = whole(self.parts[0][0].weight.detach())
        return found | (self.moments.reduced(self.world).state() if self.moments else {})

    def restore(self, state: dict[str, Tensor]) -> None:
        """The inverse."""
        self.average, self.alive = state["average"].clone(), state["alive"].clone()
        self.show()
        if self.settings.update:
            weight = self.parts[0][0].weight
            weight.copy_(like(state["weight"], weight))
        if "tokens" not in state:
            self.forget()
        elif self.moments and not self.world.rank:
            self.moments.restore(state)

    def forget(self) -> None:
        """Nothing will be masked any more."""
        self.moments = None

    def show(self) -> None:
        """Have the mask show what is alive."""
        dead = self.columns[~self.alive].flatten()
        self.mask.fill_(1.0)
        self.mask[dead.to(self.mask.device)] = 0.0


def effective(module: AdaptedLinear) -> Tensor:
    """W + s B A (out, in)."""
    return whole(module.weight.detach()) + module.factor * (whole(module.B.detach()) @ whole(module.A.detach()))


def importance_of(module: AdaptedLinear) -> Tensor:
    """``(Ĝ ⊙ (W + s B A))²`` (out, in), from the factors and their gradients."""
    B, A = whole(module.B.detach()), whole(module.A.detach())
    if module.B.grad is None or module.A.grad is None:  # nothing came through it
        return torch.zeros(B.shape[0], A.shape[1], device=B.device)
    dB, dA = whole(module.B.grad), whole(module.A.grad)
    direction = dB @ (A - dA) + B @ dA
    return direction.mul_(effective(module)).square_()


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

    def __init__(self, settings: LoRAPrune, contests: list[Contest], real: Tensor) -> None:
        """`contests`: all units that may go; `real`: (samples, length) where the samples have tokens."""
        self.settings, self.contests, self.real = settings, contests, real
        self.groups = [group for contest in contests for group in contest.groups]

    def expect(self, chosen: Tensor) -> None:
        """Have their inputs seen."""
        for group in self.groups:
            group.real = self.real[chosen]

    @torch.no_grad()
    def observe(self, step: int) -> None:
        """See the gradients of a step; what is masked now counts from the next."""
        share = self.settings.share_masked(step + 1)
        for contest in self.contests:
            if share < 1.0 or not contest.decided:
                for group in contest.groups:
                    group.see_importance()
                contest.mask(share)
        if share == 1.0:
            for group in self.groups:
                group.forget()

    def settled(self, steps: int) -> bool:
        """Once all are masked."""
        return self.settings.share_masked(steps) == 1.0

    def state(self) -> dict[str, Tensor]:
        """Averages and what is alive, refitted weights, and what they are refitted by."""
        found: dict[str, Tensor] = {}
        for group in self.groups:
            found |= {f"{group.name}:{key}": value for key, value in group.state().items()}
        return found

    def restore(self, tensors: dict[str, Tensor]) -> None:
        """The inverse."""
        for group in self.groups:
            mine = f"{group.name}:"
            group.restore({key.removeprefix(mine): t for key, t in tensors.items() if key.startswith(mine)})
