"""A kind of file that is fuzzed: valid seeds, and the code that a user's command runs on it.

A target makes its seeds once, in a folder of its own; `run` then changes one file by the bytes that it is given, has
compress read it, and puts the file back. An input is a fault if compress raises anything but a CompressError, or breaks
a promise that `fuzz.oracle` watches.
"""

from __future__ import annotations

import json
import os
import struct
from abc import ABC, abstractmethod
from pathlib import Path
from typing import ClassVar

from fuzz.choices import Choices, change_bytes, change_json, json_text
from fuzz.oracle import Broken, judged
from tests.conftest import tiny_directory

PLAN = """\
[model]
path = "model"
[calibration]
source = "text.txt"
samples = 2
length = 16
[run]
output = "out"
device = "cpu"
threads = 1
[[pass]]
use = "sparsegpt"
pattern = "2:4"
[[pass]]
use = "gptq"
bits = 4
group_size = 16
  [[pass.where]]
  match = "*.down_proj"
  bits = 8
[evaluate]
perplexity = ["text.txt"]
window = 16
"""
EVIL = 'import pathlib\npathlib.Path({marker!r}).write_text("owned")\nclass Evil: pass\nEvilConfig = Evil\n'


class Target(ABC):
    """One kind of file. `name` is what ``python -m fuzz`` calls it."""

    name: ClassVar[str]
    keys: ClassVar[tuple[str, ...]] = ()  # that may be added to JSON objects

    def __init__(self, folder: Path) -> None:
        """Make the seeds in `folder`, an empty one."""
        self.folder = folder
        self.marker = folder / "owned"
        self.model = tiny_directory(folder / "model", "llama", blocks=2, tied=False)
        (self.model / "evil.py").write_text(EVIL.format(marker=str(self.marker)))
        (folder / "plan.toml").write_text(PLAN)
        self.prepare()

    def prepare(self) -> None:  # noqa: B027  # most need no more
        """Make more seeds."""

    @abstractmethod
    def change(self, choices: Choices) -> dict[Path, bytes]:
        """The files that are changed, and what they hold then."""

    @abstractmethod
    def read(self) -> object:
        """Have compress read them, as a user's command does."""

    def run(self, data: bytes) -> None:
        """Judge one input. Raises whatever is not a refusal."""
        changed = self.change(Choices(data))
        before = {path: path.read_bytes() if path.is_file() else None for path in changed}
        here = Path.cwd()
        os.chdir(self.folder)
        try:
            for path, content in changed.items():
                path.write_bytes(content)
            with judged(self.folder):
                self.read()
            if self.marker.exists():
                raise Broken("code of the model ran")
        finally:
            os.chdir(here)
            self.marker.unlink(missing_ok=True)
            for path, old in before.items():
                path.unlink(missing_ok=True) if old is None else path.write_bytes(old)

    def json(self, path: Path, choices: Choices) -> bytes:
        """A JSON file, changed in its values or, now and then, in its bytes."""
        text = path.read_bytes()
        if choices.below(8) == 1:
            return change_bytes(text, choices)
        return json_text(change_json(json.loads(text), choices, self.keys)).encode()

    def header(self, path: Path, choices: Choices) -> bytes:
        """A safetensors file with a changed header; its length is mostly right."""
        whole = path.read_bytes()
        (length,) = struct.unpack("<Q", whole[:8])
        header, data = json.loads(whole[8 : 8 + length]), whole[8 + length :]
        kind = choices.below(8)
        if kind == 1:
            return change_bytes(whole[: 8 + length], choices) + data
        if kind == 2:
            return change_bytes(whole, choices)
        text = json_text(change_json(header, choices, self.keys)).encode()
        return struct.pack("<Q", len(text)) + text + data

    def within(self, path: Path, key: str, choices: Choices) -> bytes:
        """A JSON file in which the value of one key is changed."""
        whole = json.loads(path.read_text())
        return json_text(whole | {key: change_json(whole[key], choices, self.keys)}).encode()
