"""Read and write safetensors checkpoints by tensor, without ever mapping or holding a whole file.

Why not `safetensors.safe_open` here: it maps the file, and mapped pages count as resident memory until the file is
closed, so peak memory would grow with the model; `save_file` needs a whole shard in memory. The format is eight bytes,
a JSON header and the data, so reading it by `readinto` is short. The `safetensors` package stays the independent
reader that verifies what is written (`compress.export.verify`).

A header is checked before any tensor is read: it may come from anybody.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

import torch

from compress.errors import ModelError
from compress.model_files import MAX_JSON, is_inside, read_json

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping

    from torch import Tensor

DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}
MAX_HEADER = MAX_JSON  # bytes, some 300,000 tensors a file; the format allows 100 MB, which take gigabytes as objects
INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
MASKS = "masks.safetensors"  # bit-packed masks beside weights that are stored as codes


@dataclass(frozen=True)
class TensorInfo:
    """Where a tensor lies: `start` is the absolute offset in the file, in bytes."""

    name: str
    file: str
    dtype: str
    shape: tuple[int, ...]
    start: int

    @property
    def bytes(self) -> int:
        """Size of the data."""
        return math.prod(self.shape) * DTYPES[self.dtype].itemsize

    @property
    def torch_dtype(self) -> torch.dtype:
        """The dtype as torch names it."""
        return DTYPES[self.dtype]


class Checkpoint:
    """The tensors of a model directory, known from its headers; `read` brings one into memory."""

    single: ClassVar[str] = SINGLE
    index: ClassVar[str] = INDEX

    def __init__(self, directory: Path) -> None:
        """Read and check every header.

        Raises:
            ModelError: no safetensors, a missing or truncated shard, a header that lies, a path that leads outside.
        """
        self.directory = directory
        self.tensors: dict[str, TensorInfo] = {}
        self.sizes: dict[str, int] = {}
        index = directory / self.index
        if index.exists():
            self._read_index(index)
        elif (directory / self.single).exists():
            self._add(self.single)
        else:
            raise _no_weights(directory)

    def _read_index(self, index: Path) -> None:
        weight_map = read_json(index).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise ModelError('"weight_map" is missing or empty', where=str(index), fix="save the model again")
        files: dict[str, list[str]] = {}
        for name, file in weight_map.items():
            if not _is_plain(file):
                raise ModelError(
                    f'tensor "{name}" is said to be in {file!r}, outside the model directory',
                    where=str(index),
                    fix="do not use this checkpoint unless you know why; shards are plain file names",
                )
            files.setdefault(file, []).append(name)
        for file, names in files.items():
            if not (self.directory / file).exists():
                raise ModelError(
                    f"shard {file} is missing; {len(names)} tensors are said to be in it, {names[0]} among them",
                    where=str(self.directory),
                    fix="download or copy the shard again",
                )
            self._add(file)
            absent = sorted(name for name in names if name not in self.tensors or self.tensors[name].file != file)
            if absent:
                raise ModelError(
                    f"{self.index} says that {absent[0]} is in {file}, but the shard lacks it",
                    where=str(self.directory / file),
                    fix="shards and index are of different checkpoints; download both again",
                )

    def _add(self, file: str) -> None:
        path = self.directory / file
        if not is_inside(path, self.directory):
            raise ModelError("is a link that leads outside the model directory", where=str(path), fix="copy the file")
        if not path.is_file():
            raise ModelError("is not a file", where=str(path), fix="copy the model again")
        self.sizes[file] = path.stat().st_size
        for info in read_header(path):
            if info.name in self.tensors:
                other = self.tensors[info.name].file
                raise ModelError(f"{info.name} is also in {other}", where=str(path), fix="save the model again")
            self.tensors[info.name] = info

    def read(self, name: str) -> Tensor:
        """One tensor, as stored. Raises ModelError when the file ended or changed since its header was read."""
        info = self.tensors[name]
        return read_tensor(self.directory / info.file, info)

    def expect(self, names: Iterable[str]) -> None:
        """Have the system read tensors into its cache while something else goes on, where it can (Linux)."""
        if not hasattr(os, "posix_fadvise"):
            return
        spans: dict[str, list[TensorInfo]] = {}
        for name in names:
            spans.setdefault(self.tensors[name].file, []).append(self.tensors[name])
        for file, infos in spans.items():
            handle = os.open(self.directory / file, os.O_RDONLY)
            try:
                for info in infos:
                    os.posix_fadvise(handle, info.start, info.bytes, os.POSIX_FADV_WILLNEED)
            finally:
                os.close(handle)

    def digest(self) -> str:
        """SHA-256 over names, dtypes, shapes and places of all tensors; the data itself is hashed as it is read."""
        lines = (f"{t.name} {t.dtype} {t.shape} {t.file} {t.start}" for _, t in sorted(self.tensors.items()))
        return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def _is_plain(file: Any) -> bool:
    """Whether an index names a file of its own directory."""
    if not isinstance(file, str) or file != Path(file).name or file in ("", ".", "..") or "\\" in file:
        return False
    return len(file.encode(errors="replace")) <= 255  # no file has a longer name


def read_tensor(path: Path, info: TensorInfo) -> Tensor:
    """One tensor of a file, as its header describes it."""
    flat = torch.empty(info.bytes, dtype=torch.uint8, device="cpu")  # whatever torch's default device is
    with path.open("rb", buffering=0) as file:
        file.seek(info.start)
        view = memoryview(flat.numpy().data)
        done = 0
        while done < info.bytes:
            count = file.readinto(view[done:])
            if not count:
                raise ModelError(
                    f"the file ends {info.bytes - done} bytes before {info.name} does",
                    where=str(path),
                    fix="the file was truncated during the run; copy it again",
                )
            done += count
    return flat.view(info.torch_dtype).view(info.shape)


def read_file(path: Path) -> dict[str, Tensor]:
    """All tensors of one safetensors file."""
    return {info.name: read_tensor(path, info) for info in read_header(path)}


def read_header(path: Path) -> Iterator[TensorInfo]:
    """The tensors of one safetensors file, checked against the file's size. Raises ModelError."""

    def wrong(problem: str) -> ModelError:
        return ModelError(problem, where=str(path), fix="the file is damaged or hostile; download or save it again")

    found = path.stat()
    if not stat.S_ISREG(found.st_mode):
        raise wrong("is not a file")
    size = found.st_size
    with path.open("rb") as file:
        head = file.read(8)
        length = int.from_bytes(head, "little")
        if len(head) < 8 or length > size - 8:
            raise wrong(f"truncated: the header needs {length + 8} bytes, the file has {size}")
        if length > MAX_HEADER:
            raise wrong(f"the header claims {length} bytes; of one at most {MAX_HEADER} are read")
        raw = file.read(length)
    try:
        header = json.loads(raw, object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        raise wrong(f"the header is not valid JSON: {error}") from None
    if not isinstance(header, dict):
        raise wrong("the header is not a JSON object")
    header.pop("__metadata__", None)
    spans: list[tuple[int, int, str]] = []
    infos: list[TensorInfo] = []
    for name, entry in header.items():
        dtype, shape, begin, end = _entry(entry, name, wrong)
        needed = math.prod(shape) * DTYPES[dtype].itemsize
        if end - begin != needed:
            raise wrong(f"{name} claims {end - begin} bytes, but {dtype} {list(shape)} has {needed}")
        if end > size - 8 - length:
            raise wrong(f"truncated: {name} ends at byte {8 + length + end}, the file has {size}")
        spans.append((begin, end, name))
        infos.append(TensorInfo(name, path.name, dtype, shape, 8 + length + begin))
    at = 0
    for begin, end, name in sorted(spans):
        if begin != at:
            raise wrong(f"{name} begins at {begin} where {at} was expected: tensors overlap or leave a hole")
        at = end
    if at != size - 8 - length:
        raise wrong(f"{size - 8 - length - at} bytes after the last tensor belong to nothing")
    yield from infos


def _entry(entry: Any, name: str, wrong: Any) -> tuple[str, tuple[int, ...], int, int]:
    if not name.isprintable():  # control sequences, halves of surrogate pairs
        raise wrong(f"the name {name!a} holds characters that cannot be printed")
    if not isinstance(entry, dict):
        raise wrong(f"the entry of {name} is not an object")
    dtype: Any = entry.get("dtype")
    shape: Any = entry.get("shape")
    offsets: Any = entry.get("data_offsets")
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise wrong(f"{name} has dtype {dtype!r}, which this version does not read")
    for what, value in (("shape", shape), ("data_offsets", offsets)):
        if not isinstance(value, list) or not all(type(n) is int and 0 <= n < 1 << 62 for n in value):
            raise wrong(f"{what} of {name} is {value!r}, not a list of non-negative integers")
    if len(offsets) != 2 or offsets[0] > offsets[1]:
        raise wrong(f"data_offsets of {name} are {offsets!r}")
    return dtype, tuple(shape), offsets[0], offsets[1]


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) < len(pairs):
        raise ValueError("a key appears twice")
    return result


def _no_weights(directory: Path) -> ModelError:
    pickled = sorted(p.name for p in directory.iterdir() if p.suffix in (".bin", ".pt", ".pth", ".ckpt"))
    if pickled:
        return ModelError(
            f"only a pickled checkpoint ({pickled[0]}) is here; loading it could run any code, so it is refused",
            where=str(directory),
            fix="convert it where you trust it: AutoModelForCausalLM.from_pretrained(...).save_pretrained(...)",
        )
    return ModelError(
        f"no {SINGLE} and no {INDEX}", where=str(directory), fix="give the directory of a safetensors model"
    )


@dataclass(frozen=True)
class Slot:
    """A tensor to be written."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def bytes(self) -> int:
        """Size of the data."""
        return math.prod(self.shape) * DTYPES[self.dtype].itemsize


@dataclass(frozen=True)
class Shard:
    """A file to be written; its header, and so its exact size, is known before any tensor is."""

    file: str
    slots: tuple[Slot, ...]

    def header(self) -> bytes:
        """Length and JSON header, padded with spaces to eight bytes as the format wants."""
        entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        at = 0
        for slot in self.slots:
            offsets = [at, at + slot.bytes]
            entries[slot.name] = {"dtype": slot.dtype, "shape": list(slot.shape), "data_offsets": offsets}
            at += slot.bytes
        text = json.dumps(entries, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        return len(text).to_bytes(8, "little") + text

    @property
    def bytes(self) -> int:
        """Exact size of the file."""
        return len(self.header()) + sum(slot.bytes for slot in self.slots)


def lay_out(slots: list[Slot], shard_size: int) -> list[Shard]:
    """Distribute tensors over files of at most `shard_size` bytes of data, in order; a larger tensor stands alone."""
    groups: list[list[Slot]] = [[]]
    filled = 0
    for slot in slots:
        if groups[-1] and filled + slot.bytes > shard_size:
            groups.append([])
            filled = 0
        groups[-1].append(slot)
        filled += slot.bytes
    if len(groups) == 1:
        return [Shard(SINGLE, _aligned(groups[0]))]
    total = len(groups)
    return [Shard(f"model-{i:05d}-of-{total:05d}.safetensors", _aligned(g)) for i, g in enumerate(groups, start=1)]


def _aligned(slots: list[Slot]) -> tuple[Slot, ...]:
    """Wide dtypes first, so that every tensor begins at a multiple of its element size."""
    return tuple(sorted(slots, key=lambda slot: -DTYPES[slot.dtype].itemsize))


def index_text(shards: list[Shard], *, always: bool = False) -> str | None:
    """The index file of several shards; None for a single one, unless there is `always` one."""
    if len(shards) == 1 and not always:
        return None
    weight_map = {slot.name: shard.file for shard in shards for slot in shard.slots}
    total = sum(slot.bytes for shard in shards for slot in shard.slots)
    return json.dumps({"metadata": {"total_size": total}, "weight_map": weight_map}, indent=2, sort_keys=True) + "\n"


class Tensors(Protocol):
    """Gives tensors by name."""

    def __getitem__(self, name: str, /) -> Tensor:
        """The tensor of this name."""


def write_shard(shard: Shard, directory: Path, tensors: Tensors, *, synced: bool = True) -> str:
    """Write one file, a tensor at a time.

    Args:
        shard: what to write.
        directory: where.
        tensors: asked for each tensor when it is its turn.
        synced: have it on the disk when this returns.

    Returns:
        The SHA-256 of the file.
    """
    digest = hashlib.sha256()
    with (directory / shard.file).open("wb") as file:
        header = shard.header()
        digest.update(header)
        file.write(header)
        for slot in shard.slots:
            tensor = tensors[slot.name]
            assert (tuple(tensor.shape), DTYPE_NAMES[tensor.dtype]) == (slot.shape, slot.dtype), slot.name
            data = raw_bytes(tensor)
            digest.update(data)
            file.write(data)
        file.flush()
        if synced:
            os.fsync(file.fileno())
    return digest.hexdigest()


def raw_bytes(tensor: Tensor) -> memoryview:
    """The bytes of a CPU tensor, without a copy if it is contiguous."""
    flat = tensor.detach().cpu().contiguous().flatten()
    return memoryview(flat.view(torch.uint8).numpy().data) if flat.numel() else memoryview(b"")


def slots_of(tensors: Mapping[str, Tensor]) -> list[Slot]:
    """What to write for tensors that are in memory."""
    return [Slot(name, DTYPE_NAMES[tensor.dtype], tuple(tensor.shape)) for name, tensor in tensors.items()]
