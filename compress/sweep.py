"""One walk over the decoder blocks: the passes that share it, invariants after each, the journal after every block.

Read `Sweep.carry_out`, then `block` and `_compress`.
"""

from __future__ import annotations

import time
from statistics import fmean
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from compress.architecture import of_block
from compress.calibration.collect import BlockStatistics
from compress.calibration.moments import Moments, Statistics
from compress.checkpoint import DTYPES, Shard, lay_out, slots_of, write_shard
from compress.distributed import Job, assign
from compress.errors import CompressError
from compress.flows import Flows
from compress.invariants import check_invariants
from compress.ledger import ledger_line, pruned, relative_error
from compress.memory import peak_memory, trim
from compress.passes.base import BlockPass, BlockState, Pass, SettingError
from compress.reconstruct import BlockForward
from compress.redo import mend
from compress.report import BlockLine, LedgerLine
from compress.spread import spread_of
from compress.state import LinearState, in_dtype, kept_low_rank, kept_of, kept_weight
from compress.training_store import TrainingStore
from compress.walk import Walk

if TYPE_CHECKING:
    from compress.execution import Execution
    from compress.flows import Activations
    from compress.lock import Linear, Lock

Surveyed = dict[int, dict[str, dict[str, Any]]]  # settings that surveys found, by pass and linear


class Sweep:
    """One sweep of an execution."""

    def __init__(self, run: Execution, number: int) -> None:
        """`number`: which sweep of the lock."""
        self.run, self.number = run, number
        self.lock, self.work, self.mode, self.skeleton = run.lock, run.work, run.mode, run.skeleton
        self.surveyed: Surveyed = {}
        self.spread: list[dict[str, int]] | None = None  # block by block, what a pass keeps once it has scored them
        self.flows = Flows(self)

    def carry_out(self) -> None:
        """Walk over the blocks once, from where the journal ends."""
        lock = self.lock
        needed = any(lock.statistics(linear, self.number) for linear in lock.linears)
        needed = needed or any(one.learns() for _, one in lock.block_passes(self.number))
        if not self.work.following:
            mend(self, needed=needed)
        entries = self.work.entries("block", sweep=self.number)
        first = len(entries)
        if first == lock.blocks:
            return
        names = [lock.plan.passes[index].use() for index in lock.sweeps[self.number]]
        self.run.progress.sweep(self.number, len(lock.sweeps), first, names)
        self.surveyed = self.survey()
        self.spread = spread_of(lock, self.number, self.run.kept)
        self.run.world.announce(self.number)
        self.run.world.together = True
        flow = self.flows.first(entries) if needed else None
        for index in range(first, lock.blocks):
            began = time.perf_counter()
            self.skeleton.expect(index + 1)
            flow, ledger, artifact = self.block(index, flow)
            seconds = time.perf_counter() - began
            self._commit(index, flow, ledger, artifact, seconds)
            self._show(index, ledger, seconds)
            del artifact  # the journal's now
            trim(4 * sum(linear.weights for linear in lock.in_block(index)))
        self.run.world.together = False

    def survey(self) -> Surveyed:
        """Settings that passes of this sweep draw from the whole model, by pass and linear; journaled."""
        found: Surveyed = {}
        for index in self.lock.sweeps[self.number]:
            chosen = [lin for lin in self.lock.linears if _surveys(self.lock, lin, self.number, index)]
            if not chosen:
                continue
            known = self.work.entries("survey", sweep=self.number, index=index)
            if not known:
                states = lambda: (self.state(linear) for linear in chosen)  # noqa: B023, E731
                survey = dict(chosen[0].passes)[index].survey(states)  # type: ignore[attr-defined]
                known = [{"kind": "survey", "sweep": self.number, "index": index, "settings": survey}]
                self.work.append(known[0])
            found[index] = known[0]["settings"]
        return found

    # ------------------------------------------------------------------ block

    def block(
        self, index: int, flow: Activations | None
    ) -> tuple[Activations | None, list[LedgerLine], dict[str, Tensor]]:
        """Compress one block; returns the activations behind it, its ledger and what the journal keeps."""
        lock, prefix = self.lock, self.skeleton.prefix(index)
        if not self.mode.overlap:
            self.work.flush()
        before = self.run.kept(self.number - 1, index)
        linears = [linear for linear in lock.in_block(index) if lock.passes(linear, self.number)]
        subsets = [[lin for lin in linears if lin.subset == n] for n in sorted({lin.subset for lin in linears})]
        measured = [subset for subset in subsets if max(lock.statistics(lin, self.number) for lin in subset)]
        artifact, ledger = dict(before), []
        with self.skeleton.block(index, self.as_parameters(index, before)) as module:
            stops = [tuple(lin.name.removeprefix(prefix) for lin in subset) for subset in measured]
            with self._walk(module, index, stops, flow) as walk:
                statistics = BlockStatistics(self, measured, walk)
                for number, one in lock.block_passes(self.number):
                    ledger += self._transform(index, number, one, module, statistics, artifact, flow)
                for group in [[subset] for subset in subsets] if statistics.anew else [subsets]:
                    ledger += self._solve(index, module, group, statistics, artifact)
                after = self.flows.outputs(index, walk) if flow and index + 1 < lock.blocks else None
        return after, ledger, artifact

    def replayed(self, index: int, flow: Activations, kept: dict[str, Tensor]) -> Activations:
        """The activations behind a block that is finished, as it left them; `kept`: what the journal keeps of it."""
        there = {name: tensor.to(self.mode.device) for name, tensor in kept.items()}  # where products were made
        with (
            self.skeleton.block(index, self.as_parameters(index, there)) as module,
            self._walk(module, index, [], flow) as walk,
        ):
            return self.flows.outputs(index, walk)

    def _solve(
        self,
        index: int,
        module: nn.Module,
        group: list[list[Linear]],
        statistics: BlockStatistics,
        artifact: dict[str, Tensor],
    ) -> list[LedgerLine]:
        """Compress the linears of subsets whose inputs are known, each in one of the processes, for all of them."""
        todo = [linear for subset in group for linear in subset if self.lock.linear_passes(linear, self.number)]
        owners = assign([self._job(linear) for linear in todo], self.run.world.size)
        mine = {linear.name for linear, owner in zip(todo, owners, strict=True) if owner == self.run.world.rank}
        lines: dict[str, list[LedgerLine]] = {}
        for subset in group:
            shared = statistics.of(subset)
            self._make_room(index)
            for linear in subset:
                if linear.name in mine:
                    state = self.state(linear, artifact)
                    lines[linear.name] = self._compress(linear, state, shared)
                    self._keep(state, artifact)
                    self._write_back(module, linear, state)
            del shared
        made = {key: tensor for key, tensor in artifact.items() if key.rpartition(":")[0] in mine}
        told = self._exchange(index, module, artifact, made, lines)
        lines = {name: some for one in told for name, some in one.items()}
        return [line for linear in todo for line in lines[linear.name]]

    def _job(self, linear: Linear) -> Job:
        """What it costs to compress a linear, in multiplications: with a Gram matrix, its factor is shared."""
        if self.lock.statistics(linear, self.number) is Statistics.GRAM:
            square = linear.in_features**2
            return Job(
                (linear.block, linear.subset), float(linear.out_features * square), float(linear.in_features * square)
            )
        return Job(linear.name, float(linear.weights))

    def _exchange(
        self,
        index: int,
        module: nn.Module,
        artifact: dict[str, Tensor],
        made: dict[str, Tensor],
        note: Any = None,
    ) -> list[Any]:
        """Put what each process made into the artifact and the module of all; returns the note of each."""
        found, notes = self.run.world.exchange(made, note)
        foreign = {key: tensor for key, tensor in found.items() if key not in made}
        for name in {key.rpartition(":")[0] for key in foreign}:
            for key in kept_of(name, artifact):
                del artifact[key]
        artifact |= foreign
        for name, value in self.as_parameters(index, foreign).items():
            self._put(module, index, name, value)
        return notes

    def _make_room(self, index: int) -> None:
        """Before solving: the block before was written during the forward, whose own leftovers can go, too."""
        self.work.flush()
        trim(4 * sum(linear.weights for linear in self.lock.in_block(index)))

    def _walk(self, module: nn.Module, index: int, stops: list[tuple[str, ...]], flow: Activations | None) -> Walk:
        calls = [self.skeleton.calls(*shape[:2])[index] for shape in flow.shapes] if flow else []
        pause = self.mode.pause and self.lock.plan.run.refresh == "subset"
        return Walk(module, stops, calls, flow, pause=pause)

    def state(self, linear: Linear, before: dict[str, Tensor] | None = None) -> LinearState:
        """A linear as this sweep finds it, in float32; `before`: what is kept of its block so far."""
        stored = self.lock.checkpoint.read(linear.stored)
        dense = (stored.T if linear.transposed else stored).to(self.mode.device).float().contiguous()
        state = LinearState(linear.name, dense, dense, stored.dtype, fisher=self.run.fisher_of(linear))
        mine = kept_of(linear.name, self.run.kept(self.number - 1, linear.block) if before is None else before)
        if mine:
            state.restore({name: tensor.to(self.mode.device) for name, tensor in mine.items()})
        return state

    def _transform(
        self,
        index: int,
        number: int,
        one: BlockPass,
        module: nn.Module,
        statistics: BlockStatistics,
        artifact: dict[str, Tensor],
        flow: Activations | None,
    ) -> list[LedgerLine]:
        """Apply a block pass; linears, norms and biases that it changed go into the artifact and the module."""
        lock, prefix = self.lock, self.skeleton.prefix(index)
        linears = {lin.name.removeprefix(prefix): lin for lin in lock.in_block(index) if number in dict(lin.passes)}
        states = {name: self.state(linear, artifact) for name, linear in linears.items()}
        weights = {f"{name}.weight" for name in linears}
        block = BlockState(
            architecture=lock.architecture,
            config=of_block(lock.config, index),
            linears=states,
            moments={name: statistics.beforehand(linear) for name, linear in linears.items()},
            parameters={
                name: value.detach().float().clone() for name, value in module.named_parameters() if name not in weights
            },
            followers={name: _quantizer(linear, number) for name, linear in linears.items()},
            forward=BlockForward(self, index, number, module, flow) if one.learns() and flow else None,
            spread=self.spread[index] if self.spread else None,
        )
        untouched, masks = dict(block.parameters), {name: state.mask for name, state in states.items()}
        errors = {name: relative_error(block.moments[name], state) for name, state in states.items()}
        began = time.perf_counter()
        try:
            notes = one.apply(block)
        except SettingError as problem:
            raise lock.plan.refusal(number, problem) from None
        except CompressError as problem:
            place = f"{one.use()} on block {index}"
            problem.where = f"{place}, {problem.where}" if problem.where else place
            raise
        seconds = (time.perf_counter() - began) / max(1, len(linears))
        lines = []
        for name, linear in linears.items():
            state, moments = states[name], block.moments[name]
            check_invariants(linear, number, state, masks[name])
            lines.append(
                ledger_line(
                    self.number, number, one, linear, state, moments, errors[name], notes.get(name, {}), seconds
                )
            )
            self._keep(state, artifact)
            self._write_back(module, linear, state)
        for name, value in block.parameters.items():
            if value is not untouched[name]:
                stored = self.lock.checkpoint.tensors[self.skeleton.stored[prefix + name]].torch_dtype
                artifact[f"{prefix}{name}:parameter"] = in_dtype(value, stored, prefix + name)
                self._put(module, index, prefix + name, artifact[f"{prefix}{name}:parameter"])
        artifact |= {prefix + key: value.cpu() for key, value in block.found.items()}
        self._exchange(index, module, artifact, {} if self.run.world.rank else artifact)
        statistics.changed(block, learned=one.learns())
        return [] if one.scores() and self.spread is None else lines  # of a look that changes nothing

    def _compress(self, linear: Linear, state: LinearState, moments: Moments) -> list[LedgerLine]:
        """Apply the sweep's passes to one linear, check what they promise and note what they did."""
        lines: list[LedgerLine] = []
        error = relative_error(moments, state)
        for index, one in self.lock.linear_passes(linear, self.number):
            began = time.perf_counter()
            one = one.with_settings(self.surveyed.get(index, {}).get(linear.name, {}))
            mask = state.mask
            try:
                note = one.apply(state, moments)
            except CompressError as problem:
                problem.where = problem.where or f"{one.use()} on {linear.name}"
                raise
            check_invariants(linear, index, state, mask, one)
            seconds = time.perf_counter() - began
            lines.append(ledger_line(self.number, index, one, linear, state, moments, error, note, seconds))
            error = lines[-1].error_after or 0.0
        state.settle()
        return lines

    def _keep(self, state: LinearState, artifact: dict[str, Tensor]) -> None:
        """Put the state of a linear in the place of what the artifact had of it."""
        for key in kept_of(state.name, artifact):
            del artifact[key]
        artifact |= state.tensors()

    def _write_back(self, module: nn.Module, linear: Linear, state: LinearState) -> None:
        """What the rest of the block computes with from now on: the weight as it will be written."""
        # Settled, the weight is masked already; without a branch the journal's artifact and the module share it.
        weight = state.weight if state.low_rank is None else state.effective()
        self._put(module, linear.block, f"{linear.name}.weight", weight.T if linear.transposed else weight)

    def _put(self, module: nn.Module, index: int, name: str, value: Tensor) -> None:
        """Have a block compute with another value of a parameter, by its full name."""
        owner, _, leaf = name.removeprefix(self.skeleton.prefix(index)).rpartition(".")
        value = value.contiguous().to(self.mode.device, self.mode.dtype)
        module.get_submodule(owner).register_parameter(leaf, nn.Parameter(value, requires_grad=False))

    # ---------------------------------------------------------------- journal

    def _commit(
        self,
        index: int,
        flow: Activations | None,
        ledger: list[LedgerLine],
        artifact: dict[str, Tensor],
        seconds: float,
    ) -> None:
        """Hand what the block became to the writing thread, and let the journal vouch for it."""
        self.work.flush()  # at most one block behind
        others = self.flows.settle(flow)
        if self.work.following:
            return
        directory = self.work.directory
        (shard,) = lay_out(slots_of(artifact), 1 << 62)
        shard = Shard(f"block-{self.number}-{index:05d}.safetensors", shard.slots)
        peak = peak_memory(self.mode.device)
        line = BlockLine(sweep=self.number, index=index, seconds=seconds, peak_memory_bytes=peak)

        def entry() -> dict[str, Any]:
            checksum = write_shard(shard, directory, artifact, synced=False)
            return {
                "kind": "block",
                "sweep": self.number,
                "block": index,
                "file": shard.file,
                "sha256": checksum,
                "ledger": [line.model_dump(mode="json") for line in ledger],
                "line": line.model_dump(mode="json"),
                "activations": [flow.entry, *others] if flow else None,
            }

        files = (directory / shard.file, *([flow.path] if flow else []))
        stores = [
            TrainingStore(self.run, self.number, number, index) for number, _ in self.lock.block_passes(self.number)
        ]
        obsolete = (*self.flows.files(index), *(path for store in stores for path in store.files()))
        self.work.append_later(entry, files=files, obsolete=obsolete)

    def as_parameters(self, index: int, kept: dict[str, Tensor]) -> dict[str, Tensor]:
        """What the journal keeps of a block, as values for its parameters."""
        values = {key.rpartition(":")[0]: value for key, value in kept.items() if key.endswith(":parameter")}
        for linear in self.lock.in_block(index):
            if kept_of(linear.name, kept):
                weight = kept_weight(linear.name, kept, DTYPES[linear.dtype])
                branch = kept_low_rank(linear.name, kept)
                weight = weight if branch is None else weight.float() + branch.product()
                values[f"{linear.name}.weight"] = weight.T if linear.transposed else weight
        return values

    def _show(self, index: int, ledger: list[LedgerLine], seconds: float) -> None:
        errors: dict[str, list[float]] = {}
        for line in ledger:
            errors.setdefault(line.use, []).append(line.error_after or 0.0)
        means = {use: fmean(values) for use, values in errors.items()}
        self.run.progress.block(index, self.lock.blocks, means, pruned(ledger), seconds)


def _quantizer(linear: Linear, after: int) -> Pass | None:
    """The pass that will put a linear on a grid."""
    return next((one for index, one in linear.passes if index > after and one.grid() is not None), None)


def _surveys(lock: Lock, linear: Linear, sweep: int, index: int) -> bool:
    return any(i == index and p.surveys() for i, p in lock.linear_passes(linear, sweep))
