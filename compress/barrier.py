"""A pass over the whole model, between sweeps: the model is built with what the sweeps before made of it.

`WholeModel` is what the pass gets. What it changed goes into the journal block by block, like a sweep's result, so all
that comes later, sweeps, export, a resumed run, finds it in the same place.
"""

from __future__ import annotations

import copy
import time
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from compress.adapting import AdaptedLinear, Form
from compress.checkpoint import Shard, lay_out, slots_of, write_shard
from compress.distributed import World, whole
from compress.errors import CompressError, RunError
from compress.invariants import check_invariants
from compress.ledger import NOTHING, ledger_line, relative_error
from compress.memory import peak_memory
from compress.passes.base import ModelPass, SettingError
from compress.report import BlockLine, LedgerLine
from compress.state import LinearState, in_dtype, kept_of
from compress.sweep import Sweep
from compress.training import Training
from compress.training_store import TrainingStore

if TYPE_CHECKING:
    from collections.abc import Callable

    from compress.calibration.tokens import TokenSet
    from compress.execution import Execution
    from compress.lock import Lock

OUTSIDE = -1  # the "block" of parameters that belong to none


@dataclass
class WholeModel:
    """The model, in memory, for a pass that needs all of it.

    Attributes:
        module: the transformers model in float32, evaluation mode, no gradients; linears in blocks are `AdaptedLinear`.
        states: linear → state, for the linears that the pass targets.
        tokens: the calibration set.
        store: keeps a training's state in the journal.
        world: the processes that train together.
        changed: names of parameters outside linears' weights that the pass changed.
        found: block → what structured pruning finds, by the keys of `compress.structure` within the block.
    """

    lock: Lock
    module: nn.Module
    states: dict[str, LinearState]
    tokens: TokenSet
    device: torch.device
    store: TrainingStore
    world: World
    changed: set[str] = field(default_factory=set)
    found: dict[int, dict[str, Tensor]] = field(default_factory=dict)

    def adapt(
        self, form: Form, *, rank: int, alpha: float, seed: int, extend: bool = False
    ) -> dict[str, AdaptedLinear]:
        """Have every targeted linear learn in a form; returns them by name."""
        made = {}
        for number, (name, state) in enumerate(self.states.items()):
            old = self.module.get_submodule(name)
            made[name] = AdaptedLinear(
                state, _bias(old), form, rank=rank, alpha=alpha, seed=seed + number, extend=extend
            )
            self.put(name, made[name])
        return made

    def put(self, name: str, module: nn.Module) -> None:
        """Put a module in the place of another."""
        parent, _, leaf = name.rpartition(".")
        setattr(self.module.get_submodule(parent), leaf, module)

    def checkpoint_blocks(self) -> None:
        """Have the blocks run again in the backward pass, instead of keeping what they computed.

        Not by transformers' own switch: that works in training mode only, which turns dropout on.
        """
        for block in self._blocks(self.module):
            block.forward = partial(checkpoint, block.forward, use_reentrant=False, preserve_rng_state=False)

    def logits(
        self, ids: Tensor, *, hidden: bool = False, of: nn.Module | None = None
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Logits (rows, length, vocabulary) of token ids (rows, length), and the outputs of the blocks if wanted.

        Args:
            ids: of tokens.
            hidden: want the outputs of the blocks. transformers would give the last one after the final norm.
            of: another model of the same make, such as the dense one.
        """
        module, states = of or self.module, list[Tensor]()
        blocks = self._blocks(module) if hidden else []
        hooks = [block.register_forward_hook(lambda _, __, output: states.append(output)) for block in blocks]
        try:
            output = module(input_ids=ids.to(self.device), use_cache=False)
        finally:
            for hook in hooks:
                hook.remove()
        return output.logits, tuple(states)

    @property
    def blocks(self) -> list[nn.Module]:
        """The decoder blocks."""
        return self._blocks(self.module)

    def stream(self, ids: Tensor) -> list[Tensor]:
        """Of ids (rows, length), the residual stream (rows, length, hidden) before each block and after the last."""
        seen: list[Tensor] = []

        def look(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            seen.append(args[0] if args else kwargs["hidden_states"])

        hook = self.blocks[0].register_forward_pre_hook(look, with_kwargs=True)
        try:
            _, states = self.logits(ids, hidden=True)
        finally:
            hook.remove()
        return [*seen, *states]

    def blame(self, ids: Tensor) -> str | None:
        """The first layer whose output is not finite for token ids (rows, length); None when all are."""
        found: list[str] = []

        def watch(name: str) -> Callable[..., None]:
            def look(_: nn.Module, __: Any, output: Any) -> None:
                first = output[0] if isinstance(output, tuple) else output
                if not found and isinstance(first, Tensor) and not bool(torch.isfinite(first).all()):
                    found.append(name)

            return look

        hooks = [module.register_forward_hook(watch(name)) for name, module in self.module.named_modules() if name]
        try:
            with torch.no_grad():
                self.logits(ids)
        finally:
            for hook in hooks:
                hook.remove()
        return found[0] if found else None

    def _blocks(self, module: nn.Module) -> list[nn.Module]:
        return list(module.get_submodule(self.lock.architecture.blocks).children())

    def shard(self, teacher: nn.Module | None) -> None:
        """Have each process keep a share of the model, and of the dense one."""
        for module in (self.module, *([teacher] if teacher else [])):
            self.world.shard(module, self._blocks(module))

    def finish(self, modules: dict[str, AdaptedLinear]) -> None:
        """Settle the states of linears, block by block."""
        prefix = self.lock.architecture.blocks
        for number, block in enumerate(self._blocks(self.module)):
            self.world.gather(block)
            for name, module in modules.items():
                if name.startswith(f"{prefix}.{number}."):
                    module.finish()
            self.world.scatter(block)

    def dense(self) -> nn.Module:
        """The plan's model as it came, a second one in memory."""
        return build(self.lock.root, _building(self.world), {})


def _building(world: World) -> torch.device:
    """Where a model to be trained is built: in host memory, if each process is to keep a share of it only."""
    return world.device if world.size == 1 else torch.device("cpu")


def build(lock: Lock, device: torch.device, values: dict[str, Tensor]) -> nn.Module:
    """The transformers model in float32 with the checkpoint's weights, or `values` by full parameter name."""
    from transformers import AutoModelForCausalLM

    config = copy.deepcopy(lock.config)  # the constructor writes its choices into it
    if lock.skeleton.tied and not _same_head(lock):
        config.tie_word_embeddings = False  # as transformers loads it
    model = AutoModelForCausalLM.from_config(
        config, dtype=torch.float32, trust_remote_code=lock.plan.model.trust_remote_code
    ).eval()
    with torch.no_grad():
        tensors = dict(model.named_parameters(remove_duplicate=False)) | dict(model.named_buffers())
        for name, stored in lock.skeleton.stored.items():
            if name in tensors:
                tensors[name].copy_(values[name] if name in values else lock.checkpoint.read(stored))
    model.tie_weights()
    module: nn.Module = model.requires_grad_(False).to(device)
    return module


def _same_head(lock: Lock) -> bool:
    """Whether the file of a tied model has one tensor for head and embedding, or two that are equal."""
    skeleton = lock.skeleton
    head, embedding = skeleton.stored[skeleton.head], skeleton.stored[skeleton.embedding]
    return head == embedding or torch.equal(lock.checkpoint.read(head), lock.checkpoint.read(embedding))


class Barrier:
    """One pass over the whole model within an execution; `number` is its place among the sweeps."""

    def __init__(self, run: Execution, number: int) -> None:
        """The pass is the only one of its sweep."""
        self.run, self.number = run, number
        self.lock, self.work, self.mode = run.lock, run.work, run.mode
        (self.index,) = run.lock.sweeps[number]
        one = run.lock.plan.passes[self.index]
        assert isinstance(one, ModelPass)
        self.one = one

    def carry_out(self) -> None:
        """Build the model, apply the pass, and commit what it made of every block."""
        if not self.run.world.rank and self._is_done():
            return
        self.work.flush()
        self.run.world.announce(self.number)
        self.run.world.together = True
        self.run.progress.sweep(self.number, len(self.lock.sweeps), 0, [self.one.use()])
        base = self.lock.begins_with(self.number)
        before = {block: self.run.kept(base, block) for block in range(self.lock.blocks)}
        outside = self.run.kept_outside(base)
        model = self._model(before, outside)
        mask_before = {name: state.mask for name, state in model.states.items()}
        errors = {name: relative_error(NOTHING, state) for name, state in model.states.items()}
        began = time.perf_counter()
        try:
            notes = self.one.apply_model(model)
        except SettingError as problem:
            raise self.lock.plan.refusal(self.index, problem) from None
        except CompressError as problem:
            problem.where = f"{self.one.use()}, {problem.where}" if problem.where else self.one.use()
            raise
        seconds = time.perf_counter() - began
        parameters = dict(model.module.named_parameters(remove_duplicate=False))
        touched = {id(parameters[name]) for name in model.changed}  # a tied one goes by both of its names
        changed = {name: whole(p.detach()) for name, p in sorted(parameters.items()) if id(p) in touched}
        self.run.world.together = False
        if self.run.world.rank:
            return  # the first process commits
        self._commit_outside(outside, changed)
        for block in range(self.lock.blocks):
            self._commit_block(block, before[block], model, changed, mask_before, errors, notes, seconds)
        self.work.flush()
        model.store.forget()

    def _is_done(self) -> bool:
        """Whether all that the pass makes is in the journal, and there."""
        found = self.work.entries("block", sweep=self.number)
        damaged = [
            e["file"] for e in (*found, *self.work.entries("outside", sweep=self.number)) if not self.work.intact(e)
        ]
        if damaged:
            self.run.progress.say(f"  {', '.join(damaged)} of the journal: damaged, {self.one.use()} makes them again")
        if damaged and self.run.world.size > 1:
            self.work.forget_sweep(self.number)
            return False
        return len(found) == self.lock.blocks and not damaged

    def _model(self, before: dict[int, dict[str, Tensor]], outside: dict[str, Tensor]) -> WholeModel:
        """The model as the sweeps before left it."""
        lock, sweep, world = self.lock, Sweep(self.run, self.number), self.run.world
        place = _building(world) if isinstance(self.one, Training) else world.device
        sweep.mode = replace(sweep.mode, device=place)
        values = {key.rpartition(":")[0]: value for key, value in outside.items()}
        for block, kept in before.items():
            values |= sweep.as_parameters(block, kept)
        module = build(lock, place, values)
        states = {}
        for linear in lock.linears:
            state = sweep.state(linear, before[linear.block])
            if self.index in dict(linear.passes):
                states[linear.name] = state
            elif state.low_rank is not None or linear.transposed:
                old = module.get_submodule(linear.name)
                fixed = AdaptedLinear(state, _bias(old), "fixed", rank=1, alpha=1.0, seed=0)
                parent, _, leaf = linear.name.rpartition(".")
                setattr(module.get_submodule(parent), leaf, fixed)
        assert self.run.tokens is not None
        store = TrainingStore(self.run, self.number, self.index)
        return WholeModel(lock, module, states, self.run.tokens, self.mode.device, store, world)

    def _commit_outside(self, outside: dict[str, Tensor], changed: dict[str, Tensor]) -> None:
        """Parameters that belong to no block, as files will hold them."""
        kept = dict(outside)
        for name, value in changed.items():
            if name in self.lock.skeleton.outside:
                stored = self.lock.checkpoint.tensors[self.lock.skeleton.stored[name]].torch_dtype
                kept[f"{name}:parameter"] = in_dtype(value, stored, name).cpu()
        if kept:
            self._write("outside", OUTSIDE, kept, [], 0.0)

    def _commit_block(
        self,
        block: int,
        before: dict[str, Tensor],
        model: WholeModel,
        changed: dict[str, Tensor],
        mask_before: dict[str, Tensor | None],
        errors: dict[str, float],
        notes: dict[str, Any],
        seconds: float,
    ) -> None:
        """States and parameters of one block."""
        artifact, ledger = dict(before), []
        share = seconds / max(1, len(model.states))
        for linear in self.lock.in_block(block):
            state = model.states.get(linear.name)
            if state is None:
                continue
            check_invariants(linear, self.index, state, mask_before[linear.name])
            for key in kept_of(linear.name, artifact):
                del artifact[key]
            artifact |= {key: value.cpu() for key, value in state.tensors().items()}
            note, error = notes.get(linear.name, {}), errors[linear.name]
            ledger.append(ledger_line(self.number, self.index, self.one, linear, state, NOTHING, error, note, share))
        prefix = self.lock.skeleton.prefix(block)
        for name, value in changed.items():
            if name.startswith(prefix):
                stored = self.lock.checkpoint.tensors[self.lock.skeleton.stored[name]].torch_dtype
                artifact[f"{name}:parameter"] = in_dtype(value, stored, name).cpu()
        artifact |= {prefix + key: value.cpu() for key, value in model.found.get(block, {}).items()}
        self._write("block", block, artifact, ledger, share * len(ledger))

    def _write(
        self, kind: str, block: int, tensors: dict[str, Tensor], ledger: list[LedgerLine], seconds: float
    ) -> None:
        known = self.work.entries(kind, sweep=self.number, block=block)
        if known and self.work.intact(known[0]):  # a run that was stopped got so far
            return
        (shard,) = lay_out(slots_of(tensors), 1 << 62)
        name = f"{kind}-{self.number}-{max(block, 0):05d}.safetensors"
        shard = Shard(name, shard.slots)
        checksum = write_shard(shard, self.work.directory, tensors)
        if known and checksum != known[0]["sha256"]:
            self.work.forget_sweep(self.number)
            raise RunError(
                "a damaged file could not be made again as it was",
                where=str(self.work.directory / name),
                fix="run the same command: the pass starts over",
            )
        if known:
            return
        line = BlockLine(
            sweep=self.number, index=max(block, 0), seconds=seconds, peak_memory_bytes=peak_memory(self.mode.device)
        )
        entry = {
            "kind": kind,
            "sweep": self.number,
            "block": block,
            "file": name,
            "sha256": checksum,
            "ledger": [one.model_dump(mode="json") for one in ledger],
            "line": line.model_dump(mode="json"),
            "activations": None,
        }
        self.work.append(entry, files=(self.work.directory / name,))


def _bias(module: nn.Module) -> Tensor | None:
    bias = module.bias
    return bias if isinstance(bias, torch.Tensor) else None
