"""Structured pruning in one shot: attention heads, MLP channels and the hidden width, by what their absence would cost.

A unit of a width is read by one linear W (out, in) through columns u: removing it takes ``W_u x_u`` from the output.
With the second moment H = X Xᵀ of that input, `score` is how units are ranked, the least first to go:

    magnitude  ‖weights of the unit‖², its rows and its columns
    wanda      Σ_{j∈u} ‖W_j‖² ‖X_j‖²                   Sun et al. 2023, arXiv 2306.11695, summed over the unit
    flap       Σ_{j∈u} ‖W_j‖² Var(X_j)                 An et al. 2023, arXiv 2312.11983; means go into the bias
    obs        tr(W_u (H⁻¹_uu)⁻¹ W_uᵀ)                 Kurtić et al. 2023 (ZipLM), arXiv 2302.04089; one at a time, with
                                                       all that is left of W and H⁻¹ updated in between
    random     none: a baseline

`update` then refits what is left of W by least squares, ``W_K ← W H_{:K} (H_KK + λI)⁻¹``, which is what the updates of
obs add up to.

Where blocks may differ (``heterogeneous = true``), two sweeps walk over them. The first scores all units and changes
nothing; between both, what all blocks keep together is spread over them, by the share that each unit has in the scores
of its block; the second prunes as above. For obs, the score of a unit is what it costs in its turn until one `multiple`
is left.

The hidden width has readers in every block: a channel's score is ``Σ ‖W_j‖² ‖X_j‖²`` over those of a block (the norms
that feed them included), as a share of what all channels have there, added up over the blocks; with magnitude without
X, with random at random. One choice serves the whole model.
"""

from __future__ import annotations

import math
import zlib
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal

import torch
from pydantic import Field, model_validator

from compress.calibration.moments import DAMPING_LADDER
from compress.errors import RunError
from compress.passes.base import BlockPass, BlockState, Note, SettingError, Statistics
from compress.passes.structured import Narrowing, coupled_heads, rounded
from compress.spread import shares
from compress.structure import Sizes

if TYPE_CHECKING:
    from torch import Tensor

    from compress.architecture import Architecture, Width
    from compress.calibration.moments import Moments

ROUNDS = 256  # obs removes one unit at a time; of more units than this, several, so that it takes so many rounds


class WidthPruning(Narrowing, BlockPass):
    """Remove heads, MLP channels and hidden channels in one shot, and refit what reads them."""

    hidden: float = Field(default=0.0, ge=0, lt=1, description="fraction of the hidden width to remove, in all blocks")
    score: Literal["obs", "wanda", "flap", "magnitude", "random"] = Field(
        default="obs", description="how units are ranked"
    )
    update: bool | None = Field(
        default=None, description="refit what reads the units by least squares; default: with obs"
    )
    damping: float = Field(default=0.01, gt=0, description="λ over the mean diagonal of H, for obs and update")
    seed: int = Field(default=0, ge=0, description="of score = random")

    @model_validator(mode="after")
    def _removes_something(self) -> WidthPruning:
        if not (self.heads or self.channels or self.hidden):
            raise SettingError("nothing is to be removed", "give channels, heads or hidden, such as channels = 0.25")
        if self.score == "obs" and self.update is False:
            raise SettingError(
                "obs is a score of the updated weights", 'leave update out, or score = "wanda"', ("update",)
            )
        return self

    def scores(self) -> bool:
        """Where blocks may differ."""
        return self.heterogeneous

    @property
    def updates(self) -> bool:
        """Whether the readers are refitted."""
        return self.score == "obs" if self.update is None else self.update

    def needed(self) -> Statistics:
        """The Gram matrix for obs, flap and the update; norms are enough for wanda and the hidden width."""
        if self.updates or self.score == "flap":
            return Statistics.GRAM
        return Statistics.NORMS if self.score == "wanda" or self.hidden else Statistics.NONE

    def needed_of(self, linear: str, architecture: Architecture, config: Any) -> Statistics:
        """What ranks units is asked of those that read them only; norms of those that read the hidden width."""
        if any(linear in width.columns for width in self._widths(architecture, config)):
            return self.needed()
        return Statistics.NORMS if self.hidden and linear in architecture.hidden.reads else Statistics.NONE

    def left(self, sizes: Sizes, architecture: Architecture, config: Any) -> Sizes:
        """The hidden width too; with it heads, where it is heads times their size."""
        after = self.narrowed(sizes, architecture, config)
        if not self.hidden:
            self.check_heads(sizes, after, architecture, config)
            return after
        size = coupled_heads(architecture, config)
        multiple = self.multiple if size is None else math.lcm(self.multiple, size)
        after = replace(after, hidden=rounded("hidden", self.hidden, sizes.hidden, multiple, size or 1))
        after = after if size is None else replace(after, heads=after.hidden // size)
        self.check_heads(sizes, after, architecture, config)
        return after

    def takes(self, architecture: Architecture, config: Any, targets: list[str], quantized: set[str]) -> list[str]:
        """The linears that read the units, and where the score or the hidden width asks for them, more."""
        taken = {name for width in self._widths(architecture, config) for name in width.columns}
        if self.score == "magnitude":
            taken |= {name for width in self._widths(architecture, config) for name in width.rows}
        taken |= set(architecture.hidden.reads) if self.hidden else set()
        return [name for name in architecture.linears if name in taken]

    def _widths(self, architecture: Architecture, config: Any) -> list[Width]:
        """The widths of a block of which it removes units."""
        removed = {"channels": self.channels, "heads": self.heads}
        if self.hidden and coupled_heads(architecture, config):
            removed["heads"] = self.hidden
        return [width for width in architecture.widths if removed[width.name]]

    def solving_bytes(self, out_features: int, in_features: int) -> int:
        """H, its part of the columns that stay, and the factor of that."""
        return 20 * in_features**2 if self.updates else 0

    def apply(self, block: BlockState) -> dict[str, Note]:
        """Choose the units of one block, refit their readers, and add up what the hidden width is chosen by."""
        if self.heterogeneous and block.spread is None:
            return self._look(block)
        notes: dict[str, Note] = {}
        if self.hidden:
            self._score_hidden(block)
        sizes = Sizes.of(block.architecture, block.config)
        after = self.left(sizes, block.architecture, block.config)
        for width in self._widths(block.architecture, block.config):
            (name,) = width.columns
            state, moments = block.linears[name], block.moments[name]
            units = width.unit_columns(width.count(block.config), state.in_features)
            keep = (block.spread or {}).get(width.name) or after.at(width.name, 0)
            W = state.weight
            damping = definite(moments, self.damping) if self.updates else self.damping
            kept = self._choose(block, width, units, len(units) - keep, damping)
            columns = units[kept].flatten()
            gone = torch.ones(state.in_features, dtype=torch.bool)
            gone[columns] = False
            if self.updates:
                state.weight = refitted(W, moments, columns, damping)
            else:
                state.weight = torch.where(gone.to(W.device), 0.0, W)
            state.settle()
            if self.score == "flap":
                self._compensate(block, name, (W - state.weight) @ (moments.sums / max(1, moments.tokens)))
            block.found |= {f"{width.name}:kept": kept}
            notes[name] = {"detail": f"{keep} of {len(units)} {width.name}"}
            if self.updates:
                notes[name] |= {"damping": damping, "dead_columns": int((moments.squares == 0).sum())}
            if self.score == "flap" and f"{name}.bias" not in block.parameters:
                notes[name]["detail"] += ", no bias to take their mean"
        return notes

    def _look(self, block: BlockState) -> dict[str, Note]:
        """Score the units whose number is to differ between blocks, comparably, and change nothing."""
        sizes = Sizes.of(block.architecture, block.config)
        different = self.left(sizes, block.architecture, block.config).different
        for width in self._widths(block.architecture, block.config):
            if width.name not in different:
                continue
            (name,) = width.columns
            state, moments = block.linears[name], block.moments[name]
            units = width.unit_columns(width.count(block.config), state.in_features)
            if self.score == "obs":
                remove = max(0, len(units) - self.step(width.name))
                _, scores = obs_in_turn(state.weight, moments, units, remove, definite(moments, self.damping))
            else:
                scores = self._scores(block, width, units)
            block.found[f"{width.name}:score"] = shares(scores)
        return {}

    def _choose(self, block: BlockState, width: Width, units: Tensor, remove: int, damping: float) -> Tensor:
        """Indices of the units that stay, ascending."""
        (name,) = width.columns
        if self.score == "obs":
            return obs(block.linears[name].weight, block.moments[name], units, remove, damping)
        order = self._scores(block, width, units).argsort(stable=True)
        return order[remove:].sort().values

    def _scores(self, block: BlockState, width: Width, units: Tensor) -> Tensor:
        """What units (units, columns) are ranked by: (units,); not for obs."""
        (name,) = width.columns
        W, moments = block.linears[name].weight, block.moments[name]
        if self.score == "random":
            generator = torch.Generator().manual_seed(self.seed + zlib.crc32(block.linears[name].name.encode()))
            return torch.rand(len(units), generator=generator)
        if self.score == "magnitude":
            scores = _of_units(W.square().sum(0), units)
            for linear in width.rows:
                rows = width.unit_rows(linear, len(units), block.linears[linear].out_features, block.config)
                scores = scores + _of_units(block.linears[linear].weight.square().sum(1), rows)
            return scores
        energy = moments.squares
        if self.score == "flap":
            energy = energy - moments.sums.square() / max(1, moments.tokens)  # n · Var
        return _of_units(W.square().sum(0) * energy.clamp_min(0), units)

    def _compensate(self, block: BlockState, name: str, missing: Tensor) -> None:
        """Give the bias, where there is one, what the output now lacks on average."""
        bias = block.parameters.get(f"{name}.bias")
        if bias is not None:
            block.parameters[f"{name}.bias"] = bias + missing.to(bias.device)

    def _score_hidden(self, block: BlockState) -> None:
        """What the channels of the residual stream give to the readers of this block, and their share of its energy."""
        hidden = block.architecture.hidden
        given = []
        for name in hidden.reads:
            W, squares = block.linears[name].weight, block.moments[name].squares
            given.append(W.square().sum(0) * (1.0 if self.score == "magnitude" else squares))
        total = torch.stack(given).sum(0)
        if self.score == "random":
            total = torch.rand(len(total), generator=torch.Generator().manual_seed(self.seed))
        block.found["hidden:score"] = total / total.sum().clamp_min(1e-30)
        if not hidden.rms:
            return
        for one in block.architecture.scales:
            if one.norm and one.inputs[0] in block.moments:
                gain = block.parameters[f"{one.by}.weight"] + one.offset
                squares = block.moments[one.inputs[0]].squares
                block.found[f"{one.by}:energy"] = torch.where(gain != 0, squares / gain.square().clamp_min(1e-30), 0.0)


def _of_units(per_feature: Tensor, units: Tensor) -> Tensor:
    return per_feature.cpu()[units].sum(1)


def _damped(moments: Moments, damping: float) -> Tensor:
    """H + λI in float64, λ = damping · mean(diag H); the identity where there never was an input."""
    H = moments.gram().double()
    mean = float(H.diagonal().mean())
    H.diagonal().add_(damping * mean if mean else 1.0)
    return H


def definite(moments: Moments, damping: float) -> float:
    """The damping, or ten or a hundred times as much, that makes H positive definite in spite of its rounding.

    Raises:
        RunError: none of them does.
    """
    for step in DAMPING_LADDER:
        H = _damped(moments, damping * step)
        failed = torch.empty((), dtype=torch.int32, device=H.device)
        torch.linalg.cholesky_ex(H, out=(H, failed))
        if failed.item() == 0:
            return damping * step
    raise _indefinite(moments, damping)


def _indefinite(moments: Moments, damping: float) -> RunError:
    return RunError(
        f"the second moment of the input ({moments.in_features} columns, {moments.tokens} tokens) is not positive "
        f"definite, even with damping {damping * DAMPING_LADDER[-1]:g}",
        fix="raise damping, or calibrate on more tokens",
    )


def refitted(W: Tensor, moments: Moments, columns: Tensor, damping: float) -> Tensor:
    """W (out, in) with zeros outside `columns`, and those refitted: the V of least ``‖(W − V) X‖² + λ‖W − V‖²``.

    With the dropped columns D and the kept ones K, ``V_K = W_K + W_D H_DK (H_KK + λI)⁻¹``: λ keeps V close to W, not
    to zero. It is the sum of the updates that optimal brain surgeon makes with the damped H. The damping is ten or a
    hundred times as much where that makes H_KK positive definite, and less does not.

    Raises:
        RunError: none of them does.
    """
    columns = columns.to(W.device)
    gone = torch.ones(W.shape[1], dtype=torch.bool, device=W.device)
    gone[columns] = False
    for step in DAMPING_LADDER:
        H = _damped(moments, damping * step)
        factor, failed = torch.linalg.cholesky_ex(H[columns][:, columns])
        if failed.item() == 0:
            break
    else:
        raise _indefinite(moments, damping)
    moved = torch.cholesky_solve(H[columns][:, gone] @ W[:, gone].T.double(), factor).T
    new = torch.zeros_like(W)
    new[:, columns] = (W[:, columns].double() + moved).float()
    return new


def obs(W: Tensor, moments: Moments, units: Tensor, remove: int, damping: float) -> Tensor:
    """The units that stay, ascending, of those whose removal costs least: see `obs_in_turn`."""
    return obs_in_turn(W, moments, units, remove, damping)[0]


def obs_in_turn(W: Tensor, moments: Moments, units: Tensor, remove: int, damping: float) -> tuple[Tensor, Tensor]:
    """Remove the units whose removal costs least, one after another.

    Args:
        W: (out, in).
        moments: of its input, with the Gram matrix.
        units: (units, k) columns of each.
        remove: how many go.
        damping: λ over the mean diagonal of H.

    Returns:
        indices of the units that stay, ascending; and (units,) what each cost in its turn, at least what those before
        it did, or would cost next.
    """
    W = W.to(torch.float64, copy=True)
    H = _damped(moments, damping)
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(H, out=H))
    del H
    units = units.to(W.device)
    alive = torch.ones(len(units), dtype=torch.bool, device=W.device)
    costs = torch.zeros(len(units), dtype=torch.float64, device=W.device)
    together = -(-remove // ROUNDS)
    while remove:
        cost = _costs(W, inverse, units)
        cost[~alive] = torch.inf
        go = cost.argsort(stable=True)[: min(together, remove)]
        costs[go] = cost[go].maximum(costs.max())
        u = units[go].flatten()
        solved = torch.linalg.solve(inverse[u][:, u], inverse[u])
        W.addmm_(W[:, u], solved, alpha=-1)
        inverse.addmm_(inverse[:, u], solved, alpha=-1)
        inverse[u, u] = 1.0  # of what is gone; its cost is not asked for again
        alive[go] = False
        remove -= len(go)
    costs[alive] = _costs(W, inverse, units)[alive].maximum(costs.max())
    return alive.nonzero().flatten().cpu(), costs.cpu()


def _costs(W: Tensor, inverse: Tensor, units: Tensor) -> Tensor:
    """``tr(W_u (H⁻¹_uu)⁻¹ W_uᵀ)`` of every unit."""
    if units.shape[1] == 1:
        u = units[:, 0]
        return W[:, u].square().sum(0) / inverse.diagonal()[u]
    blocks = inverse[units.unsqueeze(2), units.unsqueeze(1)]  # (units, k, k)
    columns = W[:, units].permute(1, 2, 0)  # (units, k, out)
    cost: Tensor = (columns * torch.linalg.solve(blocks, columns)).sum((1, 2))
    return cost
