"""One configuration for each matrix under a budget of bits, by an integer program (Guo et al. 2023, arXiv 2311.12023).

``min Σ_i Σ_c e_ic x_ic`` with ``Σ_c x_ic = 1``, ``Σ_ic b_ic x_ic ≤ B`` and x binary, solved by HiGHS through scipy.
"""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np

from compress.errors import RunError
from compress.passes.base import SettingError

# Branch and bound ends after so many nodes with the best found by then: a number of nodes, not of seconds, so that the
# same plan gives the same bytes.
NODES = 100_000
GAP = 1e-4  # of the optimum; errors of a survey are not that exact
SHARPNESS = 1e3  # the largest difference of errors as the solver sees it, which resolves 1e-6
TRIES = 10


def allocate(errors: list[list[float]], costs: list[list[int]], limit: int) -> list[int]:
    """One configuration of each matrix: the least sum of errors with ``Σ costs ≤ limit``, which must be feasible.

    Args:
        errors: of each matrix, by configuration.
        costs: their bits.
        limit: of all matrices together.
    """
    from scipy.optimize import Bounds, LinearConstraint, milp

    sizes = [len(row) for row in errors]
    owner = np.repeat(np.arange(len(sizes)), sizes)
    one_each = (owner == np.arange(len(sizes))[:, None]).astype(float)  # (matrices, variables)
    # The solver's tolerances are absolute, so both are in units of what matters, above the least of each matrix.
    room = limit - sum(map(min, costs))
    extra = np.concatenate([np.array([cost - min(row) for cost in row], dtype=float) for row in costs])
    worse = np.concatenate([np.array(row) - min(row) for row in errors])
    worse *= SHARPNESS / (worse.max() or 1.0)
    affordable = (extra <= room).astype(float)
    extra *= affordable / max(room, 1)
    allowed = 1.0
    for _ in range(TRIES):
        result = milp(
            worse,
            integrality=np.ones(len(worse)),
            bounds=Bounds(0, affordable),
            constraints=[LinearConstraint(one_each, 1, 1), LinearConstraint(extra[None], -np.inf, allowed)],
            options={"mip_rel_gap": GAP, "node_limit": NODES},
        )
        if result.x is None:
            break
        chosen = [int(part.argmax()) for part in np.split(result.x, np.cumsum(sizes)[:-1])]
        excess = sum(row[place] for row, place in zip(costs, chosen, strict=True)) - limit
        if excess <= 0:
            return chosen
        allowed -= excess / max(room, 1)  # within the solver's tolerance is not within the budget
    raise RunError(f"the integer program was not solved: {result.message}", fix="give fewer choices_…")


def check_budget(budget: float, costs: list[list[int]], weights: int) -> None:
    """Raise SettingError when even the cheapest configurations are too many bits."""
    least = sum(map(min, costs))
    if least > Fraction(str(budget)) * weights:
        smallest = math.ceil(Fraction(10_000 * least, weights)) / 10_000
        raise SettingError(
            f"no configuration meets budget = {budget:g}: the cheapest takes {least / weights:.4f} bits per weight",
            f"budget = {smallest} or more, a lower rank, or smaller choices_…",
            ("budget",),
        )
