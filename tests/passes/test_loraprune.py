"""LoRAPrune: the criterion against autograd and its identity, the schedule, and that masked equals removed."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
from transformers import AutoModelForCausalLM

import compress
from compress.adapting import AdaptedLinear
from compress.compiling import compile_plan
from compress.errors import PlanError
from compress.passes import LoRAPrune, loraprune
from compress.passes.loraprune import importance_of
from compress.training_store import TrainingStore
from tests.conftest import files_of, tiny_directory
from tests.passes import draw, state_of

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor

    from compress.barrier import WholeModel
    from compress.passes import Note

SHORT: dict[str, Any] = {
    "rank": 4,
    "steps": 12,
    "prune_every": 2,
    "evaluate_every": 4,
    "batch_size": 4,
    "learning_rate": 1e-3,
    "multiple": 8,
}
FAMILIES = [("llama", True), ("llama", False), ("qwen3", True), ("gemma2", True), ("phi3", True)]
FAMILIES += [("gpt_neox", False), ("opt", False), ("gpt2", False)]
CHANNELS = {"opt": "ffn_dim", "gpt2": "n_inner"}  # where the configuration does not call them intermediate_size
seen: list[Any] = []


class Watched(LoRAPrune):
    """LoRAPrune that leaves behind what its masked model, with the factors still beside the weights, computes."""

    def apply_model(self, model: WholeModel) -> dict[str, Note]:
        notes = super().apply_model(model)
        with torch.no_grad():
            seen.append(model.logits(model.tokens.ids[:2])[0])
        trained = [name for name, p in model.module.named_parameters() if p.grad is not None]
        seen.append(trained)
        return notes


def plan_of(folder: Path, one: LoRAPrune, output: str = "out") -> compress.Plan:
    return compress.Plan(
        model=compress.Model(path=str(folder / "model")),
        calibration=compress.Calibration(source=str(folder / "text.txt"), samples=8, length=16),
        run=compress.Run(output=str(folder / output)),
        passes=(one,),
    )


def adapted(rows: int = 6, columns: int = 10, *, started: bool = False) -> AdaptedLinear:
    module = AdaptedLinear(state_of(draw(rows, columns, seed=1)), None, "lora-merge", rank=3, alpha=6.0, seed=0)
    if not started:
        module.B.data.copy_(draw(rows, 3, seed=2))
    for p in (module.A, module.B):
        p.requires_grad_(True)
    return module


@pytest.mark.parametrize("started", [True, False])
def test_the_criterion_is_the_step_of_the_factors(started: bool) -> None:
    """Against the difference of products, in float64, with gradients that come from the gradient of the weight."""
    module = adapted(started=started)
    x, weights = draw(20, 10, seed=3), draw(20, 6, seed=4)
    (module(x) * weights).sum().backward()
    G = weights.double().T @ x.double()  # of the whole weight
    B, A, W = (t.detach().double() for t in (module.B, module.A, module.weight))
    s = 2.0
    dB, dA = s * G @ A.T, s * B.T @ G
    assert module.B.grad is not None
    assert module.A.grad is not None
    torch.testing.assert_close(module.B.grad.double(), dB, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(module.A.grad.double(), dA, rtol=1e-5, atol=1e-4)
    direction = B @ A - (B - dB) @ (A - dA)
    if started:  # B = 0: only one of the terms is there
        torch.testing.assert_close(direction, s * G @ A.T @ A)
    wanted = (direction * (W + s * B @ A)).square()
    torch.testing.assert_close(importance_of(module).double(), wanted, rtol=1e-4, atol=1e-3 * float(wanted.max()))


@pytest.mark.parametrize(
    ("steps", "every", "start", "end"), [(100, 10, 0.1, 0.9), (37, 5, 0.0, 1.0), (3, 10, 0.1, 0.5)]
)
def test_the_schedule(steps: int, every: int, start: float, end: float) -> None:
    one = LoRAPrune(channels=0.5, steps=steps, prune_every=every, start=start, end=end)
    shares = [one.share_masked(step) for step in range(steps + 1)]
    assert shares == sorted(shares)
    assert shares[0] == 0.0
    assert all(share == 0.0 for share in shares[: int(start * steps) + 1])
    assert shares[-1] == 1.0
    last = next(step for step, share in enumerate(shares) if share == 1.0)
    assert end * steps <= last < end * steps + 1
    changes = [step for step in range(1, last) if shares[step] != shares[step - 1]]
    assert all((step - int(start * steps)) % every == 0 for step in changes)
    for step in changes:  # the cubic one, counted from the start
        passed = (step - int(start * steps)) / (last - int(start * steps))
        assert shares[step] == pytest.approx(1 - (1 - passed) ** 3)


def test_the_schedule_has_the_fractions_that_are_written() -> None:
    """0.29 of 100 is 29 and 0.55 is 55, though 0.29 * 100 is a little less and 0.55 * 100 a little more."""
    one = LoRAPrune(channels=0.5, steps=100, prune_every=1, start=0.29, end=0.55)
    shares = [one.share_masked(step) for step in range(101)]
    assert (shares.count(0.0), shares.index(1.0)) == (30, 55)  # 0 … 29


@pytest.mark.parametrize(("family", "gqa"), FAMILIES)
def test_removed_is_masked(family: str, gqa: bool, tmp_path: Path) -> None:
    """The emitted model computes what the model computed that was masked and had its factors beside the weights."""
    tiny_directory(tmp_path / "model", family, tied=True, gqa=gqa, blocks=2)
    heads = {} if family in ("gpt_neox", "opt", "gpt2") else {"heads": 0.5}
    seen.clear()
    plan = plan_of(tmp_path, Watched(channels=0.5, **heads, **SHORT))
    lock = compile_plan(plan)
    report = compress.run(plan)
    logits, trained = seen
    assert {name.rpartition(".")[2] for name in trained} == {"A", "B"}
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32).eval()
    ids = tokens_of(plan)[:2]
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits, logits, rtol=1e-4, atol=1e-4)
    assert lock.left is not None
    channels = getattr(model.config, CHANNELS.get(family, "intermediate_size"))
    assert channels == lock.left.channels == lock.sizes.channels // 2
    parameters = sum(p.numel() for p in model.parameters())
    assert parameters == report.output.parameters
    assert (tmp_path / "out" / "model.safetensors").stat().st_size == lock.output_bytes


def tokens_of(plan: compress.Plan) -> Tensor:
    from compress.calibration.plan_source import make_tokens

    return make_tokens(compile_plan(plan), torch.device("cpu")).ids


@pytest.mark.parametrize("width", ["heads", "channels"])
def test_permuted_units_are_as_important(width: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Importance follows the units when a model's are put in another order, and the factors' with them."""
    tiny_directory(tmp_path / "model", "llama", tied=True, gqa=True, blocks=1)
    found: dict[str, Tensor] = {}
    order: Tensor | None = None
    original = loraprune.Masking.observe

    def observe(self: loraprune.Masking, step: int) -> None:
        group = next(group for group in self.groups if group.width.name == width)
        if order is not None and step == 0:
            for module, dim, units in group.parts:  # gradients of the same model with its units in another order
                index = torch.empty(units.numel(), dtype=torch.int64)
                index[units.flatten()] = units[order].flatten()
                for p in (module.weight, module.B if dim == 0 else module.A):
                    p.data = p.data.index_select(dim, index)
                    if p.grad is not None:
                        p.grad = p.grad.index_select(dim, index)
        if step == 0:
            found["moved" if order is not None else "first"] = group.importance()
        original(self, step)

    monkeypatch.setattr(loraprune.Masking, "observe", observe)
    one = LoRAPrune(**{width: 0.5}, normalize=False, **SHORT)
    compress.run(plan_of(tmp_path, one, "first"))
    units = len(found["first"])
    order = torch.arange(units).roll(1)
    compress.run(plan_of(tmp_path, one, "second"))
    torch.testing.assert_close(found["moved"], found["first"][order], rtol=1e-6, atol=0)
    assert not torch.equal(found["moved"], found["first"])


def test_gradients_are_read_before_they_are_clipped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny_directory(tmp_path / "model", "llama", tied=True, gqa=True, blocks=1)
    first: list[Tensor] = []
    original = loraprune.Group.importance

    def importance(self: loraprune.Group) -> Tensor:
        found = original(self)
        first.append(found)
        return found

    monkeypatch.setattr(loraprune.Group, "importance", importance)
    seconds = []
    for clip in (1e-6, 1e6):
        first.clear()
        compress.run(plan_of(tmp_path, LoRAPrune(channels=0.5, clip_norm=clip, normalize=False, **SHORT), f"{clip}"))
        seconds.append(first[0])
    torch.testing.assert_close(seconds[0], seconds[1], rtol=0, atol=0)
    assert float(seconds[0].sum()) > 0


def test_what_reads_the_units_is_refitted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is masked is made up for by what stays, as well as any weights could: the normal equations, in float64."""
    tiny_directory(tmp_path / "model", "llama", tied=True, gqa=True, blocks=2)
    mask, refit = loraprune.Group._mask, loraprune.Group._refit
    inputs: dict[str, list[Tensor]] = {}
    checked: dict[str, int] = {}

    def watch_inputs(self: loraprune.Group, module: Any, given: tuple[Tensor, ...]) -> Any:
        if torch.is_grad_enabled():
            inputs.setdefault(self.name, []).append(given[0].detach().flatten(0, 1).double())
        return mask(self, module, given)

    def check(self: loraprune.Group, moments: Any) -> None:
        reader = self.parts[0][0]
        before = (loraprune.effective(reader) * self.mask).double()
        refit(self, moments)
        after = loraprune.effective(reader).double()
        X = torch.cat(inputs[self.name])  # of all forwards that were trained on, and of no other
        assert len(X) == moments.tokens
        H = X.T @ X
        H.diagonal().add_(one.damping * H.diagonal().mean())
        kept = self.columns[self.alive].flatten()
        after[:, self.columns[~self.alive].flatten()] = 0.0  # nobody sees them
        wrong = (before - after) @ H
        assert wrong[:, kept].norm() < 1e-5 * (before @ H).norm()
        assert not torch.allclose(after[:, kept], before[:, kept], atol=1e-4)
        checked[self.name] = checked.get(self.name, 0) + 1

    monkeypatch.setattr(loraprune.Group, "_mask", watch_inputs)
    monkeypatch.setattr(loraprune.Group, "_refit", check)
    one = LoRAPrune(channels=0.5, heads=0.5, **SHORT)
    compress.run(plan_of(tmp_path, one))
    assert len(checked) == 4
    assert max(checked.values()) > 1


@pytest.mark.parametrize("initialize", ["zero", "principal"])
def test_the_report_compares_with_the_weights_as_they_came(initialize: Any, tmp_path: Path) -> None:
    """Without a step that counts nothing but what reads the units changes, and by so much is it wrong."""
    tiny_directory(tmp_path / "model", "llama", tied=True, gqa=True, blocks=2)
    still = SHORT | {"learning_rate": 1e-12, "initialize": initialize}
    report = compress.run(plan_of(tmp_path, LoRAPrune(channels=0.5, **still)))
    for line in report.linears:
        if line.linear.endswith("down_proj"):
            assert line.error_after > 0.01
        else:
            assert line.error_after < 1e-10, line.linear


class Interrupted(BaseException):
    """Like a signal: nothing may catch it on the way."""


@pytest.mark.parametrize("saves", [1, 2])
def test_a_stopped_training_goes_on_with_the_same_bytes(
    saves: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny_directory(tmp_path / "model", "llama", tied=True, gqa=True, blocks=2)
    one = LoRAPrune(channels=0.5, heads=0.5, **SHORT)
    compress.run(plan_of(tmp_path, one, "whole"))
    original, count = TrainingStore.save, 0

    def save(self: TrainingStore, *arguments: Any) -> None:
        nonlocal count
        original(self, *arguments)
        count += 1
        if count == saves:
            raise Interrupted

    monkeypatch.setattr(TrainingStore, "save", save)
    with pytest.raises(Interrupted):
        compress.run(plan_of(tmp_path, one))
    assert compress.run(plan_of(tmp_path, one)).resumed == 1
    kept, whole = (files_of(tmp_path / output) for output in ("out", "whole"))
    for files in (kept, whole):  # these name the output
        del files["plan.toml"], files["README.md"]
    assert kept == whole


REFUSED = {
    "nothing": ({}, "nothing is to be removed"),
    "backwards": ({"channels": 0.5, "start": 0.6, "end": 0.5}, "pruning starts at 0.6"),
    "all": ({"channels": 0.99}, "leaves 0"),
    "none": ({"channels": 0.01}, "removes none"),
    "rank": ({"channels": 0.5, "rank": 40}, "rank 40 is above"),
    "match": ({"channels": 0.5, "match": ("*.mlp.*",)}, "the whole model by one setting"),
}


@pytest.mark.parametrize(("settings", "says"), REFUSED.values(), ids=REFUSED)
def test_settings_that_are_refused(settings: dict[str, Any], says: str, tmp_path: Path) -> None:
    tiny_directory(tmp_path / "model", "llama", tied=True, gqa=True, blocks=1)
    with pytest.raises((PlanError, ValueError), match=says):
        compile_plan(plan_of(tmp_path, LoRAPrune(**(SHORT | settings))))
