"""The text of a plan: quoted in reports, and where its keys stand, which tomllib does not tell."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

Location = tuple[str | int, ...]


@dataclass(frozen=True)
class Source:
    """The text of a plan, to quote it and to name lines of it."""

    path: Path | None
    text: str

    @property
    def name(self) -> str:
        """What messages call the plan."""
        return str(self.path) if self.path else "plan"

    def line(self, location: Location) -> int | None:
        """The line (from 1) of a key, or of the nearest table that encloses it."""
        lines: dict[Location, int] = {}
        for known, number in _lines(self.text):
            for length in range(1, len(known) + 1):  # a dotted key or an element begins what encloses it, too
                lines.setdefault(known[:length], number)
        while location and location not in lines:
            location = location[:-1]
        return lines.get(location)

    def where(self, location: Location) -> str:
        """``plan.toml:12: pass[0].sparsity`` for messages."""
        line = self.line(location) if self.path else None
        at = f"{self.name}:{line}" if line else self.name
        dotted = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in location).lstrip(".")
        return f"{at}: {dotted}" if dotted else at


_KEY = r"""(?:[A-Za-z0-9_-]+|"[^"]*"|'[^']*')"""
_DOTTED = re.compile(rf"\s*({_KEY}(?:\s*\.\s*{_KEY})*)\s*")


def _lines(text: str) -> Iterator[tuple[Location, int]]:
    """Each table header and key of a TOML text with its line; tomllib keeps no positions."""
    table: Location = ()
    arrays: dict[Location, int] = {}
    for number, line in _statements(text):
        header = re.match(rf"\s*(\[\[?){_DOTTED.pattern}\]", line)
        if header:
            table = ()
            parts = _split(header[2])
            for depth, part in enumerate(parts):
                table += (part,)
                last = depth == len(parts) - 1
                if last and header[1] == "[[":
                    arrays[table] = arrays.get(table, -1) + 1
                    # A new element starts the arrays below it anew.
                    arrays = {key: n for key, n in arrays.items() if key[: len(table)] != table or key == table}
                if table in arrays:
                    table += (arrays[table],)
            yield table, number
            continue
        key = re.match(rf"{_DOTTED.pattern}=", line)
        if key:
            yield table + _split(key[1]), number


# Strings of all four kinds, comments, brackets and line ends: what decides whether a line begins a statement.
_TOKEN = re.compile(
    r'''"""(?:\\.|[^\\])*?"{3,5}|\'{3}.*?\'{3,5}|"(?:\\.|[^"\\\n])*"|'[^'\n]*'|#[^\n]*|[\[\]{}\n]''', re.DOTALL
)


def _statements(text: str) -> Iterator[tuple[int, str]]:
    """The lines (from 1) that begin a header or a key: those not inside an array or a multi-line string."""
    lines = text.split("\n")
    number, depth = 1, 0
    yield 1, lines[0]
    for token in _TOKEN.findall(text):
        depth += (token in ("[", "{")) - (token in ("]", "}"))
        number += token.count("\n")
        if token == "\n" and depth == 0:
            yield number, lines[number - 1]


def _split(dotted: str) -> tuple[str, ...]:
    return tuple(part.strip("\"'") for part in re.findall(_KEY, dotted))
