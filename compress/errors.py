"""Every error a user can cause or meet; each carries the exit code of the command.

An error message says what was wrong, where (file, line, key, layer) and how to mend it.
"""

from __future__ import annotations

from difflib import get_close_matches
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable


class CompressError(Exception):
    """Base class. ``exit_code`` is what the command returns: 2 the plan is wrong, 3 the run failed."""

    exit_code = 3

    def __init__(self, problem: str, *, where: str | None = None, fix: str | None = None) -> None:
        self.problem, self.where, self.fix = problem, where, fix
        super().__init__(problem)

    def __str__(self) -> str:
        lines = [f"{self.where}: {self.problem}" if self.where else self.problem]
        if self.fix:
            lines.append(f"fix: {self.fix}")
        return "\n".join(map(printable, lines))


class PlanError(CompressError):
    """The plan cannot be carried out as written; nothing was read or written."""

    exit_code = 2


class ModelError(PlanError):
    """The model directory cannot be used: missing, truncated, hostile or unknown."""


class OutputError(PlanError):
    """The output directory holds something else, or another run is using it."""


class RunError(CompressError):
    """The run failed; its journal is kept and the same command resumes it."""


class SettingError(ValueError):
    """A setting has an impossible value; `fix` says what to write, `location` where below the table it stands."""

    def __init__(self, problem: str, fix: str, location: tuple[str | int, ...] = ()) -> None:
        super().__init__(problem)
        self.fix, self.location = fix, location


LONGEST = 2000  # characters of a line; names and values from files may have any length


def printable(text: str) -> str:
    """`text` in one line and without control characters: names from files may hold sequences that terminals obey."""
    if len(text) > LONGEST:
        text = f"{text[: LONGEST - 200]} ... {text[-200:]}"
    return "".join(char if char.isprintable() else ascii(char)[1:-1] for char in text)


def nearest(name: str, names: Iterable[str]) -> str:
    """'; did you mean "x"?' for the closest of `names`, or an empty string."""
    close = get_close_matches(name, list(names), n=1, cutoff=0.5)
    return f'; did you mean "{close[0]}"?' if close else ""
