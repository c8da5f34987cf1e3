"""The training loop of every pass that learns: AdamW, deterministic by step, resumable with the same bytes.

What is trained is a dictionary of float32 parameters; what they mean is the pass's business. Batch s of a run is a
function of seed and s alone, and all that a step changes, parameters, moments of AdamW and the record of the best ones,
is what `Store` keeps, so a run that was stopped goes on as if it had not been.
"""

from __future__ import annotations

import math
from contextlib import AbstractContextManager, nullcontext
from decimal import Decimal
from typing import TYPE_CHECKING, Literal, Protocol

import torch
from pydantic import Field

from compress.distributed import Share, like, local, whole
from compress.errors import RunError, SettingError
from compress.settings import Settings

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor, nn

    from compress.lock import Linear, Lock


class Training(Settings):
    """Fields common to passes that train."""

    steps: int = Field(default=200, ge=1, description="optimizer steps")
    batch_size: int = Field(default=8, ge=1, description="samples per forward")
    accumulation: int = Field(default=1, ge=1, description="forwards per step")
    learning_rate: float = Field(default=1e-3, gt=0, description="the peak")
    warmup: float = Field(default=0.1, ge=0, lt=1, description="fraction of the steps with a rising learning rate")
    schedule: Literal["linear", "cosine", "constant"] = Field(default="linear", description="decay after the warm-up")
    weight_decay: float = Field(default=0.0, ge=0, description="of AdamW")
    clip_norm: float = Field(default=1.0, gt=0, description="largest norm of all gradients together")
    precision: Literal["float32", "bfloat16"] = Field(
        default="float32", description="bfloat16: automatic mixed precision"
    )
    gradient_checkpointing: bool = Field(default=False, description="run blocks again instead of keeping activations")
    seed: int = Field(default=0, ge=0, description="order of samples, and first values of what starts at random")
    holdout: float = Field(default=0.1, ge=0, lt=1, description="fraction of the samples to watch, not to train on")
    evaluate_every: int = Field(default=25, ge=1, description="steps between looks at the held-out samples")
    patience: int = Field(default=4, ge=1, description="looks without a gain after which training stops")

    def learned(self, linear: Linear) -> int:
        """How many numbers of a linear it trains, at most: all weights, unless a pass knows better."""
        return linear.weights

    def rate(self, step: int) -> float:
        """The learning rate of a step, from 0."""
        rising = _share(self.warmup, self.steps)
        if step < rising:
            return self.learning_rate * (step + 1) / rising
        left = (self.steps - step) / max(1, self.steps - rising)  # 1 … 1/steps
        if self.schedule == "cosine":
            return self.learning_rate * 0.5 * (1 - math.cos(math.pi * left))
        return self.learning_rate * (left if self.schedule == "linear" else 1.0)

    def check_lock(self, lock: Lock, index: int) -> None:
        """Some samples must be left to train on."""
        if lock.plan.calibration is not None:
            self.split(lock.plan.calibration.samples)

    def split(self, samples: int) -> tuple[Tensor, Tensor]:
        """Indices of the samples to train on and of those held out. Raises SettingError when nothing is left."""
        order = torch.randperm(samples, generator=torch.Generator().manual_seed(self.seed))
        held = _share(self.holdout, samples)
        if samples - held < 1:
            problem = f"{samples} calibration samples leave none to train on after holdout = {self.holdout}"
            raise SettingError(problem, "calibrate on more samples, or hold out fewer", ("holdout",))
        return order[held:].sort().values, order[:held].sort().values

    def batch(self, train: Tensor, number: int) -> Tensor:
        """Indices of the samples of a forward, by its number in the run: shuffled anew in every epoch."""
        size = min(self.batch_size, len(train))
        per_epoch = len(train) // size
        epoch, place = divmod(number, per_epoch)
        order = torch.randperm(len(train), generator=torch.Generator().manual_seed(self.seed + 1 + epoch))
        return train[order[place * size : (place + 1) * size]]


def _share(fraction: float, total: int) -> int:
    """ceil(fraction · total), exact for the decimal that was written (0.07 of 100 is 7, not 8)."""
    return math.ceil(Decimal(str(fraction)) * total)


class Store(Protocol):
    """Keeps the state of a training between steps."""

    def load(self) -> tuple[dict[str, Tensor], dict[str, float]] | None:
        """What was saved last."""

    def save(self, tensors: dict[str, Tensor], numbers: dict[str, float]) -> None:
        """Replace what was saved."""

    def report(self, step: int, steps: int, loss: float, held_out: float | None) -> None:
        """Show progress."""


class Watcher(Protocol):
    """Takes part in a training: it sees the gradients of each step, and may change what is trained."""

    def expect(self, chosen: Tensor) -> None:
        """Before a forward that is trained on: of these samples, by their indices."""

    def observe(self, step: int) -> None:
        """After the backward of a step (from 0), before its gradients are clipped."""

    def settled(self, steps: int) -> bool:
        """Whether, after so many steps, it changes nothing more: only then losses can be compared."""

    def state(self) -> dict[str, Tensor]:
        """What it must find again when the training is resumed."""

    def restore(self, tensors: dict[str, Tensor]) -> None:
        """The inverse of `state`."""


def train(
    parameters: dict[str, nn.Parameter],
    loss: Callable[[Tensor], Tensor],
    samples: int,
    settings: Training,
    store: Store,
    share: Share | None = None,
    blame: Callable[[Tensor], str | None] | None = None,
    watcher: Watcher | None = None,
) -> dict[str, float]:
    """Train `parameters` in place; at the end they have the values that were best on the held-out samples.

    Args:
        parameters: float32, by name.
        loss: the mean loss over samples, by their indices; over what, `share` counts.
        samples: how many there are.
        settings: of the loop.
        store: keeps the state every `evaluate_every` steps.
        share: what of each batch this process takes, where there are several.
        blame: the first layer whose output is not finite on samples, by their indices.
        watcher: takes part; until it has settled, no values are the best and training does not stop early.

    Returns:
        numbers for the ledger: steps, first and best held-out loss (or training loss without held-out samples).

    Raises:
        RunError: a loss or a gradient is not finite; the last good state is kept.
        SettingError: nothing is left to train on.
    """
    share = share or Share()
    chosen, held = settings.split(samples)
    optimizer = torch.optim.AdamW(
        parameters.values(), lr=settings.learning_rate, weight_decay=settings.weight_decay, foreach=False
    )
    best = {name: p.detach().clone() for name, p in parameters.items()}
    numbers = {"step": 0.0, "first": math.nan, "best": math.inf, "waited": 0.0}
    found = store.load()
    if found:
        numbers = dict(found[1])  # the journal's own stays
        _restore(parameters, optimizer, best, found[0])
        if watcher:
            watcher.restore(found[0])
    else:
        numbers["first"] = numbers["best"] = _held_out(loss, held, settings, 0, share) if len(held) else math.inf
        if watcher and not watcher.settled(0):
            numbers["best"] = math.inf
    step = int(numbers["step"])
    running = math.nan
    while step < settings.steps and numbers["waited"] < settings.patience:
        running = _step(parameters, optimizer, loss, chosen, settings, step, share, blame, watcher)
        if not math.isfinite(numbers["first"]):
            numbers["first"] = running
        step += 1
        if step % settings.evaluate_every == 0 or step == settings.steps:
            watched = _held_out(loss, held, settings, step, share) if len(held) else running
            comparable = watcher is None or watcher.settled(step)
            if watched < numbers["best"] or not len(held) or not comparable:
                numbers["best"], numbers["waited"] = watched if comparable else math.inf, 0.0
                for name, p in parameters.items():
                    best[name].copy_(p.detach())
            else:
                numbers["waited"] += 1
            numbers["step"] = float(step)
            store.save(_state(parameters, optimizer, best) | (watcher.state() if watcher else {}), numbers)
            store.report(step, settings.steps, running, watched if len(held) else None)
    with torch.no_grad():
        for name, p in parameters.items():
            p.copy_(best[name])
    return numbers


def _step(
    parameters: dict[str, nn.Parameter],
    optimizer: torch.optim.AdamW,
    loss: Callable[[Tensor], Tensor],
    chosen: Tensor,
    settings: Training,
    step: int,
    share: Share,
    blame: Callable[[Tensor], str | None] | None,
    watcher: Watcher | None,
) -> float:
    """One step of the optimizer; returns the mean loss."""
    for group in optimizer.param_groups:
        group["lr"] = settings.rate(step)
    optimizer.zero_grad(set_to_none=True)
    total = 0.0
    batches = [settings.batch(chosen, step * settings.accumulation + part) for part in range(settings.accumulation)]
    counts = [share.count(batch) for batch in batches]
    for batch, count in zip(batches, counts, strict=True):
        indices, weight = share.part(batch)
        if watcher and weight:
            watcher.expect(indices)
        with torch.enable_grad(), _precision(settings, next(iter(parameters.values())).device):
            value = loss(indices) * (weight * count / max(sum(counts), 1e-30))
        mean = share.mean(float(value.detach()))
        if not math.isfinite(mean):
            raise _not_finite(f"the loss is {mean:g}", step, blame(indices) if blame else None)
        value.backward()  # type: ignore[no-untyped-call]
        total += mean
    gradients = {name: local(p.grad) for name, p in parameters.items() if p.grad is not None}
    share.reduce(gradients.values())
    wrong = next((name for name, one in gradients.items() if not bool(torch.isfinite(one).all())), None)
    if share.mean(float(wrong is not None)):
        raise _not_finite("a gradient is not finite", step, wrong or "in another process")
    if watcher:
        watcher.observe(step)
    torch.nn.utils.clip_grad_norm_(parameters.values(), settings.clip_norm, foreach=False)
    optimizer.step()
    return total


def _precision(settings: Training, device: torch.device) -> AbstractContextManager[object]:
    if settings.precision == "bfloat16":
        return torch.autocast(device.type, dtype=torch.bfloat16)
    return nullcontext()


def _held_out(loss: Callable[[Tensor], Tensor], held: Tensor, settings: Training, step: int, share: Share) -> float:
    """The mean loss over the held-out samples, after so many steps."""
    total, counted = 0.0, 0.0
    with torch.no_grad():
        for some in torch.split(held, settings.batch_size):
            mine, weight = share.part(some)
            count = share.count(some)
            total += share.mean(float(loss(mine)) * weight) * count
            counted += count
    mean = total / max(counted, 1e-30)
    if not math.isfinite(mean) and step:
        raise _not_finite(f"the held-out loss is {mean:g}", step - 1, None)
    if not math.isfinite(mean):
        raise RunError(
            f"the held-out loss is {mean:g} before the first step",
            fix="the model overflows on this text, or a pass before broke it; look at the ledger",
        )
    return mean


def _state(
    parameters: dict[str, nn.Parameter], optimizer: torch.optim.AdamW, best: dict[str, Tensor]
) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    for name, p in parameters.items():
        tensors |= {f"{name}:now": whole(p.detach()), f"{name}:best": whole(best[name])}
        for key, value in optimizer.state[p].items():
            tensors[f"{name}:{key}"] = whole(torch.as_tensor(value))
    return tensors


def _restore(
    parameters: dict[str, nn.Parameter],
    optimizer: torch.optim.AdamW,
    best: dict[str, Tensor],
    tensors: dict[str, Tensor],
) -> None:
    with torch.no_grad():
        for name, p in parameters.items():
            p.copy_(like(tensors[f"{name}:now"], p))
            best[name].copy_(like(tensors[f"{name}:best"], p))
            if f"{name}:step" in tensors:
                moments = {key: like(tensors[f"{name}:{key}"].clone(), p) for key in ("exp_avg", "exp_avg_sq")}
                optimizer.state[p] = {"step": tensors[f"{name}:step"].clone(), **moments}


def _not_finite(what: str, step: int, name: str | None) -> RunError:
    where = f"step {step + 1}" + (f", {name}" if name else "")
    return RunError(
        f"training diverged: {what}",
        where=where,
        fix="lower learning_rate or clip_norm, or lengthen warmup, and start the pass over with --restart",
    )
