"""The training loop against AdamW written out, its schedules by formula, and what it does when training goes wrong."""

from __future__ import annotations

import math
from itertools import chain
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import nn

from compress.errors import RunError
from compress.passes.base import SettingError
from compress.training import Training, train
from tests.passes import draw

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

TARGETS = draw(10, 6, seed=1)  # of the samples


class Kept:
    """A store in memory; can die after some saves."""

    def __init__(self, dies_after: int | None = None) -> None:
        self.states: list[tuple[dict[str, Tensor], dict[str, float]]] = []
        self.looks: list[tuple[int, float, float | None]] = []
        self.dies_after = dies_after

    def load(self) -> tuple[dict[str, Tensor], dict[str, float]] | None:
        return self.states[-1] if self.states else None

    def save(self, tensors: dict[str, Tensor], numbers: dict[str, float]) -> None:
        self.states.append(({name: tensor.clone() for name, tensor in tensors.items()}, dict(numbers)))
        if len(self.states) == self.dies_after:
            raise KeyboardInterrupt

    def report(self, step: int, steps: int, loss: float, held_out: float | None) -> None:
        self.looks.append((step, loss, held_out))


def parameters_of(start: float = 0.0) -> dict[str, nn.Parameter]:
    return {"w": nn.Parameter(torch.full((6,), start)), "other": nn.Parameter(torch.full((2,), start + 1))}


def squares(parameters: dict[str, nn.Parameter]) -> Callable[[Tensor], Tensor]:
    """The mean over samples i of ``½ ‖w − t_i‖²``, plus ``½ ‖other‖²``."""

    def loss(chosen: Tensor) -> Tensor:
        gaps = (parameters["w"] - TARGETS[chosen]).square().sum(1) / 2
        return gaps.mean() + parameters["other"].square().sum() / 2

    return loss


def run(store: Kept | None = None, **settings: Any) -> tuple[dict[str, nn.Parameter], dict[str, float], Kept]:
    parameters, store = parameters_of(), store or Kept()
    with torch.no_grad():  # as the pipeline calls it
        numbers = train(parameters, squares(parameters), len(TARGETS), Training(**settings), store)
    return parameters, numbers, store


# ---------------------------------------------------------------- schedules


def test_rates() -> None:
    """Warm-up to the peak in ceil(w · steps) steps; then down to almost 0 in the last one, or not at all."""
    for schedule in ("linear", "cosine", "constant"):
        one = Training(steps=50, warmup=0.2, learning_rate=3.0, schedule=schedule)
        for step in range(50):
            left = (50 - step) / 40
            wanted = {
                "linear": 3.0 * left,
                "cosine": 3.0 * (1 + math.cos(math.pi * (1 - left))) / 2,
                "constant": 3.0,
            }[schedule]
            assert one.rate(step) == pytest.approx(3.0 * (step + 1) / 10 if step < 10 else wanted)
    without = Training(steps=4, warmup=0, learning_rate=1.0)
    assert [without.rate(step) for step in range(4)] == [1.0, 0.75, 0.5, 0.25]
    assert Training(steps=1, warmup=0.9, learning_rate=1.0).rate(0) == 1.0


def test_fractions_are_those_that_are_written() -> None:
    """0.07 of 100 is 7, though 0.07 * 100 is a little more."""
    assert 0.07 * 100 > 7
    chosen, held = Training(holdout=0.07).split(100)
    assert (len(chosen), len(held)) == (93, 7)
    one = Training(steps=100, warmup=0.07, learning_rate=1.0)
    assert [one.rate(step) for step in (6, 7)] == [1.0, 1.0]
    assert one.rate(8) < 1.0


# ---------------------------------------------------------------- batches


def test_held_out_samples() -> None:
    for samples, holdout, held in ((10, 0.1, 1), (10, 0.25, 3), (10, 0.0, 0), (2, 0.5, 1), (100, 0.001, 1)):
        chosen, watched = Training(holdout=holdout).split(samples)
        assert len(watched) == held
        assert sorted([*chosen.tolist(), *watched.tolist()]) == list(range(samples))
    again, other = Training(holdout=0.3).split(50)[1], Training(holdout=0.3, seed=1).split(50)[1]
    assert torch.equal(Training(holdout=0.3).split(50)[1], again)
    assert not torch.equal(again, other)


@pytest.mark.parametrize(("samples", "holdout"), [(1, 0.1), (2, 0.9), (1, 0.001)])
def test_nothing_left_to_train_on(samples: int, holdout: float) -> None:
    with pytest.raises(SettingError, match="leave none to train on") as caught:
        Training(holdout=holdout).split(samples)
    assert str(samples) in str(caught.value)
    assert caught.value.location == ("holdout",)
    assert "more samples" in caught.value.fix


def test_batches_are_a_function_of_seed_and_number() -> None:
    """Every epoch is a permutation, another one each time; asked for in any order, a batch is the same."""
    one = Training(batch_size=3, seed=5)
    train_on = torch.arange(100, 112)
    batches = [one.batch(train_on, number).tolist() for number in range(12)]
    for epoch in range(3):
        assert sorted(chain.from_iterable(batches[4 * epoch : 4 * epoch + 4])) == train_on.tolist()
    assert batches[0:4] != batches[4:8] != batches[8:12]
    torch.manual_seed(99)
    assert [one.batch(train_on, number).tolist() for number in reversed(range(12))] == batches[::-1]
    assert [Training(batch_size=3, seed=6).batch(train_on, number).tolist() for number in range(12)] != batches


def test_a_batch_larger_than_all_samples_is_all_of_them() -> None:
    one = Training(batch_size=64)
    assert all(sorted(one.batch(torch.arange(5), number).tolist()) == [0, 1, 2, 3, 4] for number in range(3))


# ---------------------------------------------------------------- steps


def adamw(settings: Training, steps: int) -> dict[str, Tensor]:
    """Loshchilov and Hutter, algorithm 2, on the gradients ``w − mean t`` and ``other``, in float64, with clipping."""
    p = {name: one.detach().double() for name, one in parameters_of().items()}
    m, v = ({name: torch.zeros_like(one) for name, one in p.items()} for _ in range(2))
    chosen, _ = settings.split(len(TARGETS))
    for step in range(steps):
        ids = torch.cat(
            [
                settings.batch(chosen, number)
                for number in range(step * settings.accumulation, (step + 1) * settings.accumulation)
            ]
        )
        g = {"w": p["w"] - TARGETS[ids].double().mean(0), "other": p["other"]}
        size = math.sqrt(sum(float(one.square().sum()) for one in g.values()))
        rate = settings.rate(step)
        for name in p:
            clipped = g[name] * min(1.0, settings.clip_norm / (size + 1e-6))
            m[name] = 0.9 * m[name] + 0.1 * clipped
            v[name] = 0.999 * v[name] + 0.001 * clipped.square()
            corrected = m[name] / (1 - 0.9 ** (step + 1)), v[name] / (1 - 0.999 ** (step + 1))
            p[name] = p[name] * (1 - rate * settings.weight_decay) - rate * corrected[0] / (corrected[1].sqrt() + 1e-8)
    return p


@pytest.mark.parametrize(
    "settings",
    [
        {"steps": 40, "batch_size": 4},
        {"steps": 40, "batch_size": 3, "weight_decay": 0.3, "schedule": "cosine"},
        {"steps": 25, "batch_size": 2, "accumulation": 3, "schedule": "constant"},
        {"steps": 25, "batch_size": 4, "clip_norm": 0.05, "weight_decay": 0.1},
    ],
)
def test_steps_are_those_of_adamw(settings: dict[str, Any]) -> None:
    every = {"holdout": 0.0, "learning_rate": 0.05, "evaluate_every": 100, **settings}
    found, _, _ = run(**every)
    wanted = adamw(Training(**every), settings["steps"])
    for name, p in found.items():
        assert torch.allclose(p.detach().double(), wanted[name], rtol=1e-4, atol=1e-5), name


def test_accumulation_is_a_larger_batch() -> None:
    """Five forwards of two samples are one of ten: all of them, in whatever order."""
    every = {"steps": 30, "holdout": 0.0, "learning_rate": 0.05}
    some, _, _ = run(batch_size=2, accumulation=5, **every)
    whole, _, _ = run(batch_size=10, **every)
    assert torch.allclose(some["w"], whole["w"], rtol=1e-4, atol=1e-5)


def test_gradients_are_clipped_together() -> None:
    """With clipping to almost nothing, AdamW takes the same steps, unless epsilon rules: that it then does shows it."""
    found, _, _ = run(steps=1, holdout=0.0, batch_size=10, learning_rate=1.0, clip_norm=1e-9, warmup=0)
    moved = found["w"].detach().double()
    g = {"w": -TARGETS.double().mean(0), "other": torch.ones(2).double()}
    scale = 1e-9 / math.sqrt(sum(float(one.square().sum()) for one in g.values()))
    clipped = g["w"] * scale
    assert torch.allclose(moved, -clipped / (clipped.abs() + 1e-8), rtol=1e-3)


# ---------------------------------------------------------------- what is kept


def test_the_numbers() -> None:
    """First and best held-out loss; what was best is what the parameters are at the end."""
    parameters, numbers, store = run(steps=60, holdout=0.2, learning_rate=0.05, evaluate_every=10)
    settings = Training(holdout=0.2)
    _, held = settings.split(len(TARGETS))
    with torch.no_grad():
        assert numbers["first"] == pytest.approx(float(squares(parameters_of())(held)), rel=1e-5)
        assert numbers["best"] == pytest.approx(float(squares(parameters)(held)), rel=1e-5)
    watched = [look[2] for look in store.looks if look[2] is not None]
    assert numbers["best"] == min([numbers["first"], *watched])
    assert [look[0] for look in store.looks] == [10, 20, 30, 40, 50, 60]


def test_without_held_out_samples_the_numbers_are_of_the_training() -> None:
    """The first is the loss before the first step."""
    parameters, numbers, store = run(steps=60, holdout=0.0, batch_size=10, learning_rate=0.05, evaluate_every=25)
    with torch.no_grad():
        assert numbers["first"] == pytest.approx(float(squares(parameters_of())(torch.arange(10))), rel=1e-5)
    assert numbers["best"] < numbers["first"]
    assert numbers["best"] == store.looks[-1][1]
    assert store.looks[-1][0] == 60
    assert torch.equal(parameters["w"].detach(), store.states[-1][0]["w:now"])


def overshoot(parameters: dict[str, nn.Parameter], held: Tensor) -> Callable[[Tensor], Tensor]:
    """Training pulls w to 1; held-out samples would have 0.4."""

    def loss(chosen: Tensor) -> Tensor:
        target = 0.4 if bool(torch.isin(chosen, held).all()) else 1.0
        return (parameters["w"] - target).square().mean() + 0 * parameters["other"].sum()

    return loss


def test_training_stops_early_and_keeps_the_best() -> None:
    settings = Training(
        steps=1000, holdout=0.2, learning_rate=0.02, schedule="constant", warmup=0, evaluate_every=5, patience=3
    )
    _, held = settings.split(len(TARGETS))
    parameters, store = parameters_of(), Kept()
    numbers = train(parameters, overshoot(parameters, held), len(TARGETS), settings, store)
    losses = [look[2] for look in store.looks]
    assert None not in losses
    least = losses.index(min(losses))  # type: ignore[type-var]
    assert 0 < least == len(losses) - 1 - 3  # three looks without a gain
    assert store.looks[-1][0] < 100
    assert numbers["best"] == losses[least]
    assert torch.equal(parameters["w"].detach(), store.states[least][0]["w:now"])
    with torch.no_grad():
        assert float(overshoot(parameters, held)(held)) == pytest.approx(numbers["best"])


class Harder:
    """A watcher after whose change, at a step between two looks, every loss is larger: as when units are masked."""

    def __init__(self, at: int) -> None:
        self.at, self.steps = at, 0

    def expect(self, chosen: Tensor) -> None:
        assert len(chosen)

    def observe(self, step: int) -> None:
        self.steps = step + 1

    def settled(self, steps: int) -> bool:
        return steps >= self.at

    def state(self) -> dict[str, Tensor]:
        return {}

    def restore(self, tensors: dict[str, Tensor]) -> None:
        assert tensors


@pytest.mark.parametrize("at", [1, 6, 8, 12])
def test_losses_before_a_change_do_not_count(at: int) -> None:
    """The values are the best of the looks after it, though every loss before it was smaller."""
    watcher, parameters, store = Harder(at), parameters_of(), Kept()
    easy = squares(parameters)
    settings = Training(steps=12, evaluate_every=4, batch_size=4, learning_rate=0.05, holdout=0.3)
    loss = lambda chosen: easy(chosen) + (5.0 if watcher.steps >= at else 0.0)  # noqa: E731
    numbers = train(parameters, loss, len(TARGETS), settings, store, watcher=watcher)
    after = [(look, state) for look, state in zip(store.looks, store.states, strict=True) if look[0] >= at]
    best = min(after, key=lambda one: one[0][2] or math.inf)
    assert numbers["best"] == best[0][2]
    assert numbers["first"] < numbers["best"]
    assert all(torch.equal(p.detach(), best[1][0][f"{name}:now"]) for name, p in parameters.items())
    assert not torch.equal(parameters["w"].detach(), torch.zeros(6))


def test_where_training_only_hurts_nothing_changes() -> None:
    settings = Training(steps=1000, holdout=0.2, evaluate_every=2, patience=2)
    _, held = settings.split(len(TARGETS))
    parameters, store = parameters_of(0.4), Kept()
    numbers = train(parameters, overshoot(parameters, held), len(TARGETS), settings, store)
    assert [look[0] for look in store.looks] == [2, 4]
    assert torch.equal(parameters["w"].detach(), torch.full((6,), 0.4))
    assert numbers["best"] == numbers["first"] == pytest.approx(0.0, abs=1e-12)


# ---------------------------------------------------------------- stopped, and gone on


@pytest.mark.parametrize("saves", [1, 2, 3, 4])
def test_a_stopped_training_goes_on_with_the_same_bits(saves: int) -> None:
    settings: dict[str, Any] = {"steps": 37, "holdout": 0.2, "batch_size": 3, "evaluate_every": 10, "accumulation": 2}
    settings |= {"learning_rate": 0.05, "weight_decay": 0.1, "patience": 100}
    wanted, numbers, whole = run(**settings)
    assert len(whole.states) == 4
    store = Kept(dies_after=saves)
    with pytest.raises(KeyboardInterrupt):
        run(store, **settings)
    store.dies_after = None
    found, again, _ = run(store, **settings)
    assert again == numbers
    assert all(torch.equal(found[name], p) for name, p in wanted.items())
    assert len(store.states) == 4
    assert store.looks == whole.looks[: saves - 1] + whole.looks[saves:]  # it died between saving and telling


# ---------------------------------------------------------------- what goes wrong


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_loss_that_is_not_finite(bad: float) -> None:
    """Names the step; the last state that was saved is whole."""
    parameters, store = parameters_of(), Kept()
    good, calls = squares(parameters), [0]

    def loss(chosen: Tensor) -> Tensor:
        calls[0] += torch.is_grad_enabled()
        return good(chosen) * (bad if calls[0] > 7 else 1.0)

    settings = Training(steps=20, holdout=0.0, evaluate_every=5)
    with pytest.raises(RunError, match=r"training diverged: the loss is (nan|inf)") as caught:
        train(parameters, loss, len(TARGETS), settings, store)
    assert caught.value.where == "step 8"
    assert "learning_rate" in (caught.value.fix or "")
    assert len(store.states) == 1
    assert all(torch.isfinite(tensor).all() for tensor in store.states[0][0].values())
    wanted, _, _ = run(steps=20, holdout=0.0, evaluate_every=5)
    calls[0] = -1000
    train(parameters, loss, len(TARGETS), settings, store)  # goes on from step 5
    assert all(torch.equal(parameters[name], p) for name, p in wanted.items())


def test_a_gradient_that_is_not_finite() -> None:
    parameters = parameters_of()

    def loss(chosen: Tensor) -> Tensor:
        return parameters["other"].sum() + parameters["w"].abs().sqrt().sum()  # finite at 0, its slope is not

    with pytest.raises(RunError, match="a gradient is not finite") as caught:
        train(parameters, loss, len(TARGETS), Training(holdout=0.0), Kept())
    assert caught.value.where == "step 1, w"
    assert torch.equal(parameters["w"].detach(), torch.zeros(6))


@pytest.mark.parametrize("after", [0, 7])
def test_a_held_out_loss_that_is_not_finite(after: int) -> None:
    """It would never be better or worse than another: training would go on, or stop, for no reason."""
    parameters, calls = parameters_of(), [0]
    good = squares(parameters)

    def loss(chosen: Tensor) -> Tensor:
        calls[0] += torch.is_grad_enabled()
        return good(chosen) * (math.nan if not torch.is_grad_enabled() and calls[0] >= after else 1.0)

    says = "the held-out loss is nan" + ("" if after else " before the first step")
    with pytest.raises(RunError, match=says) as caught:
        train(parameters, loss, len(TARGETS), Training(holdout=0.2, evaluate_every=5, steps=20), Kept())
    assert caught.value.where == ("step 10" if after else None)
