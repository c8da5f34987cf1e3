"""Layers and inputs that the tests of the passes share, and the exact quantities to hold the passes against.

Nothing here calls the package's own mathematics: the oracles are float64 and written from the papers.
"""

from __future__ import annotations

from fractions import Fraction

import torch
from torch import Tensor

from compress.calibration.moments import Factor, Moments, Statistics
from compress.state import LinearState

torch.set_num_threads(1)


def draw(*shape: int, seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Standard normal values, the same on every machine."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def correlated(tokens: int, in_features: int, *, seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Inputs (tokens, in) as layers see them: a few strong directions, and columns of very different size."""
    mixing = draw(in_features, in_features, seed=seed + 1000, dtype=torch.float64)
    strengths = torch.logspace(0.5, -1, in_features, dtype=torch.float64)
    scales = draw(in_features, seed=seed + 2000, dtype=torch.float64).mul(0.5).exp()
    independent = draw(tokens, in_features, seed=seed, dtype=torch.float64)
    return (((independent * strengths) @ mixing / in_features**0.5) * scales).to(dtype)


def state_of(weight: Tensor, dtype: torch.dtype = torch.float32) -> LinearState:
    """A layer nothing has been done to."""
    return LinearState("model.layers.0.mlp.up_proj", weight.clone(), weight.clone(), dtype)


def moments_of(inputs: Tensor, statistics: Statistics = Statistics.GRAM) -> Moments:
    """The moments of inputs (tokens, in) added at once."""
    moments = Moments(inputs.shape[1], statistics)
    moments.add(inputs)
    return moments


NOTHING = Moments(1, Statistics.NONE)


class ExactMoments(Moments):
    """The same interface in float64, with U by the route of the paper: Cholesky, inverse, upper Cholesky."""

    def __init__(self, inputs: Tensor, *, undamped: bool = False) -> None:
        super().__init__(inputs.shape[1], Statistics.NORMS)
        self.inputs, self.undamped = inputs.double(), undamped

    def gram(self) -> Tensor:
        return self.inputs.T @ self.inputs

    def factor(self, damping: float) -> Factor:
        damping = 0.0 if self.undamped else damping
        return Factor(
            papers_factor(damped(self.inputs, damping)), damping, torch.zeros(self.in_features, dtype=torch.bool)
        )


def papers_factor(H: Tensor) -> Tensor:
    """U of ``H⁻¹ = Uᵀ U`` as the code of SparseGPT and GPTQ finds it."""
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(H))
    return torch.linalg.cholesky(inverse, upper=True)


def damped(inputs: Tensor, damping: float) -> Tensor:
    """``H_λ = XᵀX + damping · mean(diag XᵀX) I`` in float64; the identity where nothing ever came in."""
    x = inputs.double()
    H = x.T @ x
    mean = float(H.diagonal().mean())
    return H + (damping * mean if mean else 1.0) * torch.eye(len(H), dtype=torch.float64)


def row_errors(difference: Tensor, H: Tensor) -> Tensor:
    """``δ H δᵀ`` of every row, (out,) float64."""
    d = difference.double()
    return (d @ H.double() * d).sum(1)


def least_squares(target: Tensor, mask: Tensor, H: Tensor) -> Tensor:
    """Normal equations on each row's support: the optimum of ``(w − ŵ) H (w − ŵ)ᵀ`` with ŵ zero off the mask."""
    target, H = target.double(), H.double()
    solution = torch.zeros_like(target)
    for row, kept in enumerate(mask):
        support = kept.nonzero().flatten()
        if len(support):
            solution[row, support] = torch.linalg.solve(H[support][:, support], H[support] @ target[row])
    return solution


def floor_of(sparsity: float, total: int) -> int:
    """floor(s · total) with s as the decimal that was written."""
    product = Fraction(str(sparsity)) * total
    return product.numerator // product.denominator


def first_lowest(scores: Tensor, count: int) -> Tensor:
    """True at the `count` lowest of a flat list of scores, equal ones by index: a full sort in Python."""
    order = sorted(range(scores.numel()), key=lambda index: (float(scores[index]), index))
    chosen = torch.zeros(scores.numel(), dtype=torch.bool)
    chosen[order[:count]] = True
    return chosen


def lowest_by_row(scores: Tensor, count: int) -> Tensor:
    """`first_lowest` in every row."""
    return torch.stack([first_lowest(row, count) for row in scores])


def lowest_by_group(scores: Tensor, kept: int, group: int) -> Tensor:
    """`first_lowest` among every `group` consecutive columns of a row, leaving `kept`."""
    chosen = [torch.cat([first_lowest(part, group - kept) for part in row.split(group)]) for row in scores]
    return torch.stack(chosen)


def group_zeros(state: LinearState, group: int) -> Tensor:
    """(out, in / group) how many weights the mask prunes in each group."""
    assert state.mask is not None
    return torch.stack([(~part).sum(1) for part in state.mask.split(group, dim=1)], dim=1)
