"""What trainings and gradients hold in memory, counted from the shapes in the lock; see `compress.estimate`."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from compress.calibration.moments import gram_entries
from compress.passes.loraprune import LoRAPrune
from compress.passes.peqa import PEQA
from compress.passes.perp import PERP
from compress.training import Training

if TYPE_CHECKING:
    from collections.abc import Iterable

    from compress.lock import Linear, Lock
    from compress.passes.base import Pass

OPTIMIZER_IMPORTS = 150 << 20  # what torch imports when it makes the first optimizer


def training(lock: Lock, parameters: int) -> int:
    """Bytes of the largest pass over the whole model: float32 models, the states, what a batch leaves behind.

    Args:
        lock: of the stage.
        parameters: of its model.
    """
    vocabulary = lock.skeleton.model.get_input_embeddings().num_embeddings
    most = 0
    for index in lock.stage:
        one = lock.plan.passes[index]
        if one.barrier():
            models = 2 if getattr(one, "distill", 0) or getattr(one, "hidden", 0) else 1
            teacher = (models - 1) * (_parameters(lock.root) if lock.before else parameters)
            states = _states(lock.linears, one) + _learned(lock, index, lock.linears)
            if "weights" in getattr(one, "trained", ()):  # of embeddings and head, too
                states += 16 * (parameters - sum(linear.weights for linear in lock.linears))
            logits = 5 if models == 1 else 12  # of the loss and its gradient; with distillation log p and log q, too
            left = 4 * _tokens(lock, one) * (_inside(lock, one, lock.blocks) + logits * vocabulary)
            gathered, solving = refitting(lock, one)
            imports = OPTIMIZER_IMPORTS * isinstance(one, Training)
            most = max(most, imports + 4 * (parameters + teacher) + states + max(left, solving) + gathered)
    return most


def reconstruction(lock: Lock, block: int) -> int:
    """Bytes of the largest training of one block: the block, copies of it and of the dense one, the states, a batch.

    Args:
        lock: of the stage.
        block: bytes of the largest block in float32.
    """
    most = 0
    for sweep in range(len(lock.sweeps)):
        for index, one in lock.block_passes(sweep):
            if not one.learns():
                continue
            for number in range(lock.blocks):
                mine = [linear for linear in lock.in_block(number) if index in dict(linear.passes)]
                states = _states(mine, one) + 4 * sum(n.weights for n in mine) + _learned(lock, index, mine)
                left = 2 * 4 * _tokens(lock, one) * _inside(lock, one, 1)  # the dense block makes as much
                most = max(most, OPTIMIZER_IMPORTS + 3 * block + states + left)
    return most


def wanting(lock: Lock) -> list[Linear]:
    """The linears of which the Fisher information is taken."""
    return [linear for linear in lock.linears if any(one.needs_fisher() for _, one in linear.passes)]


def fisher(lock: Lock, parameters: int) -> int:
    """Bytes of the dense model in float32, the sums and one gradient, and what a sequence leaves behind.

    Args:
        lock: of the stage.
        parameters: of its model.
    """
    linears, calibration = wanting(lock), lock.plan.calibration
    held = parameters + sum(linear.weights * (1 + linear.transposed) for linear in linears)
    held += 2 * max(linear.weights for linear in linears)
    vocabulary = lock.skeleton.model.get_input_embeddings().num_embeddings
    left = _inside(lock, None, lock.blocks) + 5 * vocabulary
    length = calibration.length if calibration else 0
    total: int = 4 * (held + length * left)
    return total


def _states(linears: Iterable[Linear], one: Pass) -> int:
    """Bytes of linears in a training: dense and current in float32, the mask, what the journal keeps, and what it adds.

    A form that makes another weight in each forward keeps it for the backward, which has the gradients of one beside.
    """
    made = isinstance(one, PEQA) or (isinstance(one, PERP) and one.form not in ("lora", "fixed"))
    more = 8 if isinstance(one, PEQA) else 4 * (made or isinstance(one, LoRAPrune))  # and the steps of the codes
    total = most = 0
    for linear in linears:
        total += (12 + more + linear.masked) * linear.weights + linear.weights // 8
        most = max(most, linear.weights)
    return total + 12 * most * made


def _learned(lock: Lock, index: int, linears: Iterable[Linear]) -> int:
    """Bytes of what a pass learns of linears: the values, their gradient, both moments of AdamW and the best ones."""
    one = lock.plan.passes[index]
    if not isinstance(one, Training):
        return 0
    return 20 * sum(one.learned(linear) for linear in linears if index in dict(linear.passes))


def _tokens(lock: Lock, one: Pass) -> int:
    calibration = lock.plan.calibration
    return (calibration.length if calibration else 0) * getattr(one, "batch_size", 1)


def _inside(lock: Lock, one: Pass | None, blocks: int) -> int:
    """Values per token that blocks leave for the backward."""
    width, inner = lock.skeleton.width, max(linear.out_features for linear in lock.linears)
    merged = isinstance(one, LoRAPrune)  # every linear has a branch while it trains, and masked inputs
    widest = max((lock.in_block(block) for block in range(lock.blocks)), key=lambda some: sum(n.weights for n in some))
    beside = sum(n.out_features for n in widest if n.rank or merged)  # what branches add to
    inside: int = 12 * width + 4 * inner + beside + merged * (inner + width)
    return blocks * width + inside if getattr(one, "gradient_checkpointing", False) else blocks * inside


def refitting(lock: Lock, one: Pass) -> tuple[int, int]:
    """Bytes of the second moments that a training keeps until it has masked all, and of the largest least squares."""
    readers = refitted(lock, one)
    if not readers:
        return 0, 0
    most = max(readers, key=lambda n: n.in_features)
    # H whole, damped and of the columns that stay, with its factor; the weight as it was, as it is and what it loses.
    return 8 * sum(gram_entries(n.in_features) for n in readers), 36 * most.in_features**2 + 32 * most.weights


def refitted(lock: Lock, one: Pass) -> list[Linear]:
    """The linears that a training refits."""
    names = one.readers(lock.architecture) if isinstance(one, LoRAPrune) and one.update else ()
    return [n for n in lock.linears if n.name.removeprefix(lock.skeleton.prefix(n.block)) in names]


def _parameters(lock: Lock) -> int:
    tensors = lock.checkpoint.tensors
    return sum(math.prod(tensors[stored].shape) for stored in set(lock.skeleton.stored.values()))
