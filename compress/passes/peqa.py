"""PEQA: train the scales of a quantized model, and nothing else (Kim et al. 2023, arXiv 2305.14152).

``Ŵ = s ⊙ C`` with the steps C = codes − zero-points fixed, a scale s for each group of a row. Its gradient is
``∂L/∂s = Σ_j C_j ∂L/∂Ŵ_j`` over the group. s is trained relative to what it was, ``s = s0 (1 + δ)``, because it is so
small that a rate for s itself would have to be as small; it is kept positive, and rounded to the dtype in which it is
stored before anything is measured. A code of 0 stays 0, so the mask stays for free.

One set of codes can have several sets of scales, one per task: passes with a `name`, each with a text of its own
(`source`), all begin with the scales that the quantizer left. They are the last passes of a plan;
`compress.export.scales` says what is written. The layer-wise closed form is `rescale` of the quantizers
(`grid_search.rescaled`).
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, ClassVar

from pydantic import Field, field_validator

from compress.calibration.plan_source import make_tokens
from compress.calibration.sources import SUFFIXES
from compress.end_to_end import Loss, train_whole
from compress.errors import nearest
from compress.passes.base import Invariant, ModelPass, Note, Pass, SettingError
from compress.training import Training

if TYPE_CHECKING:
    from compress.barrier import WholeModel
    from compress.lock import Linear, Lock

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}")  # a file of this name is one on every system


class PEQA(Training, ModelPass):
    """Train the scales of codes; codes, zero-points and masks stay."""

    learning_rate: float = Field(default=2e-3, gt=0, description="the peak, of relative scales")
    distill: float = Field(default=0.0, ge=0, le=1, description="share of the loss that compares with the dense model")
    temperature: float = Field(default=1.0, gt=0, description="of that comparison")
    name: str | None = Field(
        default=None, description="of the set of scales, which is written as scales/NAME.safetensors"
    )
    source: str | None = Field(default=None, description="a text file to train on, instead of the calibration set")

    rule: ClassVar[int] = 6
    requires: ClassVar[frozenset[Invariant]] = frozenset({Invariant.GRID})
    preserves: ClassVar[frozenset[Invariant]] = frozenset(
        {Invariant.MASK, Invariant.PATTERN, Invariant.GRID, Invariant.SHAPES, Invariant.TIES}
    )

    @field_validator("name")
    @classmethod
    def _names_a_file(cls, value: str | None) -> str | None:
        if value is not None and not NAME.fullmatch(value):
            fix = 'letters, digits, - and _, at most 64, such as name = "stories"'
            raise SettingError(f'"{value}" cannot be the name of a file everywhere', fix)
        return value

    def learns(self) -> bool:
        """It does."""
        return True

    def learned(self, linear: Linear) -> int:
        """Its scales."""
        return linear.out_features * linear.grid.groups(linear.in_features) if linear.grid else 0

    def text(self) -> str | None:
        """The file that `source` names."""
        return self.source

    def check_lock(self, lock: Lock, index: int) -> None:
        """Grids must be of integers, texts must be there, and named sets come last, each under a name of its own."""
        super().check_lock(lock, index)
        for linear in lock.linears:
            before = [one for i, one in linear.passes if i < index and Invariant.GRID in one.provides()]
            spec = before[-1].grid() if before else None
            if index in dict(linear.passes) and (spec is None or spec.kind != "int"):
                problem = f"{before[-1].use()} puts {linear.name} on no grid of integers, which has scales to train"
                raise SettingError(problem, "use rtn, gptq or sparsegpt with bits before it")
        self._check_source(lock)
        self._check_name(lock.plan.passes, index)

    def _check_source(self, lock: Lock) -> None:
        if self.source is None:
            return
        path = lock.plan.resolve(self.source)
        if not path.is_file():
            others = [p.name for p in path.parent.iterdir() if p.is_file()] if path.parent.is_dir() else []
            fix = "correct the path; it is relative to the plan file"
            raise SettingError(f'no such file "{path}"{nearest(path.name, others)}', fix, ("source",))
        if path.suffix.lower() not in SUFFIXES:
            raise SettingError(f'"{path.suffix}" is no kind of text', f"use {', '.join(SUFFIXES)}", ("source",))

    def _check_name(self, passes: tuple[Pass, ...], index: int) -> None:
        if self.name is None:
            return
        for other in passes[index + 1 :]:
            if not isinstance(other, PEQA) or other.name is None:
                problem = (
                    f'{other.use()} comes after the set of scales "{self.name}", which would not be for its result'
                )
                raise SettingError(problem, "put peqa passes with a name last", ("name",))
            if other.name.lower() == self.name.lower():  # one file, on systems that ignore case
                raise SettingError(f'two sets of scales are called "{other.name}"', "name one otherwise", ("name",))

    def apply_model(self, model: WholeModel) -> dict[str, Note]:
        """Train all scales together."""
        modules = model.adapt("scales", rank=1, alpha=1.0, seed=self.seed)
        tokens = model.tokens if self.source is None else make_tokens(model.lock, model.device, self.source)
        trained, numbers = train_whole(model, modules, {}, self, Loss(self.distill, self.temperature), tokens)
        detail = f"{trained:,} scales, loss {numbers['first']:.4f} to {numbers['best']:.4f}"
        return {name: {"detail": detail} for name in modules}
