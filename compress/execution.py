"""One execution: the sweeps of a stage, each over all blocks, then export, verification and report.

Read `Execution.carry_out` first, then `compress.sweep`, the loop over decoder blocks. `compress.pipeline` makes one
execution for each stage; all that it has done is in the journal (`compress.journal`).
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch

from compress.barrier import Barrier, build
from compress.calibration.fisher import diagonal_fisher
from compress.calibration.plan_source import make_tokens
from compress.calibration.tokens import TokenSet
from compress.checkpoint import Shard, TensorInfo, lay_out, read_file, read_header, read_tensor, slots_of, write_shard
from compress.errors import PlanError, RunError
from compress.export.huggingface import FinalTensors, export
from compress.export.scales import verify_sets, write_sets
from compress.export.verify import verify
from compress.journal import file_checksum
from compress.memory import reset_peak_memory, tame_allocator
from compress.outcome import assemble, emitted_lock, publish_report, tell_tracker
from compress.passes.eora import EoRA, spend
from compress.report import VerifiedInfo
from compress.state import cut_ranks
from compress.structure import CutTensors, found_kept
from compress.sweep import Sweep
from compress.walk import batch_rows

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from torch import Tensor

    from compress.distributed import World
    from compress.estimate import Mode
    from compress.journal import Workspace
    from compress.lock import Linear, Lock
    from compress.progress import Progress
    from compress.report import Report
    from compress.stream import Skeleton


@dataclass
class Execution:
    """One execution: what is the same for all sweeps."""

    lock: Lock
    mode: Mode
    work: Workspace
    progress: Progress
    identity: dict[str, str]
    world: World
    origin: dict[str, str]  # the identity of the first stage
    before: Report | None = None  # of the stage before
    tokens: TokenSet | None = None
    resumed: int = 0
    fisher: dict[str, TensorInfo] = field(default_factory=dict)  # of the sweep under way, by linear

    @property
    def skeleton(self) -> Skeleton:
        return self.lock.skeleton

    def carry_out(self, note: Callable[[Path], None] | None = None) -> Report:
        """All sweeps, and the output; `note` is told of its directory before that is put in its place."""
        tame_allocator()
        reset_peak_memory()
        self._begin()
        self.skeleton.to(self.mode.device, self.mode.dtype)
        if self.lock.calibrated:
            self.progress.phase("calibration", "calibration")
        for number in range(len(self.lock.sweeps)):
            self.take_part(number)
            self._allocate(number)
        self.work.flush()
        self.progress.phase("export", "export")
        last = len(self.lock.sweeps) - 1
        lock = self.lock.settled(lambda block: self.kept(last, block))
        tensors: FinalTensors | CutTensors
        tensors = FinalTensors(lock, lambda block: self.kept(last, block), self.kept_outside(last))
        if lock.left:
            tensors = CutTensors(tensors, found_kept(lock, lambda block: self.kept(last, block)))
        shutil.rmtree(self.work.staging, ignore_errors=True)
        self.work.staging.mkdir()
        export(lock, emitted_lock(self.lock, self.origin), tensors, self.work.staging)
        write_sets(lock, self.kept, self.work.staging)
        self.progress.phase("verify", "verify")
        checked = (verify(tensors, self.work.staging), verify_sets(lock, self.kept, self.work.staging))
        count, size = map(sum, zip(*checked, strict=True))
        self.progress.say(f"  {count} tensors read back, equal bit for bit")
        report = assemble(self, VerifiedInfo(tensors=count, bytes=size), tensors)
        publish_report(self, report)
        if note:
            note(self.work.staging)
        self.work.publish()
        tell_tracker(self, report)
        return report

    def take_part(self, number: int) -> None:
        """One sweep or barrier, with all processes."""
        if self.lock.calibrated and self.tokens is None:
            self.tokens = self._calibration()
        self._replace_outside(number)
        self._make_fisher(number)
        (Barrier if self.lock.is_barrier(number) else Sweep)(self, number).carry_out()

    @property
    def part(self) -> tuple[list[int], slice]:
        """This process's batches, by their numbers of samples, and which samples these are."""
        assert self.tokens is not None
        samples, length = self.tokens.ids.shape
        return self.world.part(batch_rows(samples, length, self.mode.device, self.world.size))

    @property
    def rows(self) -> list[int]:
        """How many samples each batch of this process has."""
        return self.part[0]

    @property
    def share(self) -> TokenSet:
        """This process's part of the calibration set."""
        assert self.tokens is not None
        own = self.part[1]
        return TokenSet(self.tokens.ids[own], self.tokens.mask[own])

    def _replace_outside(self, sweep: int) -> None:
        """Have the skeleton use what the sweeps before made of what belongs to no block."""
        self.skeleton.replace({n.rpartition(":")[0]: t for n, t in self.kept_outside(sweep - 1).items()})

    def _begin(self) -> None:
        """Start or resume the journal."""
        plan = self.lock.plan
        kind = "stage" if self.lock.before and self.lock.ends else "begin"
        if self.work.identify(self.identity, self.lock.canonical(), kind):
            self.resumed = len(self.work.entries("resume")) + 1
            self.work.append({"kind": "resume"})
            self.progress.say(f"resuming the run in {self.work.directory}")
        began = self.work.entries("threads")
        if not began:
            began = [{"kind": "threads", "threads": plan.run.threads or torch.get_num_threads()}]
            self.work.append(began[0])
        torch.set_num_threads(began[0]["threads"])  # the order of additions depends on it

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
            checksum = file_checksum(path)
            if known and checksum != known[0]["sha256"]:
                raise RunError(
                    f"calibration tokens were damaged, and {settings.source} no longer gives the same",
                    where=str(path),
                    fix="bring back the source as it was, or start over with --restart",
                )
            if not known:
                self.work.append({"kind": "calibration", "sha256": checksum}, files=(path,))
        vocabulary = self.skeleton.model.get_input_embeddings().num_embeddings
        if int(tokens.ids.max()) >= vocabulary:
            raise PlanError(
                f"the tokenizer makes token {int(tokens.ids.max())}, but the model has {vocabulary}",
                where=str(self.lock.directory),
                fix="tokenizer and model do not belong together; copy both again",
            )
        self.progress.say(f"  {len(tokens.ids)} × {tokens.ids.shape[1]} tokens from {settings.source}")
        return tokens

    def kept(self, sweep: int, block: int) -> dict[str, Tensor]:
        """What the journal keeps of a block after a sweep; nothing before the first."""
        if sweep < 0:
            return {}
        self.work.flush()
        (entry,) = self.work.entries("block", sweep=sweep, block=block)
        tensors = read_file(self.work.directory / entry["file"])
        allocated = self.work.entries("ranks", sweep=sweep)
        return cut_ranks(tensors, allocated[0]["ranks"]) if allocated else tensors

    def _make_fisher(self, sweep: int) -> None:
        """The Fisher information of the dense model, for the linears of a sweep that want it; journaled."""
        wanting = [lin for lin in self.lock.linears if any(p.needs_fisher() for _, p in self.lock.passes(lin, sweep))]
        path = self.work.directory / f"fisher-{sweep}.safetensors"
        self.fisher = {}
        if not wanting:
            return
        known = self.work.entries("fisher", sweep=sweep)
        if not known or file_checksum(path) != known[-1]["sha256"]:
            assert self.tokens is not None
            self.progress.phase("fisher", "Fisher information of the dense model")
            model = build(self.lock, self.mode.device, {})
            names = {f"{linear.name}.weight": linear for linear in wanting}
            ids, mask = self.tokens.ids.to(self.mode.device), self.tokens.mask.to(self.mode.device)
            found = diagonal_fisher(model, ids, mask, names)
            rows = {name: (f.T if names[name].transposed else f).cpu().contiguous() for name, f in found.items()}
            (shard,) = lay_out(slots_of(rows), 1 << 62)
            checksum = write_shard(Shard(path.name, shard.slots), path.parent, rows)
            self.work.append({"kind": "fisher", "sweep": sweep, "sha256": checksum}, files=(path,))
        self.fisher = {info.name.removesuffix(".weight"): info for info in read_header(path)}

    def fisher_of(self, linear: Linear) -> Tensor | None:
        """The Fisher information (out, in) of a linear, where this sweep has it."""
        info = self.fisher.get(linear.name)
        return None if info is None else read_tensor(self.work.directory / info.file, info).to(self.mode.device)

    def kept_outside(self, sweep: int) -> dict[str, Tensor]:
        """What the journal keeps, after a sweep, of the parameters that belong to no block."""
        self.work.flush()
        found = [entry for entry in self.work.entries("outside") if entry["sweep"] <= sweep]
        return read_file(self.work.directory / found[-1]["file"]) if found else {}

    def _allocate(self, sweep: int) -> None:
        """Spend budgets of ranks, each on the branches of its pass, once all of a sweep are known; journaled."""
        lock = self.lock
        passes = {i: one for i in lock.sweeps[sweep] if isinstance(one := lock.plan.passes[i], EoRA)}
        budgets = {index: one.budget for index, one in passes.items() if one.budget is not None}
        if not budgets or self.work.entries("ranks", sweep=sweep):
            return
        known: dict[str, Tensor] = {}  # spectra, and errors by rank
        for block in range(lock.blocks):
            known |= {key: x for key, x in self.kept(sweep, block).items() if key.endswith((":spectrum", ":errors"))}
        sizes = {linear.name: linear.out_features + linear.in_features for linear in lock.linears}
        ranks: dict[str, int] = {}
        for index, budget in budgets.items():
            mine = [linear.name for linear in lock.linears if index in dict(linear.passes)]
            found = spend({n: known[f"{n}:spectrum"] for n in mine if f"{n}:spectrum" in known}, sizes, budget)
            used = sum(sizes[name] * rank for name, rank in found.items())
            self.progress.say(
                f"  ranks {min(found.values())} to {max(found.values())}: {used:,} of {budget:,} parameters"
            )
            ranks |= found
        errors = {name: float(known[f"{name}:errors"][rank]) for name, rank in ranks.items()}
        self.work.append({"kind": "ranks", "sweep": sweep, "ranks": ranks, "errors": errors})
