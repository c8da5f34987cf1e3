"""PEQA: train the scales of a quantized model, and nothing else (Kim et al. 2023, arXiv 2305.14152).

``Ŵ = s ⊙ (c − z)`` with codes c and zero-points z fixed. s is trained relative to what it was, ``s = s0 (1 + δ)``, because it
is so small that a rate for s itself would have to be as small; it is kept positive, and rounded to the dtype in which it
is stored before anything is measured. A code of 0 stays 0, so the mask stays for free.

A quantizer with `rescale` first sets each scale to its least-squares value for the layer alone: with the second moment H of the
inputs, the scales s_i of a row's groups minimize ``(w − Σ_g s_g c_g) H (w − Σ_g s_g c_g)ᵀ``, c_g the steps of group g:
``A s = b`` with ``A_gh = c_g H c_hᵀ``, ``b_g = w H c_gᵀ``. For one group per row, ``s* = (w H cᵀ) / (c H cᵀ)``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from pydantic import Field

from compress.passes.base import Invariant, ModelPass, Note, SettingError
from compress.training import Training, train

if TYPE_CHECKING:
    from compress.barrier import WholeModel


class PEQA(Training, ModelPass):
    """Train the scales of codes; codes, zero-points and masks stay."""

    learning_rate: float = Field(default=2e-3, gt=0, description="the peak, of relative scales")
    distill: float = Field(default=0.0, ge=0, le=1, description="share of the loss that compares with the dense model")
    temperature: float = Field(default=1.0, gt=0, description="of that comparison")

    rule: ClassVar[int] = 6
    requires: ClassVar[frozenset[Invariant]] = frozenset({Invariant.GRID})
    preserves: ClassVar[frozenset[Invariant]] = frozenset(
        {Invariant.MASK, Invariant.PATTERN, Invariant.GRID, Invariant.SHAPES, Invariant.TIES}
    )

    def learns(self) -> bool:
        """It does."""
        return True

    def apply_model(self, model: WholeModel) -> dict[str, Note]:
        """Train all scales together."""
        from compress.passes.perp import PERP, _Comparison

        for name, state in model.states.items():
            if state.grid is None or state.grid.spec.kind != "int":
                raise SettingError(f"{name} is on no grid of integers", "put a quantizer before peqa")
        modules = model.adapt("scales", rank=1, alpha=1.0, seed=self.seed)
        parameters = {f"{name}.{key}": p for name, module in modules.items() for key, p in module.trained()}
        teacher = model.dense() if self.distill else None
        compare = _Comparison(PERP(distill=self.distill, temperature=self.temperature), model, teacher)
        ids, mask = model.tokens.ids, model.tokens.mask
        numbers = train(parameters, lambda chosen: compare.loss(ids[chosen], mask[chosen]), len(ids), self, model.store)
        for module in modules.values():
            module.finish()
        trained = sum(p.numel() for p in parameters.values())
        detail = f"{trained:,} scales, loss {numbers['first']:.4f} to {numbers['best']:.4f}"
        return {name: {"detail": detail} for name in modules}
