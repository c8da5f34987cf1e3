"""One block, trained towards what its dense self makes of the same inputs."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from compress.distributed import OwnShare
from compress.training_store import TrainingStore

if TYPE_CHECKING:
    from compress.adapting import AdaptedLinear
    from compress.distributed import Share, World
    from compress.flows import Activations
    from compress.sweep import Sweep


class BlockForward:
    """Runs a copy of a block that learns, and the dense block, on the inputs of chosen samples."""

    def __init__(self, sweep: Sweep, index: int, number: int, module: nn.Module, flow: Activations) -> None:
        """`number`: of the pass; `module`: the block as it is now, with weights; `flow`: its inputs."""
        self.sweep, self.index, self.flow = sweep, index, flow
        assert sweep.run.tokens is not None
        self.samples = len(sweep.run.tokens.ids)
        self._own = sweep.run.part[1]
        self.store = TrainingStore(sweep.run, sweep.number, number, index)
        self.learning = _apart(module)
        with sweep.skeleton.dense_block(index) as dense:
            self._dense = _apart(dense)
        self._inputs = torch.cat([flow.get(batch, sweep.mode.device) for batch in range(len(flow.shapes))])
        self.share = self._shared(sweep.run.world)

    def _shared(self, world: World) -> Share:
        """What of a batch this process takes. The loss is a quotient: samples weigh what they have below the line."""
        sizes = torch.zeros(self.samples, dtype=torch.float64, device=world.device)
        for sample in range(self._own.start, self._own.stop):
            sizes[sample] = self._wanted(torch.tensor([sample])).square().sum()
        world.sum(sizes)
        return OwnShare(world, self._own, lambda chosen: float(sizes[chosen].sum()))

    def install(self, modules: dict[str, AdaptedLinear]) -> dict[str, nn.Parameter]:
        """Put adapted linears into the copy; returns its other parameters by name in the block."""
        for name, module in modules.items():
            parent, _, leaf = name.rpartition(".")
            setattr(self.learning.get_submodule(parent), leaf, module)
        self.learning.requires_grad_(False)
        inside = {id(p) for module in modules.values() for p in (x for _, x in module.trained())}
        return {name: p for name, p in self.learning.named_parameters() if id(p) not in inside}

    def loss(self, chosen: Tensor) -> Tensor:
        """``‖f(x) − f_dense(x)‖² / ‖f_dense(x)‖²`` over the real tokens of samples, by their indices."""
        wanted = self._wanted(chosen)
        loss: Tensor = (self._run(self.learning, chosen) - wanted).square().sum() / wanted.square().sum()
        return loss

    def _wanted(self, chosen: Tensor) -> Tensor:
        with torch.no_grad():
            return self._run(self._dense, chosen)

    def _run(self, block: nn.Module, chosen: Tensor) -> Tensor:
        """A block's outputs (tokens, hidden) for the real tokens of this process's samples."""
        x = self._inputs[chosen - self._own.start].float()
        real = self.sweep.run.share.mask[chosen - self._own.start].to(x.device)
        args, kwargs = self.sweep.skeleton.calls(*x.shape[:2])[self.index]
        output: Tensor = block(x, *args, **kwargs)
        return output[real]


def _apart(block: nn.Module) -> nn.Module:
    """A copy of a block in float32, without the hooks by which the walk stops it."""
    apart = copy.deepcopy(block).float()
    for module in apart.modules():
        module._forward_pre_hooks.clear()
    return apart
