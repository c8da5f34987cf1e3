"""What is emitted is read back by another reader, and one bit too many or too few is an error."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import compress
from compress import execution
from compress.calibration.moments import Moments, Statistics
from compress.checkpoint import Checkpoint
from compress.compiling import compile_plan
from compress.errors import RunError
from compress.export.huggingface import FinalTensors, export
from compress.export.verify import read_independently, same_bits, verify
from compress.passes import Magnitude
from compress.state import LinearState
from tests.conftest import tiny_directory

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from torch import Tensor

    from compress.lock import Lock

PRUNED = {"llama": "model.layers.1.mlp.down_proj.weight", "gpt2": "transformer.h.1.mlp.c_proj.weight"}
UNTOUCHED = {"llama": "model.embed_tokens.weight", "gpt2": "transformer.h.1.mlp.c_proj.bias"}


def pruned_states(lock: Lock) -> Callable[[int], dict[str, Tensor]]:
    """What a journal would keep of each block."""

    def state(block: int) -> dict[str, Tensor]:
        kept: dict[str, Tensor] = {}
        for linear in lock.in_block(block):
            stored = lock.checkpoint.read(linear.stored)
            weight = (stored.T if linear.transposed else stored).float().contiguous()
            one = LinearState(linear.name, weight, weight, stored.dtype)
            Magnitude(sparsity=0.5).apply(one, Moments(linear.in_features, Statistics.NONE))
            one.settle()
            kept |= one.tensors()
        return kept

    return state


class Emitted:
    def __init__(self, folder: Path, family: str) -> None:
        self.family = family
        tiny_directory(folder / "model", family, dtype=torch.bfloat16)
        plan = compress.Plan(
            model=compress.Model(path=str(folder / "model")),
            run=compress.Run(output=str(folder / "out")),
            passes=[Magnitude(sparsity=0.5)],
            exports=[compress.Export(shard_size=20_000)],
        )
        self.lock = compile_plan(plan)
        self.tensors = FinalTensors(self.lock, pruned_states(self.lock))
        self.directory = folder / "emitted"
        self.directory.mkdir()
        export(self.lock, self.lock.to_json(), self.tensors, self.directory)

    def shard_of(self, name: str) -> Path:
        index = json.loads((self.directory / "model.safetensors.index.json").read_text())
        return self.directory / index["weight_map"][name]

    def change(self, name: str, change: Callable[[Tensor], None]) -> None:
        """Rewrite a shard with one tensor changed in place."""
        path = self.shard_of(name)
        tensors = load_file(path)
        change(tensors[name])
        save_file(tensors, path, metadata={"format": "pt"})


@pytest.fixture(params=["llama", "gpt2"])
def emitted(request: pytest.FixtureRequest, tmp_path: Path) -> Emitted:
    return Emitted(tmp_path, request.param)


def test_what_was_written_is_accepted(emitted: Emitted) -> None:
    checkpoint = Checkpoint(emitted.directory)
    size = sum(info.bytes for info in checkpoint.tensors.values())
    assert verify(emitted.tensors, emitted.directory) == (len(emitted.lock.checkpoint.tensors), size)
    assert {p.name: p.stat().st_size for p in emitted.directory.glob("*.safetensors")} == {
        shard.file: shard.bytes for shard in emitted.lock.shards
    }


def flip_lowest_bit(tensor: Tensor) -> None:
    tensor.view(-1).view(torch.int16)[77] ^= 1


def revive(tensor: Tensor) -> None:
    tensor[(tensor == 0).nonzero()[3].unbind()] = 1e-30


def negative_zero(tensor: Tensor) -> None:
    tensor[(tensor == 0).nonzero()[3].unbind()] = -0.0


def prune_more(tensor: Tensor) -> None:
    tensor[(tensor != 0).nonzero()[3].unbind()] = 0.0


@pytest.mark.parametrize("change", [flip_lowest_bit, revive, negative_zero, prune_more])
def test_one_value_of_a_pruned_weight(emitted: Emitted, change: Callable[[Tensor], None]) -> None:
    name = PRUNED[emitted.family]
    emitted.change(name, change)
    with pytest.raises(RunError, match=f"{name} differs from what was compressed"):
        verify(emitted.tensors, emitted.directory)


def test_one_bit_of_an_untouched_tensor(emitted: Emitted) -> None:
    name = UNTOUCHED[emitted.family]
    emitted.change(name, lambda tensor: tensor.view(-1).view(torch.int16)[5].bitwise_xor_(1))
    with pytest.raises(RunError, match=f"{name} differs from what was compressed"):
        verify(emitted.tensors, emitted.directory)


def test_every_byte_of_the_data_counts(tmp_path: Path) -> None:
    """Flip bits all over a shard; none goes unnoticed."""
    emitted = Emitted(tmp_path, "llama")
    for shard in emitted.lock.shards[:2]:
        path = emitted.directory / shard.file
        original = path.read_bytes()
        header = len(shard.header())
        for at in range(header, len(original), 4999):
            damaged = bytearray(original)
            damaged[at] ^= 1 << (at % 8)
            path.write_bytes(damaged)
            with pytest.raises(RunError, match="differs from what was compressed"):
                verify(emitted.tensors, emitted.directory)
        path.write_bytes(original)
    verify(emitted.tensors, emitted.directory)


@pytest.mark.parametrize("kind", ["missing", "surplus"])
def test_a_tensor_in_only_one_of_both(emitted: Emitted, kind: str) -> None:
    name = PRUNED[emitted.family] if kind == "missing" else "odd"
    path, index = emitted.shard_of(PRUNED[emitted.family]), emitted.directory / "model.safetensors.index.json"
    tensors, listed = load_file(path), json.loads(index.read_text())
    if kind == "missing":
        del tensors[name], listed["weight_map"][name]
    else:
        tensors[name], listed["weight_map"][name] = torch.ones(2), path.name
    save_file(tensors, path, metadata={"format": "pt"})
    index.write_text(json.dumps(listed))
    with pytest.raises(RunError, match=f"{name} is in only one of lock and output"):
        verify(emitted.tensors, emitted.directory)


@pytest.mark.parametrize("change", [lambda t: t.float(), lambda t: t.flatten()], ids=["dtype", "shape"])
def test_another_dtype_or_shape(emitted: Emitted, change: Callable[[Tensor], Tensor]) -> None:
    name = PRUNED[emitted.family]
    path = emitted.shard_of(name)
    tensors = load_file(path)
    tensors[name] = change(tensors[name])
    save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(RunError, match=f"{name} differs from what was compressed"):
        verify(emitted.tensors, emitted.directory)


def test_a_weight_that_memory_holds_but_the_mask_prunes(emitted: Emitted) -> None:
    """File and memory agree, and both break the mask: the mask has the last word."""
    name = PRUNED[emitted.family]
    emitted.change(name, revive)
    linear, _ = emitted.tensors.linears[name]
    found = load_file(emitted.shard_of(name))[name]
    original = pruned_states(emitted.lock)

    def states(block: int) -> dict[str, Any]:
        weight = found.T if linear.transposed else found
        return original(block) | ({f"{linear.name}:weight": weight} if block == linear.block else {})

    with pytest.raises(RunError, match="is not zero where its mask prunes"):
        verify(FinalTensors(emitted.lock, states), emitted.directory)


def test_an_unreadable_shard_is_a_clear_error(tmp_path: Path) -> None:
    (tmp_path / "a.safetensors").write_bytes(b"\xff" * 64)
    with pytest.raises(RunError, match="x cannot be read back"):
        read_independently(tmp_path / "a.safetensors", "x")
    with pytest.raises(RunError, match="x cannot be read back"):
        read_independently(tmp_path / "b.safetensors", "x")


def test_bits_not_values_are_compared() -> None:
    nan = torch.tensor([float("nan"), 1.0])
    assert same_bits(nan, nan.clone())
    assert not same_bits(torch.zeros(2), -torch.zeros(2))
    assert not same_bits(torch.zeros(2), torch.zeros(2, dtype=torch.float16))
    assert not same_bits(torch.zeros(2), torch.zeros(1, 2))
    assert same_bits(torch.arange(6.0).view(2, 3).T, torch.arange(6.0).view(2, 3).T.contiguous())


def test_a_run_whose_output_was_damaged_publishes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny_directory(tmp_path / "model", "llama")
    plan = compress.Plan(
        model=compress.Model(path=str(tmp_path / "model")),
        run=compress.Run(output=str(tmp_path / "out")),
        passes=[Magnitude(sparsity=0.5)],
    )

    def damaged(*arguments: Any) -> None:
        export(*arguments)
        directory: Path = arguments[-1]
        path = directory / "model.safetensors"
        data = bytearray(path.read_bytes())
        data[-5] ^= 4
        path.write_bytes(data)

    with monkeypatch.context() as patch:
        patch.setattr(execution, "export", damaged)
        with pytest.raises(RunError, match="verification failed"):
            compress.run(plan)
    assert not (tmp_path / "out").exists()
    assert compress.run(plan).resumed == 1
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model", "out", "text.txt"]
