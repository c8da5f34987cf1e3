"""Smaller models on disk: stock transformers loads them, and they are the original with units switched off."""

from __future__ import annotations

import json
import math
from typing import TYPE_CHECKING, Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.nn import functional
from transformers import AutoModelForCausalLM

import compress
from compress.architecture import architecture_for
from compress.calibration.plan_source import make_tokens
from compress.compiling import compile_plan
from compress.plan import load_plan
from compress.structure import Cutter, Kept, Sizes, smaller_config
from tests.conftest import some_text, tiny_directory, write_tokenizer
from tests.models import FAMILIES, GROUPED, Float64, tiny_model
from tests.test_architectures import every_case, logits, matrix, move_units

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor, nn
    from transformers import PreTrainedModel

    from compress.lock import Lock
    from compress.report import Report

PLAN = """
[model]
path = "model"
[calibration]
source = "text.txt"
samples = 6
length = 16
[run]
output = "out"
"""


def carried_out(folder: Path, passes: str, **options: Any) -> tuple[Lock, Report]:
    """Run a plan with these passes on folder/model; its lock, as it was before the run, and its report."""
    (folder / "plan.toml").write_text(PLAN + passes)
    plan = load_plan(folder / "plan.toml")
    return compile_plan(plan), compress.run(plan, **options)


def opened(directory: Path) -> PreTrainedModel:
    """With stock transformers, in float64; every tensor finds its place."""
    model, info = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float64, output_loading_info=True)
    assert not any(info.values()), info
    return model.eval()


def found_in(small: Tensor, whole: Tensor) -> tuple[Tensor, Tensor]:
    """Of each column of `small`: the column of `whole` it is a multiple of, ascending, and the multiple."""
    likeness = functional.normalize(small, dim=0).T @ functional.normalize(whole, dim=0)
    value, index = likeness.max(1)
    assert (value > 1 - 1e-9).all()
    assert (index.diff() > 0).all()
    return index, small.norm(dim=0) / whole[:, index].norm(dim=0)


def masked_norm(norm: nn.Module, small: nn.Module, kept: Tensor) -> None:
    """Let a norm see, and give, the `kept` channels only; the smaller one may give all of them one factor."""
    weight, offset = norm.weight.detach()[kept], 1.0 if "Gemma" in type(norm).__name__ else 0.0
    gains = (small.weight.detach() + offset) / (weight + offset)
    torch.testing.assert_close(gains, gains[:1].expand_as(gains), rtol=2e-6, atol=0)
    eps = getattr(norm, "variance_epsilon", None) or norm.eps

    def forward(x: Tensor) -> Tensor:
        x, out = x[..., kept], torch.zeros_like(x)
        if hasattr(norm, "bias"):
            out[..., kept] = functional.layer_norm(x, (len(kept),), weight, norm.bias[kept], eps)
        else:
            out[..., kept] = x * (x.square().mean(-1, keepdim=True) + eps).rsqrt() * (weight + offset) * gains
        return out

    norm.forward = forward


def masked(model: PreTrainedModel, small: PreTrainedModel) -> PreTrainedModel:
    """The original model with all that the smaller one lacks switched off, by hooks.

    What is left is read off the weights: the columns of what reads the units, and of the embedding (or positions).
    """
    architecture = architecture_for(model.config.model_type)
    stream = "model.decoder.embed_positions.weight" if model.config.model_type == "opt" else None
    embeddings = [one.get_parameter(stream) if stream else one.get_input_embeddings().weight for one in (small, model)]
    kept, scale = found_in(*(weight.detach() for weight in embeddings))
    assert (scale / scale[0] - 1).abs().max() < 1e-6
    gone = torch.ones(model.config.hidden_size, dtype=torch.bool)
    gone[kept] = False
    tied = model.get_output_embeddings().weight is model.get_input_embeddings().weight
    for name, module in model.named_modules():
        if "Norm" in type(module).__name__ and module.weight.shape == gone.shape:
            masked_norm(module, small.get_submodule(name), kept)
    if tied and scale[0] > 1 + 1e-6:  # the head reads the embedding, which is larger by this: the norm undoes it
        final = model.get_submodule("model.norm")
        given = final.forward
        final.forward = lambda x: given(x) * scale[0]
    blocks = zip(model.get_submodule(architecture.blocks), small.get_submodule(architecture.blocks), strict=True)
    for block, smaller in blocks:
        block.register_forward_pre_hook(lambda _, args: (args[0].masked_fill(gone, 0.0), *args[1:]))
        for width in architecture.widths:
            (reader,) = width.columns
            columns, scales = found_in(
                *(matrix(b, architecture, reader)[r] for b, r in ((smaller, ...), (block, kept)))
            )
            torch.testing.assert_close(scales, torch.ones_like(scales))
            out = torch.ones(matrix(block, architecture, reader).shape[1], dtype=torch.bool)
            out[columns] = False
            assert len(out) > len(columns) or (width.name == "heads" and reader == "self_attn.o_proj")
            block.get_submodule(reader).register_forward_pre_hook(
                lambda _, args, out=out: (args[0].masked_fill(out, 0.0),)
            )
    return model


def weight_bytes(directory: Path) -> int:
    names = ("*.safetensors", "*.safetensors.index.json")
    return sum(path.stat().st_size for name in names for path in directory.glob(name))


@every_case
def test_the_smaller_model_is_the_masked_one(family: str, settings: dict[str, Any], tmp_path: Path) -> None:
    tiny_directory(tmp_path / "model", family, blocks=2, **settings)
    heads = "heads = 0.5" if family in GROUPED else ""  # elsewhere hidden takes them along
    lock, report = carried_out(
        tmp_path, f'[[pass]]\nuse = "width"\nscore = "wanda"\nchannels = 0.5\nhidden = 0.25\nmultiple = 8\n{heads}'
    )
    small, model = opened(tmp_path / "out"), opened(tmp_path / "model")
    torch.testing.assert_close(logits(small), logits(masked(model, small)), rtol=1e-5, atol=1e-5)

    left = lock.left
    assert left is not None
    channels = {"gpt2": settings.get("n_inner", 128)}.get(family, 48) // 2
    groups = (2 if settings["gqa"] else 4) // 2 if family in GROUPED else 3
    assert left == Sizes(heads=groups, channels=channels, hidden=24, blocks=2)
    assert left == Sizes.of(lock.architecture, small.config)
    assert report.output.parameters == sum(p.numel() for p in small.parameters())
    assert report.output.parameters == sum(math.prod(slot.shape) for shard in lock.shards for slot in shard.slots)
    assert report.model.parameters == sum(p.numel() for p in model.parameters())
    assert weight_bytes(tmp_path / "out") == lock.output_bytes
    before, after = (json.loads((tmp_path / name / "config.json").read_text()) for name in ("model", "out"))
    changed = {key for key in {*before, *after} if before.get(key) != after.get(key)} - {"head_dim"}
    expected = {
        "gpt2": {"n_embd", "n_head", "n_inner"},
        "opt": {"hidden_size", "ffn_dim", "num_attention_heads"}
        | ({"word_embed_proj_dim"} if "word_embed_proj_dim" not in settings else set()),
    }
    usual = {"hidden_size", "intermediate_size", "num_attention_heads"}
    assert changed == expected.get(family, usual | ({"num_key_value_heads"} if family in GROUPED else set()))


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma2", "gemma3_text"])
@pytest.mark.parametrize("tied", [True, False])
def test_norms_give_what_they_gave(family: str, tied: bool, tmp_path: Path) -> None:
    """A norm divides by the root mean square of what is left: its weight takes the ratio, measured on the text."""
    tiny_directory(tmp_path / "model", family, blocks=2, tied=tied)
    lock, _ = carried_out(tmp_path, '[[pass]]\nuse = "width"\nscore = "wanda"\nhidden = 0.5\nmultiple = 8\n')
    small, model = opened(tmp_path / "out"), opened(tmp_path / "model")
    kept, scale = found_in(*(one.get_input_embeddings().weight.detach() for one in (small, model)))
    given: dict[str, Tensor] = {}
    before_mlp = "pre_feedforward_layernorm" if "gemma" in family else "post_attention_layernorm"
    names = [f"model.layers.{block}.{norm}" for block in (0, 1) for norm in ("input_layernorm", before_mlp)]
    for name in names:
        model.get_submodule(name).register_forward_pre_hook(lambda _, args, n=name: given.update({n: args[0]}))
    tokens = make_tokens(lock, torch.device("cpu"))
    with torch.no_grad(), Float64():
        model(tokens.ids, attention_mask=tokens.mask)
    offset = 1.0 if "gemma" in family else 0.0

    def gain_of(name: str) -> float:
        weights = small.get_submodule(name).weight.detach() + offset, model.get_submodule(name).weight.detach() + offset
        return float((weights[0] / weights[1][kept]).mean())

    for name in names:
        x = given[name][tokens.mask.bool()]
        energy = (x.square() / (x.square().mean(-1, keepdim=True) + 1e-6)).sum(0)
        wanted = float(energy[kept].mean() / energy.mean()) ** 0.5
        assert gain_of(name) == pytest.approx(wanted, rel=1e-5)
        assert abs(wanted - 1) > 1e-3
    embedding_scale = 2**0.5 if "gemma" in family else 1.0  # these multiply what they read by the root of the width
    torch.testing.assert_close(scale, torch.full_like(scale, embedding_scale), rtol=1e-6, atol=0)
    final = gain_of("model.norm") * (embedding_scale if tied else 1.0)
    assert final == pytest.approx(gain_of(names[-1]), rel=1e-5)


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_a_head_stored_beside_the_embedding_stays_equal_to_it(family: str, tmp_path: Path) -> None:
    """Some files hold a tied tensor twice: readers that tie, and those that do not, get the same model."""
    tiny_directory(tmp_path / "model", family, blocks=2)
    passes = '[[pass]]\nuse = "width"\nhidden = 0.25\nmultiple = 8\n'
    carried_out(tmp_path, passes)
    (tmp_path / "out").rename(tmp_path / "once")
    path = tmp_path / "model" / "model.safetensors"
    tensors = load_file(path)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, path, metadata={"format": "pt"})
    carried_out(tmp_path, passes)
    once, twice = (load_file(tmp_path / name / "model.safetensors") for name in ("once", "out"))
    assert torch.equal(twice.pop("lm_head.weight"), twice["model.embed_tokens.weight"])
    assert once.keys() == twice.keys()
    assert all(torch.equal(once[name], twice[name]) for name in once)


@pytest.mark.parametrize(
    ("family", "reader"), [("llama", "mlp.down_proj"), ("phi3", "mlp.down_proj"), ("gpt2", "mlp.c_proj")]
)
def test_refitted_weights_stand_where_their_units_were(family: str, reader: str, tmp_path: Path) -> None:
    """With obs the reader has new weights; put into the original's columns, zeros elsewhere, they give the same."""
    tiny_directory(tmp_path / "model", family, blocks=2, tied=False)
    carried_out(tmp_path, '[[pass]]\nuse = "width"\nchannels = 0.25\nmultiple = 4\n')
    small, model, architecture = opened(tmp_path / "out"), opened(tmp_path / "model"), architecture_for(family)
    writer = {"llama": "mlp.up_proj", "phi3": "mlp.gate_up_proj", "gpt2": "mlp.c_fc"}[family]
    blocks = zip(model.get_submodule(architecture.blocks), small.get_submodule(architecture.blocks), strict=True)
    for block, smaller in blocks:
        new, old = matrix(smaller, architecture, reader), matrix(block, architecture, reader)
        rows = [matrix(b, architecture, writer)[: w.shape[1]] for b, w in ((smaller, new), (block, old))]
        columns, _ = found_in(*(part.T for part in rows))
        assert len(columns) == new.shape[1] == old.shape[1] * 3 // 4
        assert not torch.allclose(new, old[:, columns], rtol=0, atol=1e-3)
        old.zero_()
        old[:, columns] = new
    torch.testing.assert_close(logits(small), logits(model), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("family", "gqa"), [("llama", True), ("phi3", True), ("gpt2", False), ("opt", False)])
@pytest.mark.parametrize("score", ["obs", "wanda", "magnitude"])
def test_units_that_change_places_are_chosen_where_they_stand(
    family: str, gqa: bool, score: str, tmp_path: Path
) -> None:
    pruning = "heads = 0.5" if family in GROUPED else "hidden = 0.25"
    passes = f'[[pass]]\nuse = "width"\nscore = "{score}"\nchannels = 0.5\nmultiple = 8\n{pruning}\n'
    found = []
    for name in ("as it was", "moved"):
        model, folder = tiny_model(family, tied=False, gqa=gqa, blocks=2), tmp_path / name
        if name == "moved":
            for width in architecture_for(family).widths:
                move_units(model, architecture_for(family), width)
        model.save_pretrained(folder / "model")
        write_tokenizer(folder / "model")
        (folder / "text.txt").write_text(some_text(3000))
        carried_out(folder, passes)
        found.append(opened(folder / "out"))
    torch.testing.assert_close(logits(found[0]), logits(found[1]), rtol=1e-4, atol=1e-4)  # H in another order
    architecture, orders = architecture_for(family), []
    for blocks in zip(*(one.get_submodule(architecture.blocks) for one in found), strict=True):
        for linear in architecture.hidden.reads:
            first, second = (matrix(block, architecture, linear) for block in blocks)
            assert {tuple(row) for row in first.tolist()} == {tuple(row) for row in second.tolist()}
            orders.append(torch.equal(first, second))
    assert not all(orders)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("family", FAMILIES)
def test_keeping_everything_is_the_identity(family: str, tied: bool, tmp_path: Path) -> None:
    tiny_directory(tmp_path / "model", family, blocks=2, tied=tied)
    (tmp_path / "plan.toml").write_text(PLAN + '[[pass]]\nuse = "magnitude"\nsparsity = 0.5\n')
    lock = compile_plan(load_plan(tmp_path / "plan.toml"))
    sizes = lock.sizes
    units = {"heads": torch.arange(sizes.heads), "channels": torch.arange(sizes.channels)}
    cut = Cutter(lock.skeleton, Kept([0, 1], {0: units, 1: units}, torch.arange(sizes.hidden)))
    for name, stored in lock.skeleton.stored.items():
        tensor = lock.checkpoint.read(stored)
        assert torch.equal(cut(name, tensor), tensor), name
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    same = smaller_config(lock.skeleton, sizes, [0, 1])
    assert {key: value for key, value in same.items() if config.get(key) != value} in ({}, {"n_inner": 128})
