"""Run one block over all batches, pausing every batch where a subset of linears gets its input.

A block is compressed subset by subset, {q,k,v} → {o} → {gate,up} → {down}, each on inputs that the subsets before it,
already compressed, have produced. The plain way runs the block anew for every subset. Here each batch's forward is a
greenlet that stops when the first linear of a subset is called; when the subset has been compressed, all of them go
on with the new weights. The block runs once instead of once per subset, and the numbers are the same, because the
same operations run on the same batches. The price is memory: the live tensors of every paused batch. Without that
memory, `pause=False` runs anew and stops early.

Why a dependency (greenlet) and not threads: torch's gradient mode and the order of operations are per thread, and
hundreds of threads of which one runs are no simplification.
"""

from __future__ import annotations

from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING

import greenlet
import torch
from torch import Tensor, nn

from compress.errors import RunError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from compress.flows import Activations
    from compress.stream import Call

# Tokens per forward, by device: enough for the matrix products to be efficient, few enough to stay in cache.
BATCH_TOKENS = {"cpu": 2048, "cuda": 16384}


FEWEST = 8  # batches, where there are as many samples: a process has whole ones


def batch_rows(samples: int, length: int, device: torch.device, processes: int = 1) -> list[int]:
    """How many rows each batch has. A function of the plan and the kind of device only: results depend on it.

    Of `processes` each has whole batches; where they are more than these, batches are smaller.
    """
    rows = max(1, min(BATCH_TOKENS.get(device.type, BATCH_TOKENS["cpu"]) // length, samples // FEWEST))
    if -(-samples // rows) < processes:
        rows = max(1, samples // processes)
    return [min(rows, samples - start) for start in range(0, samples, rows)]


class _Stopped(Exception):
    """Leaves a forward at the input of a subset."""


class Walk:
    """One block over all batches. `inputs` gives a subset's inputs, `outputs` the block's; each goes forward only."""

    def __init__(
        self,
        block: nn.Module,
        stops: list[tuple[str, ...]],
        calls: list[Call],
        source: Activations | None,
        *,
        pause: bool,
    ) -> None:
        """Prepare to run.

        Args:
            block: the decoder block, with weights.
            stops: names (in the block) of the linears of each subset to stop at, in the order the block runs them.
            calls: what the block is called with besides the hidden states, for each batch.
            source: the block's inputs; None when no forward will be asked for (then `calls` is empty).
            pause: keep every batch's forward alive between stops; else run it anew for each.
        """
        self.block, self.calls, self.source, self.pause = block, calls, source, pause
        self.device = next(block.parameters()).device
        self._caught: dict[int, Tensor] = {}
        self._running: list[greenlet.greenlet | None] = [None] * len(calls)
        self._stops = len(stops)
        self._wanted: int | None = None  # without pausing: the subset to stop at
        self._observer: Callable[[int, Tensor], None] | None = None
        self._seen: set[int] = set()  # subsets that the observed forward has met
        self._hooks = [
            block.get_submodule(name).register_forward_pre_hook(self._hook(stop))
            for stop, names in enumerate(stops)
            for name in names
        ]

    def __enter__(self) -> Walk:
        return self

    def __exit__(self, *_: object) -> None:
        for hook in self._hooks:
            hook.remove()
        for running in self._running:
            if running:
                running.throw()  # unwinds the forward and lets its tensors go
        self._running.clear()

    def _hook(self, stop: int):  # type: ignore[no-untyped-def]
        def arrived(_: nn.Module, args: tuple[Tensor, ...]) -> None:
            if self.pause:
                current = greenlet.getcurrent()
                if getattr(current, "stop", -1) < stop:  # the first linear of the subset to be called
                    current.stop = stop
                    current.parent.switch(args[0])
            elif self._observer is not None:
                if stop not in self._seen:
                    self._seen.add(stop)
                    self._observer(stop, args[0])
                if len(self._seen) == self._stops:
                    raise _Stopped
            elif stop == self._wanted:
                self._caught[0] = args[0]
                raise _Stopped

        return arrived

    def _forward(self, batch: int, *, last: bool) -> Tensor:
        assert self.source is not None
        args, kwargs = self.calls[batch]
        output = self.block(self.source.get(batch, self.device, last=last), *args, **kwargs)
        if not isinstance(output, Tensor):
            raise RunError(
                f"a decoder block returned {type(output).__name__}, not the hidden states",
                fix="this version of transformers is not supported; see the ranges in pyproject.toml",
            )
        return output

    def inputs(self, stop: int) -> Iterator[tuple[int, Tensor]]:
        """Run every batch to a subset; yields (batch, input (rows, length, in_features), or flattened tokens)."""
        for batch in range(len(self.calls)):
            if self.pause:
                running = self._running[batch]
                if running is None:
                    self._running[batch] = running = greenlet.greenlet(lambda number: self._forward(number, last=True))
                    yield batch, running.switch(batch)
                else:
                    yield batch, running.switch()
            else:
                self._wanted = stop
                try:
                    self._forward(batch, last=False)
                except _Stopped:
                    yield batch, self._caught.pop(0)
                finally:
                    self._wanted = None

    def observe(self, seen: Callable[[int, int, Tensor], None]) -> None:
        """Run every batch once, as far as the last subset, and show `seen(stop, batch, input)` each subset's input."""
        with self._plain():
            for batch in range(len(self.calls)):
                self._seen.clear()
                self._observer = lambda stop, inputs, batch=batch: seen(stop, batch, inputs)
                with suppress(_Stopped):
                    self._forward(batch, last=False)
                self._observer = None

    def outputs(self) -> Iterator[tuple[int, Tensor]]:
        """Run every batch to the end; yields (batch, output (rows, length, hidden))."""
        for batch in range(len(self.calls)):
            running = self._running[batch]
            if running is None:
                yield batch, self._forward_through(batch)
            else:
                output = running.switch()
                self._running[batch] = None
                yield batch, output

    def _forward_through(self, batch: int) -> Tensor:
        """A whole forward that stops nowhere."""
        with self._plain():
            return self._forward(batch, last=True)

    @contextmanager
    def _plain(self) -> Iterator[None]:
        """Forwards that do not pause."""
        pause, self.pause = self.pause, False
        try:
            yield
        finally:
            self.pause = pause
