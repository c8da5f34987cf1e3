"""Blocks streamed one at a time compute what transformers computes with the whole model."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from compress.architecture import architecture_for
from compress.checkpoint import Checkpoint, read_header
from compress.errors import ModelError, RunError
from compress.hub import load_config
from compress.stream import Skeleton
from tests.models import FAMILIES, GROUPED, VOCABULARY, WINDOW, save_tiny

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor

CPU = torch.device("cpu")
SHAPES = [(3, 2 * WINDOW + 5), (3, 2 * WINDOW + 5), (2, 2 * WINDOW + 5), (1, 2 * WINDOW + 5), (4, 3), (1, 1)]
VARIANTS: list[tuple[str, dict[str, Any]]] = [
    *((family, {}) for family in FAMILIES),
    ("llama", {"attention_bias": True, "mlp_bias": True}),
    ("opt", {"word_embed_proj_dim": 16, "do_layer_norm_before": False}),  # opt-350m
    ("gpt_neox", {"use_parallel_residual": False}),
    ("gpt2", {"n_inner": 48}),
]
CASES = [
    pytest.param(family, {**more, "tied": tied, "gqa": gqa}, id="-".join([family, *more, tie, *["gqa"] * gqa]))
    for family, more in VARIANTS
    for tied, tie in ((True, "tied"), (False, "untied"))
    for gqa in ((True, False) if family in GROUPED else (False,))
]
PLAIN: dict[str, Any] = {"tied": True, "gqa": False}


def skeleton_of(directory: Path) -> Skeleton:
    config = load_config(directory, trust_remote_code=False)
    return Skeleton(Checkpoint(directory), config, architecture_for(config.model_type)).to(CPU, torch.float32)


def some_ids(shapes: list[tuple[int, int]]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(5)
    return [torch.randint(3, VOCABULARY, shape, generator=generator) for shape in shapes]


@torch.no_grad()
def streamed(directory: Path, batches: list[Tensor]) -> list[Tensor]:
    """Logits of each batch, by one block at a time; checks that no block changes its input."""
    skeleton = skeleton_of(directory)
    with skeleton.loaded(skeleton.embedding):
        flow = [skeleton.embed(ids) for ids in batches]
    for index in range(len(skeleton.blocks)):
        with skeleton.block(index) as block:
            after = []
            for ids, hidden in zip(batches, flow, strict=True):
                args, kwargs = skeleton.calls(*ids.shape)[index]
                before = hidden.clone()
                after.append(block(hidden, *args, **kwargs))
                # Activations are written by another thread while the block runs.
                assert torch.equal(hidden, before)
                assert after[-1].untyped_storage().data_ptr() != hidden.untyped_storage().data_ptr()
            flow = after
    with skeleton.loaded(skeleton.head):
        return [skeleton.logits(hidden) for hidden in flow]


@torch.no_grad()
def whole(directory: Path, batches: list[Tensor]) -> list[Tensor]:
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    return [model(ids, use_cache=False).logits for ids in batches]


def assert_streams(directory: Path, shapes: list[tuple[int, int]] = SHAPES) -> None:
    batches = some_ids(shapes)
    for found, wanted in zip(streamed(directory, batches), whole(directory, batches), strict=True):
        scale = float(wanted.abs().max())
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5 * scale)


@pytest.mark.parametrize(("family", "settings"), CASES)
def test_blocks_one_by_one_give_the_logits_of_the_whole_model(
    tmp_path: Path, family: str, settings: dict[str, Any]
) -> None:
    assert_streams(save_tiny(tmp_path, family, **settings))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["fp16", "bf16"])
def test_half_precision_shards_stream_in_float32(tmp_path: Path, family: str, dtype: torch.dtype) -> None:
    save_tiny(tmp_path, family, max_shard_size="12KB", dtype=dtype, tied=False, gqa=False)
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 2
    assert_streams(tmp_path, [(3, 20), (1, 20)])


def rewrite(directory: Path, change: Any) -> dict[str, Tensor]:
    """Apply `change` to the tensors of a single-file checkpoint."""
    tensors = change(load_file(directory / "model.safetensors"))
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    return tensors


@pytest.mark.parametrize("family", ["gpt2", "llama", "opt", "gpt_neox"])
def test_names_of_the_bare_base_model(tmp_path: Path, family: str) -> None:
    save_tiny(tmp_path, family, **PLAIN)
    prefix = architecture_for(family).base_prefix
    tensors = rewrite(tmp_path, lambda found: {name.removeprefix(prefix): value for name, value in found.items()})
    assert not any(name.startswith(prefix) for name in tensors)
    assert_streams(tmp_path, [(2, 20)])


def test_unknown_tensors_are_extra(tmp_path: Path) -> None:
    """The hub's gpt2 stores causal masks that today's class does not know."""
    save_tiny(tmp_path, "gpt2", **PLAIN)
    mask = {"transformer.h.0.attn.bias": torch.ones(1, 1, 8, 8).tril(), "odd": torch.arange(3)}
    rewrite(tmp_path, lambda found: found | mask)
    assert sorted(skeleton_of(tmp_path).extra) == sorted(mask)
    assert_streams(tmp_path, [(2, 20)])


@pytest.mark.parametrize("value", [1.0, 0.5], ids=["equal", "different"])
def test_a_tied_head_that_is_stored_too(tmp_path: Path, value: float) -> None:
    """transformers takes the file's head when it differs from the embedding, whatever config.json says of ties."""
    save_tiny(tmp_path, "llama", **PLAIN)
    rewrite(tmp_path, lambda found: found | {"lm_head.weight": found["model.embed_tokens.weight"] * value})
    assert_streams(tmp_path, [(2, 20)])


def test_a_tied_model_that_stores_only_its_head(tmp_path: Path) -> None:
    save_tiny(tmp_path, "llama", **PLAIN)
    rewrite(tmp_path, lambda found: {name.replace("model.embed_tokens", "lm_head"): t for name, t in found.items()})
    assert_streams(tmp_path, [(2, 20)])


def test_weights_are_in_memory_only_for_their_while(tmp_path: Path) -> None:
    skeleton = skeleton_of(save_tiny(tmp_path, "llama", **PLAIN))

    def loaded() -> set[str]:
        return {name for name in skeleton.stored if not skeleton._module(name.rpartition(".")[0]).weight.is_meta}

    assert loaded() == {"model.norm.weight"}
    with skeleton.block(1):
        assert loaded() == {"model.norm.weight", *skeleton.block_parameters(1)}
    with pytest.raises(ZeroDivisionError), skeleton.block(2), skeleton.loaded(skeleton.embedding):
        raise ZeroDivisionError
    assert loaded() == {"model.norm.weight"}


@pytest.mark.parametrize("name", ["model.layers.1.mlp.up_proj.weight", "model.embed_tokens.weight", "odd"])
def test_the_digest_tells_one_bit(tmp_path: Path, name: str) -> None:
    save_tiny(tmp_path, "llama", **PLAIN)
    rewrite(tmp_path, lambda found: found | {"odd": torch.ones(9, 9)})
    before = skeleton_of(tmp_path).digest()
    assert skeleton_of(tmp_path).digest() == before

    def change(found: dict[str, Tensor]) -> dict[str, Tensor]:
        found[name].view(torch.int32)[3, 3] ^= 1
        return found

    rewrite(tmp_path, change)
    assert skeleton_of(tmp_path).digest() != before


def without(name: str) -> Any:
    return lambda found: {key: value for key, value in found.items() if key != name}


NORM = "model.layers.0.input_layernorm.weight"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (without(NORM), f"{NORM} among them"),
        (lambda found: found | {NORM: torch.ones(31)}, r"\[31\]"),
        (lambda found: found | {NORM: torch.ones(32, dtype=torch.int8)}, "already quantized"),
    ],
    ids=["missing", "shape", "integers"],
)
def test_checkpoints_that_are_not_the_model_are_refused(tmp_path: Path, change: Any, message: str) -> None:
    save_tiny(tmp_path, "llama", **PLAIN)
    rewrite(tmp_path, change)
    with pytest.raises(ModelError, match=message):
        skeleton_of(tmp_path)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_weight_that_is_not_finite_is_named(tmp_path: Path, value: float) -> None:
    save_tiny(tmp_path, "llama", **PLAIN)
    rewrite(tmp_path, lambda found: found | {NORM: torch.full((32,), value)})
    with pytest.raises(RunError, match=NORM), skeleton_of(tmp_path).block(0):
        pass


@pytest.mark.skipif(not hasattr(os, "posix_fadvise"), reason="Linux reads ahead on request, others do not")
def test_the_bytes_of_a_block_are_what_the_system_is_to_read_ahead(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And nothing more; behind the last block there is nothing to read."""
    save_tiny(tmp_path, "llama", **PLAIN)
    wanted = set()
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        for name in file.keys():  # noqa: SIM118 (it is no dict)
            if name.startswith("model.layers.1."):
                tensor = file.get_tensor(name)
                wanted.add(tensor.numel() * tensor.element_size())
    asked: list[tuple[int, int, int]] = []
    monkeypatch.setattr(os, "posix_fadvise", lambda _, start, size, advice: asked.append((start, size, advice)))
    skeleton = skeleton_of(tmp_path)
    skeleton.expect(len(skeleton.blocks))
    assert not asked
    skeleton.expect(1)
    assert len(asked) == len(skeleton.block_parameters(1))
    assert {size for _, size, _ in asked} == wanted
    assert {advice for *_, advice in asked} == {os.POSIX_FADV_WILLNEED}
    starts = {info.start: info.name for info in read_header(tmp_path / "model.safetensors")}
    assert {starts[start] for start, *_ in asked} == set(skeleton.block_parameters(1))
