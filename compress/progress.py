"""What a running command shows: one line per block, plain when the output is not a terminal."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from compress.report import human_seconds

if TYPE_CHECKING:
    from rich.console import Console


class Progress:
    """Prints phases and blocks; without a console it is silent (the Python API's default)."""

    def __init__(self, console: Console | None = None) -> None:
        self.console = console
        self.phases: dict[str, float] = {}
        self._phase: tuple[str, float] | None = None
        self._sweep_began = 0.0
        self._done_before = 0

    def say(self, text: str, style: str | None = None) -> None:
        """One line."""
        if self.console:
            self.console.print(text, style=style, highlight=False, markup=False, soft_wrap=True)

    def phase(self, name: str, text: str | None = None) -> None:
        """A new phase begins; its seconds are kept in `phases`."""
        self.end_phase()
        self._phase = (name, time.perf_counter())
        if text:
            self.say(text, style="bold")

    def end_phase(self) -> None:
        """Close the running phase."""
        if self._phase:
            name, began = self._phase
            self.phases[name] = self.phases.get(name, 0.0) + time.perf_counter() - began
            self._phase = None

    def sweep(self, sweep: int, total: int, first: int, names: list[str]) -> None:
        """A walk over the blocks begins at block `first`."""
        self._sweep_began, self._done_before = time.perf_counter(), first
        again = f", from block {first + 1}" if first else ""
        self.phase("sweep", f"sweep {sweep + 1} of {total}: {' → '.join(names)}{again}")

    def block(self, index: int, total: int, errors: dict[str, float], pruned: float, seconds: float) -> None:
        """A block is done: mean relative error by pass, and when the sweep will end."""
        done = index + 1 - self._done_before
        left = (time.perf_counter() - self._sweep_began) / done * (total - index - 1)
        shown = "  ".join(f"{name} {error:.3g}" for name, error in errors.items())
        width = len(str(total))
        eta = f"eta {human_seconds(left)}" if index + 1 < total else "done"
        counted = f"{index + 1:>{width}}/{total}"
        done_what = f"error {shown}  pruned {pruned:.1%}" if errors else "no pass"
        self.say(f"  block {counted}  {done_what}  {human_seconds(seconds)}  {eta}")
