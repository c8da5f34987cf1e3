"""``compress swap-scales``: put another named set of scales into the weight files of an output. Codes are not touched.

A set is active when the weight files hold its bytes; there is no other record of it that could be wrong. Each weight
file is replaced by a patched copy of itself, by a rename, so that a kill leaves the old file or the new one. Where the
scales lie in several files, copies of all are complete before the first is renamed; a kill between two renames leaves
files of both sets, of which none is then active, and the same command completes it.
"""

from __future__ import annotations

import fcntl
import os
import shutil
from collections import defaultdict
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from compress.checkpoint import Checkpoint, TensorInfo, raw_bytes, read_header, read_tensor
from compress.errors import ModelError, PlanError, RunError, nearest
from compress.export.formats import PackedFormat, known_formats
from compress.export.scales import FOLDER, SUFFIX
from compress.export.verify import read_independently, same_bits
from compress.journal import sync
from compress.model_files import is_inside, read_json

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from torch import Tensor


@dataclass(frozen=True)
class Swapped:
    """What a swap did: the set that is active now, those that were, and the files that were replaced."""

    name: str
    before: tuple[str, ...]
    linears: int
    bytes: int
    files: tuple[str, ...]


class ScaledOutput:
    """An output of compress that has named sets of scales."""

    def __init__(self, directory: Path) -> None:
        """Read its lock, headers and the names of its sets; raises PlanError for any other directory."""
        self.directory, self.folder = directory, directory / FOLDER
        if not directory.is_dir():
            raise PlanError("no such directory", where=str(directory), fix="give the output of a run")
        self.sets = sorted(path.stem for path in self.folder.glob("*.safetensors"))
        if not self.sets:
            fix = "give the output of a plan whose peqa passes have a name"
            raise PlanError("holds no sets of scales", where=str(directory), fix=fix)
        lock = read_json(directory / "lock.json")
        form = known_formats().get(str(lock.get("format")))
        if not isinstance(form, PackedFormat):
            raise PlanError(
                f"its format, {lock.get('format')}, stores weights without their scales",
                where=str(directory),
                fix='run the plan with [[export]] format = "gptq", "compressed-tensors" or "packed"',
            )
        self.form = form
        checkpoint = Checkpoint(directory)
        try:
            stored = {
                linear["name"]: f"{linear['tensor'].removesuffix('weight')}{form.scales}"
                for linear in lock["linears"]
                if linear["grid"]
            }
            self.places = {name: checkpoint.tensors[tensor] for name, tensor in stored.items()}
        except (LookupError, TypeError, AttributeError) as error:
            problem = f"lock.json and weights do not belong together: {error!r}"
            raise ModelError(problem, where=str(directory), fix="copy the whole output again") from None

    def set(self, name: str) -> dict[str, Tensor]:
        """The scales of a set, as the weight files store them, by linear. Raises PlanError for an unknown set."""
        path = self.folder / f"{name}.safetensors"
        if name not in self.sets:
            raise PlanError(
                f'no set of scales "{name}"{nearest(name, self.sets)}',
                where=str(self.folder),
                fix=f"the sets are {', '.join(self.sets)}",
            )
        if not is_inside(path, self.directory):
            raise ModelError("is a link that leads outside the output", where=str(path), fix="copy the file")
        infos = {info.name.removesuffix(SUFFIX): info for info in read_header(path)}
        odd = sorted(infos.keys() ^ self.places.keys())
        if odd:
            raise self._unfit(path, f"{odd[0]} is in only one of the set and the model")
        found = {}
        for linear, place in self.places.items():
            scale = read_tensor(path, infos[linear])
            if scale.ndim != 2 or not bool(((scale > 0) & torch.isfinite(scale)).all()):
                raise self._unfit(path, f"the scales of {linear} are not positive numbers by row and group")
            found[linear] = self.form.stored_scale(scale)
            if (tuple(found[linear].shape), scale.dtype) != (place.shape, place.torch_dtype):
                raise self._unfit(path, f"the scales of {linear} have another shape or dtype than the model's")
        return found

    def active(self) -> tuple[str, ...]:
        """The sets whose scales the weight files hold: usually one; equal sets all."""
        now = {linear: self._read(place) for linear, place in self.places.items()}
        return tuple(name for name in self.sets if all(same_bits(t, now[n]) for n, t in self.set(name).items()))

    def swap(self, name: str) -> Swapped:
        """Put a set into the weight files, atomically for each file."""
        with self._alone():
            wanted, before = self.set(name), self.active()
            total = sum(place.bytes for place in self.places.values())
            files: dict[str, list[str]] = defaultdict(list)
            for linear, place in self.places.items():
                if not same_bits(self._read(place), wanted[linear]):
                    files[place.file].append(linear)
            copies = {file: self.directory / f".{file}.swap" for file in sorted(files)}
            try:
                for file, copy in copies.items():
                    self._patch(self.directory / file, copy, {n: wanted[n] for n in files[file]})
                for file, copy in copies.items():
                    copy.replace(self.directory / file)
                sync(self.directory)
            finally:
                for copy in copies.values():
                    copy.unlink(missing_ok=True)
        return Swapped(name, before, len(self.places), total, tuple(copies))

    def _read(self, place: TensorInfo) -> Tensor:
        return read_tensor(self.directory / place.file, place)

    def _patch(self, path: Path, copy: Path, scales: dict[str, Tensor]) -> None:
        """A copy of a weight file with other scales, on the disk and read back."""
        copy.unlink(missing_ok=True)  # of a swap that was killed
        shutil.copyfile(path, copy)
        shutil.copymode(path, copy)
        with copy.open("r+b") as file:
            for linear, scale in scales.items():
                file.seek(self.places[linear].start)
                file.write(raw_bytes(scale))
        sync(copy)
        for linear, scale in scales.items():
            if not same_bits(read_independently(copy, self.places[linear].name), scale):
                fix = "check the disk; the file that it is a copy of was not changed"
                raise RunError(f"the scales of {linear} cannot be read back", where=str(copy), fix=fix)

    @contextmanager
    def _alone(self) -> Iterator[None]:
        handle = os.open(self.folder, os.O_RDONLY)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            yield
        except BlockingIOError:
            raise PlanError("another swap of scales is under way", where=str(self.directory), fix="wait") from None
        finally:
            os.close(handle)

    def _unfit(self, path: Path, problem: str) -> ModelError:
        return ModelError(problem, where=str(path), fix="copy the whole output again")
