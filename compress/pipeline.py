"""The pass manager: one loop over decoder blocks per sweep, invariants after every pass, the journal after every block.

Read `run` first, then `_sweep`, `_block` and `_compress`. Everything that is decided before a weight is read is in
`compress.lock`; everything that survives a kill is in `compress.journal`.
"""

from __future__ import annotations

import shutil
import time
from dataclasses import dataclass, field
from statistics import fmean
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from compress.calibration.moments import Moments, Statistics
from compress.calibration.plan_source import make_tokens
from compress.calibration.tokens import TokenSet
from compress.checkpoint import DTYPES, Shard, lay_out, read_file, slots_of, write_shard
from compress.errors import CompressError, OutputError, PlanError, RunError
from compress.estimate import Mode, check_disk, choose_mode
from compress.export.huggingface import FinalTensors, export
from compress.export.verify import verify
from compress.invariants import check_invariants
from compress.journal import Workspace, file_checksum, work_directory
from compress.lock import Linear, Lock, compile_plan
from compress.memory import peak_memory, reset_peak_memory, tame_allocator, trim
from compress.outcome import assemble, emitted_lock, finished_report, identity, publish_report
from compress.passes.base import LinearPass
from compress.progress import Progress
from compress.report import BlockLine, LedgerLine, Report, VerifiedInfo
from compress.state import LinearState, kept_of, kept_weight
from compress.stream import Activations, Skeleton
from compress.walk import Walk, batch_rows

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from compress.plan import Plan


def run(plan: Plan, *, progress: Progress | None = None, restart: bool = False, overwrite: bool = False) -> Report:
    """Carry out a plan, or resume it where a run of the same plan was stopped.

    Args:
        plan: what to do.
        progress: where to show it; silent by default.
        restart: drop the journal of an unfinished run on the same output.
        overwrite: replace an output that an earlier run of compress wrote.

    Returns:
        the report; it, the plan and the lock lie beside the weights in the output directory.

    Raises:
        PlanError: the plan cannot be carried out; nothing was written.
        RunError: the run failed; its journal is kept and the same call resumes it.
    """
    progress = progress or Progress()
    progress.phase("check")
    lock = compile_plan(plan)
    mode = choose_mode(lock)
    output = plan.resolve(plan.run.output)
    known = identity(lock, mode.device)
    finished = finished_report(lock, known, output, overwrite=overwrite)
    if finished:
        if work_directory(output).is_dir():  # a kill between the last two steps left it
            Workspace(output).remove()
        progress.say(f"{output} already holds the result of this plan; compress eval measures it anew")
        return finished
    check_disk(lock)
    workspace = Workspace(output)
    threads = torch.get_num_threads()
    precision = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("highest")  # decision D5: no TF32 in statistics
        with torch.no_grad():
            return Execution(lock, mode, workspace, progress, known, restart=restart).carry_out()
    except OutputError:
        raise  # the journal found there is another run's
    except PlanError:
        workspace.discard_without_blocks()  # so that the mended plan finds no journal of the wrong one
        raise
    except OSError as error:
        raise RunError(
            f"{error.strerror or error}: {error.filename or output}",
            where=str(output),
            fix="free some space or mend the disk, then run the same command: it resumes",
        ) from error
    finally:
        progress.end_phase()
        torch.set_num_threads(threads)
        torch.set_float32_matmul_precision(precision)
        workspace.close()


@dataclass
class Execution:
    """One execution: what is the same for all sweeps."""

    lock: Lock
    mode: Mode
    work: Workspace
    progress: Progress
    identity: dict[str, str]
    restart: bool
    tokens: TokenSet | None = None
    resumed: int = 0
    rows: list[int] = field(default_factory=list)

    @property
    def skeleton(self) -> Skeleton:
        return self.lock.skeleton

    def carry_out(self) -> Report:
        began = time.perf_counter()
        tame_allocator()
        reset_peak_memory()
        self._begin()
        self.skeleton.to(self.mode.device, self.mode.dtype)
        if self.lock.calibrated:
            self.progress.phase("calibration", "calibration")
            self.tokens = self._calibration()
            self.rows = batch_rows(len(self.tokens.ids), self.tokens.ids.shape[1], self.mode.device)
        for sweep in range(len(self.lock.sweeps)):
            self._sweep(sweep)
        self.work.flush()
        self.progress.phase("export", "export")
        tensors = FinalTensors(self.lock, self._final_state)
        self._clear_staging()
        export(self.lock, emitted_lock(self.lock, self.identity), tensors, self.work.staging)
        self.progress.phase("verify", "verify")
        count, size = verify(tensors, self.work.staging)
        self.progress.say(f"  {count} tensors read back, equal bit for bit")
        report = assemble(self, VerifiedInfo(tensors=count, bytes=size), tensors)
        publish_report(self, report)
        self.work.publish()
        self.progress.phases["total"] = time.perf_counter() - began
        return report

    def _begin(self) -> None:
        """Start or resume the journal; a file it vouches for that is damaged drops its sweep."""
        plan = self.lock.plan
        if self.restart:
            self.work.forget()
        if self.work.identify(self.identity, plan.canonical()):
            self.resumed = len(self.work.entries("resume")) + 1
            for sweep in range(len(self.lock.sweeps)):
                if not all(self._intact(entry) for entry in self.work.entries("block", sweep=sweep)):
                    self.progress.say(f"  a file of sweep {sweep + 1} is damaged; the sweep starts over")
                    self.work.forget_sweep(sweep)
            self.work.append({"kind": "resume"})
            self.progress.say(f"resuming the run in {self.work.directory}")
        began = self.work.entries("threads")
        if not began:
            began = [{"kind": "threads", "threads": plan.run.threads or torch.get_num_threads()}]
            self.work.append(began[0])
        torch.set_num_threads(began[0]["threads"])  # the order of additions depends on it

    def _intact(self, entry: dict[str, Any]) -> bool:
        return bool(file_checksum(self.work.directory / entry["file"]) == entry["sha256"])

    def _calibration(self) -> TokenSet:
        """The calibration set: from the journal, or made now."""
        settings = self.lock.plan.calibration
        assert settings is not None
        path = self.work.directory / "calibration.safetensors"
        known = self.work.entries("calibration")
        if known and file_checksum(path) == known[0]["sha256"]:
            tokens = TokenSet.load(path)
        else:
            tokens = make_tokens(self.lock, self.mode.device)
            tokens.save(path)
            self.work.append({"kind": "calibration", "sha256": file_checksum(path)}, files=(path,))
        vocabulary = self.skeleton.model.get_input_embeddings().num_embeddings
        if int(tokens.ids.max()) >= vocabulary:
            raise PlanError(
                f"the tokenizer makes token {int(tokens.ids.max())}, but the model has {vocabulary}",
                where=str(self.lock.directory),
                fix="tokenizer and model do not belong together; copy both again",
            )
        self.progress.say(f"  {len(tokens.ids)} × {tokens.ids.shape[1]} tokens from {settings.source}")
        return tokens

    # ------------------------------------------------------------------ sweep

    def _sweep(self, sweep: int) -> None:
        """Walk over the blocks once, from where the journal ends."""
        lock = self.lock
        entries = self.work.entries("block", sweep=sweep)
        first = len(entries)
        if first == lock.blocks:
            return
        names = [lock.plan.passes[index].use() for index in lock.sweeps[sweep]]
        self.progress.sweep(sweep, len(lock.sweeps), first, names)
        settings = self._survey(sweep)
        needed = any(lock.statistics(linear, sweep) for linear in lock.linears)
        flow = self._inputs(sweep, entries) if needed else None
        for index in range(first, lock.blocks):
            began = time.perf_counter()
            flow, ledger, artifact = self._block(sweep, index, flow, settings)
            seconds = time.perf_counter() - began
            self._commit(sweep, index, flow, ledger, artifact, seconds)
            self._show(index, ledger, seconds)
            del artifact  # the journal's now
            trim(4 * sum(linear.weights for linear in self.lock.in_block(index)))

    def _survey(self, sweep: int) -> dict[int, dict[str, dict[str, Any]]]:
        """Settings that passes of this sweep draw from the whole model, by pass and linear; journaled."""
        found: dict[int, dict[str, dict[str, Any]]] = {}
        for index in self.lock.sweeps[sweep]:
            one = self.lock.plan.passes[index]
            if not isinstance(one, LinearPass):
                continue
            chosen = [lin for lin in self.lock.linears if _surveyed(self.lock, lin, sweep, index)]
            if not chosen:
                continue
            known = self.work.entries("survey", sweep=sweep, index=index)
            if not known:
                states = lambda: (self._state(sweep, linear) for linear in chosen)  # noqa: B023, E731
                survey = dict(chosen[0].passes)[index].survey(states)  # type: ignore[attr-defined]
                known = [{"kind": "survey", "sweep": sweep, "index": index, "settings": survey}]
                self.work.append(known[0])
            found[index] = known[0]["settings"]
        return found

    def _inputs(self, sweep: int, entries: list[dict[str, Any]]) -> Activations:
        """The activations in front of the next block: from the journal, or the embedded tokens."""
        assert self.tokens is not None
        if entries:
            entry = entries[-1]["activations"]
            path = self.work.directory / entry["file"]
            if file_checksum(path) == entry["sha256"]:
                return Activations(path, self._shapes(), self.mode.dtype, keep=False)
            self.work.forget_sweep(sweep)
            entries.clear()
            raise RunError(
                "the journal's activations are damaged",
                where=str(path),
                fix="run the same command: the sweep starts over",
            )
        flow = self._activations(sweep, 0)
        with self.skeleton.loaded(self.skeleton.embedding):
            for batch, ids in enumerate(torch.split(self.tokens.ids, self.rows)):
                flow.put(batch, self.skeleton.embed(ids))
        flow.close()
        return flow

    def _shapes(self) -> list[tuple[int, int, int]]:
        assert self.tokens is not None
        return [(rows, self.tokens.ids.shape[1], self.skeleton.width) for rows in self.rows]

    def _flow_file(self, sweep: int, block: int) -> Path:
        return self.work.directory / f"activations-{sweep}-{block:05d}.bin"

    def _activations(self, sweep: int, block: int) -> Activations:
        path = self._flow_file(sweep, block)
        return Activations(path, self._shapes(), self.mode.dtype, keep=self.mode.keep, later=self.work.later)

    # ------------------------------------------------------------------ block

    def _block(
        self, sweep: int, index: int, flow: Activations | None, settings: dict[int, dict[str, dict[str, Any]]]
    ) -> tuple[Activations | None, list[LedgerLine], dict[str, Tensor]]:
        """Compress one block; returns the activations behind it, its ledger and what the journal keeps."""
        lock, prefix = self.lock, self.skeleton.prefix(index)
        before = self._kept(sweep - 1, index) if sweep else {}
        linears = [linear for linear in lock.in_block(index) if lock.passes(linear, sweep)]
        subsets = [[lin for lin in linears if lin.subset == n] for n in sorted({lin.subset for lin in linears})]
        measured = [subset for subset in subsets if max(lock.statistics(lin, sweep) for lin in subset)]
        artifact, ledger = dict(before), []
        with self.skeleton.block(index, self._as_parameters(index, before)) as module:
            stops = [tuple(lin.name.removeprefix(prefix) for lin in subset) for subset in measured]
            with self._walk(module, index, stops, flow) as walk:
                moments = _moments(self, sweep, measured, walk)
                for subset in subsets:
                    shared = next(moments) if subset in measured else Moments(subset[0].in_features, Statistics.NONE)
                    for linear in subset:
                        state = self._state(sweep, linear, before)
                        ledger += self._compress(sweep, linear, state, shared, settings)
                        self._write_back(module, prefix, linear, state)
                        artifact |= state.tensors()
                after = self._outputs(sweep, index, walk) if flow and index + 1 < lock.blocks else None
        return after, ledger, artifact

    def _walk(self, module: nn.Module, index: int, stops: list[tuple[str, ...]], flow: Activations | None) -> Walk:
        calls = [self.skeleton.calls(*shape[:2])[index] for shape in flow.shapes] if flow else []
        pause = self.mode.pause and self.lock.plan.run.refresh == "subset"
        return Walk(module, stops, calls, flow, pause=pause)

    def _outputs(self, sweep: int, index: int, walk: Walk) -> Activations:
        after = self._activations(sweep, index + 1)
        for batch, hidden in walk.outputs():
            if not bool(torch.isfinite(hidden).all()):
                raise RunError(
                    f"the output of block {index} ({self.skeleton.prefix(index)[:-1]}) holds NaN or infinity",
                    fix="the model overflows on this text, or a pass broke it; look at the ledger of this block",
                )
            after.put(batch, hidden)
        after.close()
        return after

    def _state(self, sweep: int, linear: Linear, before: dict[str, Tensor] | None = None) -> LinearState:
        """A linear as this sweep finds it, in float32."""
        stored = self.lock.checkpoint.read(linear.stored)
        dense = (stored.T if linear.transposed else stored).to(self.mode.device).float().contiguous()
        state = LinearState(linear.name, dense, dense, stored.dtype)
        kept = before if before is not None else (self._kept(sweep - 1, linear.block) if sweep else {})
        mine = kept_of(linear.name, kept)
        if mine:
            state.restore({name: tensor.to(self.mode.device) for name, tensor in mine.items()})
        return state

    def _compress(
        self,
        sweep: int,
        linear: Linear,
        state: LinearState,
        moments: Moments,
        settings: dict[int, dict[str, dict[str, Any]]],
    ) -> list[LedgerLine]:
        """Apply the sweep's passes to one linear, check what they promise and note what they did."""
        lines: list[LedgerLine] = []
        size = max(_error(moments, state.dense), 1e-30)
        error = 0.0 if state.weight is state.dense else _error(moments, state.dense - state.effective()) / size
        for index, one in self.lock.passes(linear, sweep):
            began = time.perf_counter()
            one = one.with_settings(settings.get(index, {}).get(linear.name, {}))
            mask = state.mask
            try:
                note = one.apply(state, moments)
            except CompressError as problem:
                problem.where = problem.where or f"{one.use()} on {linear.name}"
                raise
            check_invariants(linear, index, state, mask)
            before, error = error, _error(moments, state.dense - state.effective()) / size
            lines.append(
                LedgerLine(
                    sweep=sweep,
                    block=linear.block,
                    linear=linear.name,
                    pass_index=index,
                    use=one.use(),
                    out_features=linear.out_features,
                    in_features=linear.in_features,
                    sparsity=state.sparsity,
                    error_before=before,
                    error_after=error,
                    error_kind=("weight", "diagonal", "gram")[moments.statistics],
                    tokens=moments.tokens,
                    damping=note.get("damping"),
                    dead_columns=note.get("dead_columns", 0),
                    fallback=note.get("fallback"),
                    seconds=time.perf_counter() - began,
                )
            )
        state.settle()
        return lines

    def _write_back(self, module: nn.Module, prefix: str, linear: Linear, state: LinearState) -> None:
        """What the rest of the block computes with from now on: the weight as it will be written."""
        weight = (state.weight.T.contiguous() if linear.transposed else state.weight).to(self.mode.dtype)
        owner = module.get_submodule(linear.name.removeprefix(prefix))
        owner.weight = nn.Parameter(weight, requires_grad=False)

    # ---------------------------------------------------------------- journal

    def _commit(
        self,
        sweep: int,
        index: int,
        flow: Activations | None,
        ledger: list[LedgerLine],
        artifact: dict[str, Tensor],
        seconds: float,
    ) -> None:
        """Hand what the block became to the writing thread, and let the journal vouch for it."""
        self.work.flush()  # at most one block behind
        directory = self.work.directory
        (shard,) = lay_out(slots_of(artifact), 1 << 62)
        shard = Shard(f"block-{sweep}-{index:05d}.safetensors", shard.slots)
        line = BlockLine(sweep=sweep, index=index, seconds=seconds, peak_memory_bytes=peak_memory(self.mode.device))

        def entry() -> dict[str, Any]:
            checksum = write_shard(shard, directory, artifact, synced=False)
            return {
                "kind": "block",
                "sweep": sweep,
                "block": index,
                "file": shard.file,
                "sha256": checksum,
                "ledger": [line.model_dump(mode="json") for line in ledger],
                "line": line.model_dump(mode="json"),
                "activations": {"file": flow.path.name, "sha256": flow.checksum} if flow else None,
            }

        files = (directory / shard.file, *([flow.path] if flow else []))
        self.work.append_later(entry, files=files, obsolete=(self._flow_file(sweep, index),))

    def _kept(self, sweep: int, block: int) -> dict[str, Tensor]:
        """What the journal keeps of a block after a sweep."""
        self.work.flush()
        (entry,) = self.work.entries("block", sweep=sweep, block=block)
        return read_file(self.work.directory / entry["file"])

    def _final_state(self, block: int) -> dict[str, Tensor]:
        return self._kept(len(self.lock.sweeps) - 1, block)

    def _as_parameters(self, index: int, kept: dict[str, Tensor]) -> dict[str, Tensor]:
        """What the journal keeps of a block, as values for its parameters."""
        values = {}
        for linear in self.lock.in_block(index):
            if kept_of(linear.name, kept):
                weight = kept_weight(linear.name, kept, DTYPES[linear.dtype])
                values[f"{linear.name}.weight"] = weight.T if linear.transposed else weight
        return values

    def _clear_staging(self) -> None:
        shutil.rmtree(self.work.staging, ignore_errors=True)
        self.work.staging.mkdir()

    def _show(self, index: int, ledger: list[LedgerLine], seconds: float) -> None:
        errors: dict[str, list[float]] = {}
        for line in ledger:
            errors.setdefault(line.use, []).append(line.error_after or 0.0)
        zeros = fmean(line.sparsity for line in ledger) if ledger else 0.0
        means = {use: fmean(values) for use, values in errors.items()}
        self.progress.block(index, self.lock.blocks, means, zeros, seconds)


def _surveyed(lock: Lock, linear: Linear, sweep: int, index: int) -> bool:
    return any(i == index and p.surveys() for i, p in lock.passes(linear, sweep))


def _moments(run: Execution, sweep: int, subsets: list[list[Linear]], walk: Walk) -> Iterator[Moments]:
    """The moments of each subset's input, in order; with refresh = "block" all are collected before the first."""
    lock, tokens = run.lock, run.tokens
    masks = torch.split(tokens.mask, run.rows) if tokens is not None else ()
    made = [
        Moments(s[0].in_features, max(lock.statistics(linear, sweep) for linear in s), run.mode.device) for s in subsets
    ]

    def add(stop: int, batch: int, inputs: Tensor) -> None:
        flat = inputs.reshape(-1, inputs.shape[-1])
        mask = masks[batch].flatten().to(flat.device)
        made[stop].add(flat if bool(mask.all()) else flat[mask])

    if lock.plan.run.refresh == "block":
        walk.observe(add)
    for stop, subset in enumerate(subsets):
        if lock.plan.run.refresh == "subset":
            for batch, inputs in walk.inputs(stop):
                add(stop, batch, inputs)
        if not made[stop].is_finite():
            raise RunError(
                f"the input of {subset[0].name} holds NaN or infinity, or overflows when squared",
                fix="the model overflows on this text: try other calibration data, or except this layer",
            )
        yield made[stop]
        made[stop] = Moments(1, Statistics.NONE)  # let the Gram matrix go


def _error(moments: Moments, difference: Tensor) -> float:
    """‖Δ X‖² by the moments at hand, ‖Δ‖² without any."""
    return moments.error(difference) if moments.tokens else float(difference.square().sum())
