"""Decisions drawn from bytes, and the changes that they make to valid files.

A fuzzer that changes bytes of a file rarely gets past the first check. Here its bytes decide instead *what* is changed
in a valid file: which value of a JSON document becomes which hostile one, say. The same bytes make the same file, so
that an input which was kept can be run again anywhere, without the fuzzer.
"""

from __future__ import annotations

import copy
import json
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from collections.abc import Sequence

T = TypeVar("T")


DEEP = {f"@nested {depth}": "[" * depth + "]" * depth for depth in (60, 900, 5000, 200_000)}

HOSTILE: tuple[Any, ...] = (
    None, True, False, -1, 0, 1, 2, 3, 7, 64, 4097, 2**31, 2**53, 2**62, 2**63, 10**9, 10**18, -(2**63), 10**400,
    0.0, -0.5, 1e-320, 1e308, float("inf"), float("nan"),
    "", " ", "a", "a" * 5000, "1", "true", "auto", "none", "None", "eager", "float32", "int8", "cuda", "cpu", "load",
    "/etc/passwd", "../../../../etc/passwd", "~/.bashrc", "file:///etc/passwd", "https://example.invalid/x", "..", ".",
    "org/name", "org/name@main", "evil.Evil", "evil:Evil", "__class__", "__reduce__", "tokenizer.json",
    "\x1b[2J\x1b]0;owned\x07", "a\nfix: pip install evil", "\x00", "\ud800", "\u202egnp.exe", "\N{PILE OF POO}",
    "<script>alert(1)</script>", "'\"><img src=x>", "{{ 7*7 }}", "{% for i in range(99999999) %}{% endfor %}",
    "{{ ''.__class__.__mro__ }}", "(a+)+$", "re:(.*)*!", "+:(.*)*!", "re:.*q_proj", "(", "[", "\\", "%s%n",
    "$(touch owned)", "`touch owned`",
    [], {}, [[]], [None], [{}], [0] * 300, [1, 2], ["a", "b"], {"a": 1}, {"": {}}, {"__class__": "x"}, *DEEP,
)  # fmt: skip


class Choices:
    """Decisions drawn from bytes in order; from no bytes always the first option."""

    def __init__(self, data: bytes) -> None:
        self.data, self.at = data, 0

    def below(self, count: int) -> int:
        """A number from 0 to below `count`."""
        size = max(1, ((count - 1).bit_length() + 7) // 8)
        found = int.from_bytes(self.take(size), "little")
        return found % count if count else 0

    def pick(self, options: Sequence[T]) -> T:
        """One of them."""
        return options[self.below(len(options))]

    def take(self, size: int) -> bytes:
        """The next bytes, fewer at the end."""
        self.at += size
        return self.data[self.at - size : self.at]

    def rest(self) -> bytes:
        """All that is left."""
        return self.take(len(self.data))


def change_json(value: Any, choices: Choices, keys: Sequence[str] = ()) -> Any:
    """A JSON document with one to four changes; `keys` may be added to its objects."""
    value = copy.deepcopy(value)
    for _ in range(1 + choices.below(4)):
        value = _change(value, choices, keys)
    return value


def _change(value: Any, choices: Choices, keys: Sequence[str]) -> Any:
    """Go down from the root by choices, and change something there."""
    parents: list[tuple[Any, Any]] = []
    at = value
    while isinstance(at, (dict, list)) and at and choices.below(8) != 1:  # 1: so that no bytes lead to a leaf
        key = choices.pick(list(at)) if isinstance(at, dict) else choices.below(len(at))
        parents.append((at, key))
        at = at[key]
    new = _new(at, value, choices, keys)
    if not parents:
        return new
    parent, key = parents[-1]
    if choices.below(16) == 1:
        del parent[key]
    elif isinstance(parent, dict) and choices.below(8) == 1:
        parent[choices.pick([*parent, *keys, "a"])] = new
    else:
        parent[key] = new
    return value


def _new(at: Any, root: Any, choices: Choices, keys: Sequence[str]) -> Any:
    kind = choices.below(8)
    if kind <= 2:
        return copy.deepcopy(choices.pick(HOSTILE))
    if kind == 3 and isinstance(at, int):
        return at + choices.pick((1, -1, 2, -2, 8, at, -at, -2 * at, at * 1000))
    if kind == 4 and isinstance(at, dict) and keys:
        return at | {choices.pick(keys): copy.deepcopy(choices.pick(HOSTILE))}
    if kind == 5 and isinstance(at, (str, list)) and len(at) < 10_000:
        return at[: choices.below(len(at) + 1)] if choices.below(2) else at + at
    if kind == 6 and isinstance(at, str):
        return at + choices.pick([one for one in HOSTILE if isinstance(one, str)])
    if kind == 7:  # another part of the document
        other = root
        while isinstance(other, (dict, list)) and other and choices.below(4) != 1:
            other = choices.pick(list(other.values()) if isinstance(other, dict) else other)
        return copy.deepcopy(other) if at is not root else choices.pick(HOSTILE)
    return [at] if choices.below(2) else {"a": at}


def change_bytes(data: bytes, choices: Choices) -> bytes:
    """Bytes with one to eight changes: flipped, overwritten by telling numbers, cut, doubled, or with more between."""
    changed = bytearray(data)
    for _ in range(1 + choices.below(8)):
        place, kind = choices.below(len(changed) + 1), choices.below(6)
        if kind == 0:
            changed[place : place + 1] = choices.take(1)
        elif kind == 1:
            width = choices.pick((1, 2, 4, 8))
            number = choices.pick((0, 1, 2**7, 2**15, 2**31 - 1, 2**31, 2**32 - 1, 2**63, 2**64 - 1))
            changed[place : place + width] = (number % 2 ** (8 * width)).to_bytes(width, "little")
        elif kind == 2:
            changed = changed[:place]
        elif kind == 3:
            changed[place:place] = choices.take(1 + choices.below(16))
        elif kind == 4:
            del changed[place : place + 1 + choices.below(64)]
        else:
            changed[place:place] = changed[place : place + 1 + choices.below(64)]
    return bytes(changed)


def json_text(value: Any) -> str:
    """A document as JSON; where a name of `DEEP` stands, lists in lists, which Python could not write."""
    text = json.dumps(value)
    for name, lists in DEEP.items():
        text = text.replace(f'"{name}"', lists)
    return text
