"""A linear as it is trained: its fixed weight, and the few parameters that a pass learns.

The forms and what becomes of them (METHODS 8; Zimmer et al. 2023, arXiv 2312.15230), M the mask, s = alpha / rank:

    lora         W x + s B (A x)      stays a branch beside the weight
    lora-merge   W x + s B (A x)      merged as it stands: where there is neither mask nor grid
    lora-prune   (W + s B A) x        merged as W + s (B A ⊙ M): the function jumps where M is 0
    masklora     (W + s B A ⊙ M) x    merged as it stands
    scalelora    (W ⊙ B A) x          merged as it stands; at first B A = 1
    weights      (V ⊙ M) x            V replaces W
    scales       s0 (1 + δ) (c − z) x the scales of the grid; codes, zero-points and mask stay
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor, nn

from compress.state import LinearState, LowRank

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

Form = Literal["fixed", "lora", "lora-merge", "lora-prune", "masklora", "scalelora", "weights", "scales"]


class AdaptedLinear(nn.Module):
    """Stands for a linear, or for transformers' Conv1D, while a pass trains."""

    kept: Tensor | None
    steps: Tensor
    bias: nn.Parameter | None

    def __init__(
        self,
        state: LinearState,
        bias: Tensor | None,
        form: Form,
        *,
        rank: int,
        alpha: float,
        seed: int,
        extend: bool = False,
    ) -> None:
        """Wrap a linear.

        Args:
            state: the linear; not changed before `finish`.
            bias: (out,) or None.
            form: what is learned.
            rank: of the factors.
            alpha: s · rank.
            seed: of the factors' first values.
            extend: with "lora", leave a branch that is there and learn new ranks beside it.
        """
        super().__init__()
        self.state, self.form, self.rank = state, form, rank
        self.factor = alpha / rank
        base = state.base()
        self.bias = None if bias is None else nn.Parameter(bias.float().clone(), requires_grad=False)
        own = base.clone() if form == "lora-merge" else base  # which changes it while it trains
        self.weight = nn.Parameter(own, requires_grad=False)
        mask = None if state.mask is None else state.mask.detach()  # sharding moves a buffer, and this is its own
        self.register_buffer("kept", mask, persistent=False)
        branch = state.low_rank
        more = form == "lora-merge" or (form == "lora" and (branch is None or extend))
        if branch is not None:  # at the factor 1, whatever alpha is
            trained = form == "lora" and not more
            self.factor = 1.0 if trained else self.factor
            self.up = nn.Parameter(branch.up.clone(), requires_grad=trained)
            self.down = nn.Parameter(branch.down.clone(), requires_grad=trained)
        self.branched, self.added = branch is not None, more
        out, width = base.shape
        generator = torch.Generator().manual_seed(seed)
        if more or form in ("lora-prune", "masklora"):
            A = (torch.rand(rank, width, generator=generator) * 2 - 1) / width**0.5  # (r, in); B A is 0 at first
            self._factors(torch.zeros(out, rank), A)
        elif form == "scalelora":
            # Each column of A averages to 1/√r over the rank and B is constant, so B A = 1, but no two rows of A are
            # alike: with equal rows all ranks would get the same gradient, and stay one rank.
            noise = torch.randn(rank, width, generator=generator) * 0.1 / rank**0.5
            A = 1 / rank**0.5 + noise - noise.mean(0)
            self._factors(torch.full((out, rank), 1 / rank**0.5), A)
        elif form == "weights":
            self.free = nn.Parameter(base.clone())
        elif form == "scales":
            grid = state.grid
            assert grid is not None
            self.delta = nn.Parameter(torch.zeros_like(grid.scale, dtype=torch.float32))
            unit = replace(grid, scale=torch.ones_like(grid.scale, dtype=torch.float32))
            self.register_buffer("steps", unit.dequantize(torch.float32), persistent=False)

    def _factors(self, B: Tensor, A: Tensor) -> None:
        device = self.weight.device
        self.B, self.A = nn.Parameter(B.to(device)), nn.Parameter(A.to(device))

    def trained(self) -> Iterator[tuple[str, nn.Parameter]]:
        """What the form learns."""
        learned = ("B", "A") if self.added else ("up", "down")
        names = {"lora": learned, "weights": ("free",), "scales": ("delta",), "fixed": ()}
        for name in names.get(self.form, ("B", "A")):
            yield name, getattr(self, name)

    def scale(self) -> Tensor:
        """The grid's scales (out, groups) as they are now: kept positive."""
        assert self.state.grid is not None
        return self.state.grid.scale.to(self.delta.device).float() * (1 + self.delta).clamp_min(1e-3)

    def current(self) -> Tensor:
        """The weight beside the branch, as it is trained."""
        if self.form in ("lora-prune", "masklora"):
            product = self.factor * (self.B @ self.A)
            if self.form == "masklora" and self.kept is not None:
                product = product * self.kept
            return self.weight + product
        if self.form == "scalelora":
            return self.weight * (self.B @ self.A)
        if self.form == "weights":
            return self.free if self.kept is None else self.free * self.kept
        if self.form == "scales":
            scale = self.scale()
            rows, groups = scale.shape
            return (self.steps.view(rows, groups, -1) * scale.unsqueeze(-1)).flatten(1)
        return self.weight

    def merged(self) -> Tensor:
        """The weight (out, in) with what was learned."""
        return self.weight + self.factor * (self.B @ self.A) if self.form == "lora-merge" else self.current()

    def forward(self, x: Tensor) -> Tensor:
        """The layer's output, (…, out)."""
        y = nn.functional.linear(x, self.current(), self.bias)
        if self.branched:
            y = y + nn.functional.linear(nn.functional.linear(x, self.down), self.up)
        if self.added:
            y = y + self.factor * nn.functional.linear(nn.functional.linear(x, self.A), self.B)
        return y

    @torch.no_grad()
    def finish(self) -> LinearState:
        """The state with what was learned, settled."""
        state, place = self.state, self.state.weight.device
        if self.form == "lora":
            root = self.factor**0.5
            pairs = [(self.up.detach(), self.down.detach())] if self.branched else []
            pairs += [(self.B.detach() * root, self.A.detach() * root)] if self.added else []
            ups, downs = zip(*pairs, strict=True)
            state.low_rank = LowRank(torch.cat(ups, 1).to(place), torch.cat(downs, 0).to(place))
        elif self.form == "scales":
            assert state.grid is not None
            old, scale = state.grid.scale, self.scale().to(place, state.grid.scale.dtype)
            held = (scale > 0) & torch.isfinite(scale)  # of the smallest and largest, float16 holds no other
            state.quantize(replace(state.grid, scale=torch.where(held, scale, old)))
        elif self.form != "fixed":
            weight = self.merged().detach().to(place)
            state.weight = weight if state.mask is None else torch.where(state.mask, weight, 0.0)
        state.settle()
        return state


def kind_of(module: nn.Module, name: str, adapted: Mapping[str, AdaptedLinear]) -> Literal["norms", "biases"] | None:
    """What a parameter of `module` is, by name: of a norm (a norm's bias, too), or the bias of an adapted linear."""
    owner, _, leaf = name.rpartition(".")
    if owner in adapted:
        return "biases" if leaf == "bias" else None
    weight = getattr(module.get_submodule(owner), "weight", None)
    return "norms" if isinstance(weight, Tensor) and weight.ndim == 1 else None
