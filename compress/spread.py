"""How many units each block keeps, where all blocks together are to keep a number of them.

Units of a block compete with those of the others by scores that have been made comparable. A block keeps its best
units, a multiple of `step` of them and at least that many: so units go by their ranks in their block into groups of
`step`, and the groups of the largest mean score are kept, of each block the first in any case.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from torch import Tensor

    from compress.lock import Lock


def spread(scores: Sequence[Tensor], total: int, step: int) -> list[int]:
    """How many units of each block are kept.

    Args:
        scores: of each block (units,), comparable between blocks; the larger, the more a unit matters.
        total: how many all blocks keep, a multiple of `step` between one `step` a block and all whole ones there are.
        step: what the number that a block keeps is a multiple of.

    Returns:
        numbers that add up to `total`.
    """
    groups = []
    for block, own in enumerate(scores):
        best = own.double().sort(descending=True).values
        means = best[: len(best) // step * step].view(-1, step).mean(1)
        groups += [(-mean if rank else -float("inf"), rank, block) for rank, mean in enumerate(means.tolist())]
    kept = [block for _, _, block in sorted(groups)[: total // step]]
    return [kept.count(block) * step for block in range(len(scores))]


def shares(scores: Tensor) -> Tensor:
    """Scores (units,) of one block as shares of what all of its units have.

    FLAP (arXiv 2312.11983) subtracts the mean and divides by the deviation instead. That spared a block of which half
    does nothing: with a mean between its halves, the useless ones come out as no worse than any block's worst.
    """
    scores = scores.double()
    return scores / scores.sum().clamp_min(1e-30)


def spread_of(lock: Lock, sweep: int, kept: Callable[[int, int], dict[str, Tensor]]) -> list[dict[str, int]] | None:
    """Block by block how many units of each kind are kept, in the second of a pass's two sweeps; None in any other.

    Args:
        lock: of the stage.
        sweep: which sweep.
        kept: reads what the journal keeps of a block after a sweep.
    """
    from compress.passes.structured import Narrowing  # here, since its passes use this module

    index = lock.sweeps[sweep][0]
    one = lock.plan.passes[index]
    if not isinstance(one, Narrowing) or lock.left is None or sweep == lock.sweep_of(index):
        return None
    states = [kept(sweep - 1, block) for block in range(lock.blocks)]
    numbers = {
        name: spread(
            [state[f"{lock.skeleton.prefix(block)}{name}:score"] for block, state in enumerate(states)],
            lock.left.total(name),
            one.step(name),
        )
        for name in lock.left.different
    }
    return [{name: counts[block] for name, counts in numbers.items()} for block in range(lock.blocks)]
