"""What a disk has damaged of a sweep: made again, block by block, and proven by the checksum in the journal.

Only the activations behind the last finished block are kept, but the journal remembers the checksum of those behind
every block. So the way to a damaged file is walked again from the embedded tokens: intact blocks only run forward, with
the weights that the journal keeps; a damaged one is compressed anew. Activations and file must have the checksums that
they had, and then all that was built on them stands. Where they do not, which no run on a CPU has shown, the sweep
starts over.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from compress.checkpoint import Shard, lay_out, read_file, slots_of, write_shard
from compress.spread import spread_of

if TYPE_CHECKING:
    from torch import Tensor

    from compress.flows import Activations
    from compress.sweep import Sweep


class _Different(Exception):
    """A block was not made again as it was."""


def mend(sweep: Sweep, *, needed: bool) -> None:
    """See to it that all that the journal says of a sweep is there: redo what is damaged, or have it start over.

    Args:
        sweep: before it goes on.
        needed: whether blocks have inputs, for passes that look at them.
    """
    work, number = sweep.work, sweep.number
    entries = work.entries("block", sweep=number)
    damaged = [place for place, entry in enumerate(entries) if not work.intact(entry)]
    waiting = entries[-1]["activations"] if entries and needed and len(entries) < sweep.lock.blocks else []
    lost = [one["file"] for one in waiting if not work.intact(one)]
    if not damaged and not lost:
        return
    names = [entries[place]["file"] for place in damaged] + lost
    say, what = sweep.run.progress.say, f"  {', '.join(names)} of the journal: damaged"
    if sweep.run.world.size > 1:  # what others computed is not for one process to walk again
        say(f"{what}; sweep {number + 1} starts over")
        work.forget_sweep(number)
        return
    say(f"{what}; made again")
    try:
        _Walk(sweep, entries, needed=needed).redo(damaged, len(entries) if lost else max(damaged) + 1)
    except _Different:
        say(f"  it came out otherwise; sweep {number + 1} starts over")
        work.forget_sweep(number)


class _Walk:
    """From the first block to the damaged ones, beside the activations that wait behind the last."""

    def __init__(self, sweep: Sweep, entries: list[dict[str, Any]], *, needed: bool) -> None:
        self.sweep, self.entries, self.needed = sweep, entries, needed
        self.waiting = {one["file"] for one in entries[-1]["activations"] or []}

    def redo(self, damaged: list[int], last: int) -> None:
        """Walk over the first `last` blocks, and compress the `damaged` ones anew.

        Raises:
            _Different: a file or activations have another checksum than before.
        """
        sweep = self.sweep
        sweep.surveyed = sweep.survey()
        sweep.spread = spread_of(sweep.lock, sweep.number, sweep.run.kept)
        flow = sweep.flows.embedded() if self.needed else None
        for index in range(last):
            before, entry = flow, self.entries[index]
            if index in damaged:
                flow, _, artifact = sweep.block(index, flow)
                self._write(entry, artifact)
            elif flow is not None:
                flow = sweep.replayed(index, flow, read_file(sweep.work.directory / entry["file"]))
            sweep.work.flush()
            if flow is not None and [flow.entry] != entry["activations"]:
                raise _Different
            self._drop(before)
        self._drop(flow)

    def _write(self, entry: dict[str, Any], artifact: dict[str, Tensor]) -> None:
        (shard,) = lay_out(slots_of(artifact), 1 << 62)
        if write_shard(Shard(entry["file"], shard.slots), self.sweep.work.directory, artifact) != entry["sha256"]:
            raise _Different

    def _drop(self, flow: Activations | None) -> None:
        """Delete activations that nothing waits for."""
        if flow is not None and flow.path.name not in self.waiting:
            flow.path.unlink(missing_ok=True)
