"""safetensors headers and indices, damaged and hostile ones above all."""

from __future__ import annotations

import json
import shutil
import struct
from typing import TYPE_CHECKING, Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

from compress.checkpoint import (
    DTYPES,
    INDEX,
    MAX_HEADER,
    SINGLE,
    Checkpoint,
    Shard,
    Slot,
    index_text,
    lay_out,
    read_file,
    read_header,
    slots_of,
    write_shard,
)
from compress.errors import ModelError

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

A = {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]}
B = {"dtype": "I8", "shape": [8], "data_offsets": [24, 32]}


def write(path: Path, header: Any, data: bytes = b"\1" * 32, *, length: int | None = None) -> Path:
    """A file with this header, right or wrong."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + data)
    return path


def test_a_good_file(tmp_path: Path) -> None:
    path = write(tmp_path / SINGLE, {"__metadata__": {"format": "pt"}, "b": B, "a": A})
    assert {info.name: info.bytes for info in read_header(path)} == {"a": 24, "b": 8}
    tensors = read_file(path)
    assert tensors["b"].tolist() == [1] * 8
    assert torch.equal(tensors["a"], load_file(path)["a"])


HOSTILE: dict[str, tuple[Any, str]] = {
    "begins outside": ({"a": A | {"data_offsets": [32, 56]}, "b": B | {"data_offsets": [0, 8]}}, "truncated"),
    "ends outside": ({"a": A | {"shape": [2, 300], "data_offsets": [0, 2400]}}, "truncated"),
    "overlap": ({"a": A, "b": B | {"data_offsets": [16, 24]}}, "overlap"),
    "the same bytes twice": ({"a": A, "c": A, "b": B}, "overlap"),
    "a hole": ({"b": B, "c": B | {"data_offsets": [0, 8]}}, "hole"),
    "bytes of nobody": ({"a": A}, "belong to nothing"),
    "no tensors, but bytes": ({}, "belong to nothing"),
    "duplicate key": (b'{"a": %b, "b": %b, "a": %b}' % (*(json.dumps(x).encode() for x in (A, B, A)),), "twice"),
    "duplicate inside": (b'{"a": {"dtype": "F32", "dtype": "I8", "shape": [32], "data_offsets": [0, 32]}}', "twice"),
    "unknown dtype": ({"a": A | {"dtype": "F33"}, "b": B}, "'F33'"),
    "dtype is a list": ({"a": A | {"dtype": ["F32"]}, "b": B}, "dtype"),
    "dtype is an object": ({"a": A | {"dtype": {}}, "b": B}, "dtype"),
    "no dtype": ({"a": {"shape": [2, 3], "data_offsets": [0, 24]}, "b": B}, "dtype None"),
    "shape and bytes disagree": ({"a": A | {"shape": [2, 4]}, "b": B}, "claims 24 bytes"),
    "dtype and bytes disagree": ({"a": A | {"dtype": "F16"}, "b": B}, "claims 24 bytes"),
    "shape overflows": ({"a": A | {"shape": [1 << 61, 1 << 61, 6]}, "b": B}, "claims 24 bytes"),
    "shape is enormous": ({"a": A | {"shape": [1 << 70]}, "b": B}, "non-negative"),
    "negative shape": ({"a": A | {"shape": [-2, -3]}, "b": B}, "non-negative"),
    "float shape": ({"a": A | {"shape": [2.0, 3]}, "b": B}, "non-negative"),
    "boolean shape": ({"a": A | {"shape": [True, 6]}, "b": B}, "non-negative"),
    "shape is text": ({"a": A | {"shape": "23"}, "b": B}, "shape"),
    "negative offset": ({"a": A | {"data_offsets": [-8, 16]}, "b": B}, "non-negative"),
    "float offset": ({"a": A | {"data_offsets": [0.0, 24.0]}, "b": B}, "non-negative"),
    "reversed offsets": ({"a": A | {"data_offsets": [24, 0]}, "b": B}, "[24, 0]"),
    "three offsets": ({"a": A | {"data_offsets": [0, 8, 24]}, "b": B}, "data_offsets"),
    "no offsets": ({"a": {"dtype": "F32", "shape": [2, 3]}, "b": B}, "data_offsets"),
    "entry is a list": ({"a": [A], "b": B}, "not an object"),
    "entry is null": ({"a": None, "b": B}, "not an object"),
    "header is a list": ([A, B], "not a JSON object"),
    "header is a number": (b"12345678", "not a JSON object"),
    "not JSON": (b"{]", "not valid JSON"),
    "not UTF-8": (b'{"\xff\xfe": 1}', "not valid JSON"),
    "too deep": (b'{"a":' * 100_000, "not valid JSON"),
    "too many digits": (b'{"a": ' + b"9" * 5000 + b"}", "not valid JSON"),
    "terminal control": ({"\x1b[2Jgone": A, "b": B}, "cannot be printed"),
    "half a surrogate pair": ({"\ud800": A, "b": B}, "cannot be printed"),
    "line break in a name": ({"a\nfix: pip install evil": A, "b": B}, "cannot be printed"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_a_header_that_lies(case: str, tmp_path: Path) -> None:
    header, says = HOSTILE[case]
    path = write(tmp_path / SINGLE, header)
    with pytest.raises(ModelError) as error:
        Checkpoint(tmp_path)
    assert says in error.value.problem
    assert error.value.where == str(path)
    assert error.value.fix
    assert len(str(error.value)) < 1000
    str(error.value).encode()


@pytest.mark.parametrize("size", [0, 1, 7])
def test_too_short_for_a_header(size: int, tmp_path: Path) -> None:
    (tmp_path / SINGLE).write_bytes(b"\0" * size)
    with pytest.raises(ModelError, match="truncated"):
        Checkpoint(tmp_path)


@pytest.mark.parametrize("length", [1 << 20, 1 << 40, (1 << 64) - 1])
def test_a_header_length_beyond_the_file(length: int, tmp_path: Path) -> None:
    write(tmp_path / SINGLE, {"a": A, "b": B}, length=length)
    with pytest.raises(ModelError, match="truncated: the header needs"):
        Checkpoint(tmp_path)


def test_a_huge_header_is_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path / SINGLE, {"a": A, "b": B}, length=MAX_HEADER + 1)
    with path.open("r+b") as file:
        file.truncate(MAX_HEADER * 4)  # sparse: it takes no disk
    monkeypatch.setattr(json, "loads", None)
    with pytest.raises(ModelError, match="of one at most"):
        Checkpoint(tmp_path)


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_a_damaged_byte_is_an_error_or_a_valid_header(tmp_path_factory: Any, data: st.DataObject) -> None:
    """Whatever the damage, there is no other exception, and nothing lies outside the file."""
    good = json.dumps({"a": A, "b": B}).encode()
    text = bytearray(good)
    for _ in range(data.draw(st.integers(1, 3))):
        text[data.draw(st.integers(0, len(text) - 1))] = data.draw(st.integers(0, 255))
    path = write(tmp_path_factory.getbasetemp() / "fuzz.safetensors", bytes(text))
    try:
        infos = list(read_header(path))
    except ModelError:
        return
    for info in infos:
        assert 8 + len(text) <= info.start <= info.start + info.bytes <= path.stat().st_size


@pytest.mark.parametrize("cut", [1, 20, 40])
def test_a_truncated_file(cut: int, tmp_path: Path) -> None:
    path = write(tmp_path / SINGLE, {"a": A, "b": B})
    path.write_bytes(path.read_bytes()[:-cut])
    with pytest.raises(ModelError, match="truncated"):
        Checkpoint(tmp_path)


def test_a_file_truncated_after_its_header_was_read(tmp_path: Path) -> None:
    path = write(tmp_path / SINGLE, {"a": A, "b": B})
    checkpoint = Checkpoint(tmp_path)
    path.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(ModelError, match="the file ends 4 bytes before b does"):
        checkpoint.read("b")


# ------------------------------------------------------------------ shards


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    folder.mkdir()
    save_file({"a": torch.arange(6.0).view(2, 3)}, folder / "one.safetensors")
    save_file({"b": torch.arange(4), "c": torch.ones(2)}, folder / "two.safetensors")
    rewrite(folder, {"a": "one.safetensors", "b": "two.safetensors", "c": "two.safetensors"})
    return folder


def rewrite(folder: Path, weight_map: Any) -> None:
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def test_shards(sharded: Path) -> None:
    checkpoint = Checkpoint(sharded)
    assert checkpoint.read("b").tolist() == [0, 1, 2, 3]
    assert sorted(checkpoint.tensors) == ["a", "b", "c"]
    assert checkpoint.sizes.keys() == {"one.safetensors", "two.safetensors"}


@pytest.mark.parametrize(
    "file",
    ["../one.safetensors", "/etc/passwd", "sub/one.safetensors", "..", ".", "", "..\\one.safetensors", 5, None, ["x"]],
)
def test_an_index_that_leads_outside(file: Any, sharded: Path) -> None:
    shutil.copy(sharded / "one.safetensors", sharded.parent)
    rewrite(sharded, {"a": file, "b": "two.safetensors"})
    with pytest.raises(ModelError, match="outside the model directory"):
        Checkpoint(sharded)


def _missing(folder: Path) -> None:
    (folder / "two.safetensors").unlink()


def _absent(folder: Path) -> None:
    rewrite(folder, {"a": "one.safetensors", "b": "two.safetensors", "d": "two.safetensors"})


def _swapped(folder: Path) -> None:
    rewrite(folder, {"a": "two.safetensors", "b": "one.safetensors"})


def _twice(folder: Path) -> None:
    save_file({"a": torch.ones(1), "b": torch.ones(1), "c": torch.ones(1)}, folder / "two.safetensors")


def _folder(folder: Path) -> None:
    (folder / "two.safetensors").unlink()
    (folder / "two.safetensors").mkdir()


def _nothing(folder: Path) -> None:
    rewrite(folder, {})


def _list(folder: Path) -> None:
    rewrite(folder, ["one.safetensors"])


def _no_object(folder: Path) -> None:
    (folder / INDEX).write_text("[]")


def _no_json(folder: Path) -> None:
    (folder / INDEX).write_bytes(b"\xff\xfe{")


def _dangling(folder: Path) -> None:
    (folder / "two.safetensors").unlink()
    (folder / "two.safetensors").symlink_to("three.safetensors")


def _outside(folder: Path) -> None:
    (folder / "two.safetensors").rename(folder.parent / "two.safetensors")
    (folder / "two.safetensors").symlink_to("../two.safetensors")


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (_missing, "shard two.safetensors is missing; 2 tensors are said to be in it, b among them"),
        (_absent, "says that d is in two.safetensors, but the shard lacks it"),
        (_swapped, "but the shard lacks it"),
        (_twice, "a is also in one.safetensors"),
        (_folder, "is not a file"),
        (_nothing, "weight_map"),
        (_list, "weight_map"),
        (_no_object, "not a JSON object"),
        (_no_json, "cannot be read as JSON"),
        (_dangling, "is missing"),
        (_outside, "a link that leads outside the model directory"),
    ],
)
def test_index_and_shards_that_disagree(damage: Callable[[Path], None], says: str, sharded: Path) -> None:
    damage(sharded)
    with pytest.raises(ModelError) as error:
        Checkpoint(sharded)
    assert says in error.value.problem
    assert str(sharded) in (error.value.where or "")
    assert error.value.fix


def hub_cache(root: Path, model: Path) -> Path:
    """The layout of huggingface_hub: snapshots/REVISION/NAME -> ../../blobs/HASH."""
    snapshot = root / "models--org--name" / "snapshots" / "0123abc"
    blobs = root / "models--org--name" / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for number, path in enumerate(sorted(model.iterdir())):
        shutil.copy(path, blobs / f"{number:040x}")
        (snapshot / path.name).symlink_to(f"../../blobs/{number:040x}")
    return snapshot


def test_the_hubs_cache_is_accepted(sharded: Path, tmp_path: Path) -> None:
    snapshot = hub_cache(tmp_path / "hub", sharded)
    assert Checkpoint(snapshot).read("b").tolist() == [0, 1, 2, 3]
    (tmp_path / "mine").symlink_to(snapshot)  # people link a snapshot to a shorter name
    assert Checkpoint(tmp_path / "mine").read("b").tolist() == [0, 1, 2, 3]


def test_a_snapshot_may_link_to_its_blobs_only(sharded: Path, tmp_path: Path) -> None:
    snapshot = hub_cache(tmp_path / "hub", sharded)
    (snapshot / "one.safetensors").unlink()
    (snapshot / "one.safetensors").symlink_to(sharded / "one.safetensors")
    with pytest.raises(ModelError, match="leads outside"):
        Checkpoint(snapshot)


def test_a_link_within_the_directory_is_fine(sharded: Path) -> None:
    (sharded / "two.safetensors").rename(sharded / "deux")
    (sharded / "two.safetensors").symlink_to("deux")
    assert Checkpoint(sharded).read("b").tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "consolidated.00.pth", "last.ckpt"])
def test_a_pickled_checkpoint_is_not_opened(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(b"cos\nsystem\n(S'touch owned'\ntR.")
    with pytest.raises(ModelError) as error:
        Checkpoint(tmp_path)
    assert name in error.value.problem
    assert "could run any code" in error.value.problem
    assert "save_pretrained" in (error.value.fix or "")


def test_no_weights_at_all(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"no model\.safetensors"):
        Checkpoint(tmp_path)


# ------------------------------------------------------------------ writing


@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.tuples(st.sampled_from(sorted(DTYPES)), st.lists(st.integers(0, 4), max_size=3)), min_size=1, max_size=6
    ),
    st.integers(1, 200),
)
def test_layout_is_exact_and_written_as_laid_out(
    tmp_path_factory: Any, shapes: list[tuple[str, list[int]]], shard_size: int
) -> None:
    folder = tmp_path_factory.mktemp("shards")
    generator = torch.Generator().manual_seed(len(shapes))
    tensors = {}
    for number, (dtype, shape) in enumerate(shapes):
        numbers = torch.randint(0, 2, shape, generator=generator, dtype=torch.uint8)
        tensors[f"layer.{number}"] = numbers.to(DTYPES[dtype])
    shards = lay_out(slots_of(tensors), shard_size)
    for shard in shards:
        write_shard(shard, folder, tensors, synced=False)
        assert (folder / shard.file).stat().st_size == shard.bytes
        assert len(shard.header()) % 8 == 0
        assert len(shard.slots) == 1 or sum(slot.bytes for slot in shard.slots) <= shard_size
        with safe_open(folder / shard.file, framework="pt") as file:  # the independent reader
            assert sorted(file.keys()) == sorted(slot.name for slot in shard.slots)
        at = 0
        for slot in shard.slots:
            assert at % DTYPES[slot.dtype].itemsize == 0  # aligned
            at += slot.bytes
    if index := index_text(shards):
        (folder / INDEX).write_text(index)
    found = Checkpoint(folder)
    assert set(found.tensors) == set(tensors)
    for name, tensor in tensors.items():
        read = found.read(name)
        assert (read.dtype, read.shape) == (tensor.dtype, tensor.shape)
        assert torch.equal(read.float(), tensor.float())


def test_what_we_refuse_safetensors_refuses_mostly_too(tmp_path: Path) -> None:
    """A sanity check of the cases above: the reference reader refuses every structural lie."""
    structural = [
        "overlap",
        "a hole",
        "bytes of nobody",
        "unknown dtype",
        "shape and bytes disagree",
        "negative offset",
    ]
    for case in structural:
        path = write(tmp_path / f"{case}.safetensors", HOSTILE[case][0])
        with pytest.raises(SafetensorError), safe_open(path, framework="pt") as file:
            file.keys()


def test_a_tensor_larger_than_a_shard_stands_alone() -> None:
    shards = lay_out([Slot("a", "F32", (4,)), Slot("b", "F32", (100,)), Slot("c", "F32", (4,))], 64)
    assert [[slot.name for slot in shard.slots] for shard in shards] == [["a"], ["b"], ["c"]]
    assert [shard.file for shard in shards] == [f"model-0000{n}-of-00003.safetensors" for n in (1, 2, 3)]
    assert index_text([Shard(SINGLE, ())]) is None
