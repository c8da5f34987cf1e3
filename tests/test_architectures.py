"""The families' data, proven on tiny random models: what may move together moves without changing the logits."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest
import torch
from safetensors import safe_open
from torch import nn
from transformers.pytorch_utils import Conv1D

from compress.architecture import FOLDER, Architecture, Width, architecture_for
from compress.errors import ModelError
from tests.models import FAMILIES, GROUPED, VOCABULARY, WINDOW, Float64, save_tiny, tiny_config, tiny_model

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from torch import Tensor
    from transformers import PreTrainedModel

torch.set_num_threads(1)

# Settings that change a block's data flow or bring parameters that the defaults lack.
VARIANTS: list[tuple[str, dict[str, Any]]] = [
    *((family, {}) for family in FAMILIES),
    ("llama", {"attention_bias": True, "mlp_bias": True}),
    ("qwen3", {"attention_bias": True}),
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
every_case = pytest.mark.parametrize(("family", "settings"), CASES)


def logits(model: PreTrainedModel) -> Tensor:
    """(2, 16, vocabulary): longer than the sliding window."""
    tokens = torch.randint(VOCABULARY, (2, 2 * WINDOW), generator=torch.Generator().manual_seed(1))
    with torch.no_grad(), Float64():
        return model(tokens, use_cache=False).logits


def blocks_of(model: PreTrainedModel, architecture: Architecture) -> nn.ModuleList:
    blocks = model.get_submodule(architecture.blocks)
    assert isinstance(blocks, nn.ModuleList)
    return blocks


def matrix(block: nn.Module, architecture: Architecture, linear: str) -> Tensor:
    """The weight as (out, in), sharing storage with the parameter."""
    weight = block.get_submodule(linear).weight.detach()
    return weight.T if linear in architecture.transposed else weight


def derangement(count: int, seed: int) -> Tensor:
    """A permutation that leaves nothing in its place."""
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
    moved = torch.empty_like(order)
    moved[order] = order.roll(1)
    return moved


def move_units(
    model: PreTrainedModel, architecture: Architecture, width: Width, *, rows: bool = True, columns: bool = True
) -> None:
    """Permute the units of `width`, in every block differently."""
    units = width.count(model.config)
    for number, block in enumerate(blocks_of(model, architecture)):
        order = derangement(units, seed=number)
        for linear in width.rows if rows else ():
            weight, bias = matrix(block, architecture, linear), block.get_submodule(linear).bias
            index = width.unit_rows(linear, units, weight.shape[0], model.config)
            weight[index.flatten()] = weight[index[order].flatten()]
            if bias is not None:
                bias.detach()[index.flatten()] = bias.detach()[index[order].flatten()]
        for linear in width.columns if columns else ():
            weight = matrix(block, architecture, linear)
            index = width.unit_columns(units, weight.shape[1])
            weight[:, index.flatten()] = weight[:, index[order].flatten()]


def move_hidden(model: PreTrainedModel, architecture: Architecture, *, skip: str = "") -> None:
    """Permute the residual stream, leaving out the parameters whose name contains `skip`."""
    order = derangement(model.config.hidden_size, seed=0)
    for name, parameter in model.named_parameters():  # a tied tensor comes once
        if not (skip and skip in name):
            for dim in architecture.hidden_dims(name, parameter.shape, model.config):
                parameter.detach().copy_(parameter.detach().index_select(dim, order))


@every_case
def test_structure(family: str, settings: dict[str, Any]) -> None:
    model, architecture = tiny_model(family, **settings), architecture_for(family)
    blocks = blocks_of(model, architecture)
    assert len(blocks) == model.config.num_hidden_layers
    for block in blocks:
        kinds = {name: type(module) for name, module in block.named_modules() if hasattr(module, "weight")}
        linears = {name for name, kind in kinds.items() if kind in (nn.Linear, Conv1D)}
        assert sorted(architecture.linears) == sorted(linears)
        assert set(architecture.transposed) == {name for name in linears if kinds[name] is Conv1D}
    assert model.config.model_type in architecture.model_types
    assert architecture.base_prefix == f"{model.base_model_prefix}."
    assert architecture.blocks.startswith(architecture.base_prefix)
    assert model.get_submodule(architecture.head) is model.get_output_embeddings()


@every_case
def test_tied_names(family: str, settings: dict[str, Any]) -> None:
    model, architecture = tiny_model(family, **settings), architecture_for(family)
    assert architecture.tied is not None
    head, embedding = (model.get_parameter(name) for name in architecture.tied)
    assert architecture.tied[0] == f"{architecture.head}.weight"
    assert embedding is model.get_input_embeddings().weight
    assert (head.data_ptr() == embedding.data_ptr()) == settings["tied"]
    assert dict([architecture.tied]) == model._tied_weights_keys


@every_case
def test_subsets_share_their_input_and_run_in_order(family: str, settings: dict[str, Any]) -> None:
    model, architecture = tiny_model(family, **settings), architecture_for(family)
    seen: list[tuple[str, Tensor]] = []
    for number, block in enumerate(blocks_of(model, architecture)):
        for linear in architecture.linears:

            def note(_: nn.Module, inputs: tuple[Tensor], name: str = f"{number} {linear}") -> None:
                seen.append((name, inputs[0]))

            block.get_submodule(linear).register_forward_pre_hook(note)
    with torch.no_grad():
        model(torch.arange(16).view(1, 16), use_cache=False)

    expected = [
        {f"{number} {linear}" for linear in subset}
        for number in range(model.config.num_hidden_layers)
        for subset in architecture.subsets
    ]
    inputs = []
    position = 0
    for subset in expected:
        part = seen[position : position + len(subset)]
        position += len(subset)
        assert {name for name, _ in part} == subset
        inputs.append(part[0][1])
        assert all(given is inputs[-1] for _, given in part)
    assert position == len(seen)
    assert len({given.data_ptr() for given in inputs}) == len(inputs)  # no two subsets could be one


@every_case
def test_unit_maps_are_partitions(family: str, settings: dict[str, Any]) -> None:
    model, architecture = tiny_model(family, **settings), architecture_for(family)
    assert [width.name for width in architecture.widths] == ["heads", "channels"]
    block = blocks_of(model, architecture)[0]
    for width in architecture.widths:
        units = width.count(model.config)
        for linear in width.rows:
            rows = width.unit_rows(linear, units, matrix(block, architecture, linear).shape[0], model.config)
            assert rows.shape[0] == units
            assert rows.flatten().sort().values.equal(torch.arange(rows.numel()))
            assert rows.numel() == matrix(block, architecture, linear).shape[0]
        for linear in width.columns:
            columns = width.unit_columns(units, matrix(block, architecture, linear).shape[1])
            assert columns.shape[0] == units
            assert columns.flatten().equal(torch.arange(matrix(block, architecture, linear).shape[1]))
    rowed = [linear for width in architecture.widths for linear in width.rows]
    # Each linear leads from the stream to a width or back: nothing of a block is forgotten.
    assert sorted(rowed) == sorted(architecture.hidden.reads)
    assert sorted(c for width in architecture.widths for c in width.columns) == sorted(architecture.hidden.writes)


@every_case
def test_moving_units_leaves_the_logits(family: str, settings: dict[str, Any]) -> None:
    model, architecture = tiny_model(family, dtype=torch.float64, **settings), architecture_for(family)
    before = logits(model)
    for width in architecture.widths:
        move_units(model, architecture, width)
        torch.testing.assert_close(logits(model), before, rtol=0, atol=1e-9)


@pytest.mark.parametrize("half", [{"columns": False}, {"rows": False}], ids=["rows", "columns"])
@pytest.mark.parametrize("number", [0, 1], ids=["heads", "channels"])
@pytest.mark.parametrize("family", FAMILIES)
def test_moving_half_of_a_width_changes_the_logits(family: str, number: int, half: dict[str, bool]) -> None:
    model, architecture = tiny_model(family, tied=False, gqa=True, dtype=torch.float64), architecture_for(family)
    before = logits(model)
    move_units(model, architecture, architecture.widths[number], **half)
    assert (logits(model) - before).abs().max() > 1e-3


def test_splitting_a_group_of_query_heads_changes_the_logits() -> None:
    """Why a unit is a KV head with its queries: four free query heads are not four units."""
    model, architecture = tiny_model("llama", tied=False, gqa=True, dtype=torch.float64), architecture_for("llama")
    before, heads = logits(model), architecture.widths[0]
    for block in blocks_of(model, architecture):
        order = torch.tensor([2, 1, 0, 3])  # one query head of each group changes places
        for weight in (block.self_attn.q_proj.weight.detach(), block.self_attn.o_proj.weight.detach().T):
            index = heads.unit_columns(4, 32)
            weight[index.flatten()] = weight[index[order].flatten()]
    assert (logits(model) - before).abs().max() > 1e-3


@every_case
def test_moving_the_residual_stream_leaves_the_logits(family: str, settings: dict[str, Any]) -> None:
    model, architecture = tiny_model(family, dtype=torch.float64, **settings), architecture_for(family)
    before = logits(model)
    move_hidden(model, architecture)
    torch.testing.assert_close(logits(model), before, rtol=0, atol=1e-9)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_stream_leaves_no_parameter_out(family: str) -> None:
    architecture = architecture_for(family)
    present = dict(tiny_model(family, tied=False, gqa=True).named_parameters())
    names = [name for name in architecture.hidden.outside if name in present]
    names += [f"0.{module}.weight" for module in (*architecture.hidden.vectors, *architecture.linears)]
    for name in names:
        model = tiny_model(family, tied=False, gqa=True, dtype=torch.float64)
        before = logits(model)
        move_hidden(model, architecture, skip=name)
        assert (logits(model) - before).abs().max() > 1e-3, name


def test_dimensions_off_the_stream() -> None:
    config = tiny_config("opt", tied=True, gqa=False, word_embed_proj_dim=16)
    dims = architecture_for("opt").hidden_dims
    assert dims("model.decoder.embed_tokens.weight", (64, 16), config) == ()
    assert dims("model.decoder.embed_tokens.weight", (64, 32), config) == (1,)
    assert dims("model.decoder.layers.1.fc1.bias", (48,), config) == ()
    assert dims("model.decoder.layers.1.fc2.bias", (32,), config) == (0,)
    assert dims("no.such.parameter", (32,), config) == ()
    # (in, out): what c_attn reads is its first dimension
    assert architecture_for("gpt2").hidden_dims("transformer.h.0.attn.c_attn.weight", (32, 96), config) == (0,)


def test_counts() -> None:
    gpt2 = architecture_for("gpt2").widths[1]
    assert gpt2.count(tiny_config("gpt2", tied=True, gqa=False)) == 128
    assert gpt2.count(tiny_config("gpt2", tied=True, gqa=False, n_inner=48)) == 48
    with pytest.raises(ModelError, match='"n_embd" is None; a positive integer is needed'):
        gpt2.count(object())


def test_fused_segments() -> None:
    config = tiny_config("phi3", tied=False, gqa=True)  # 4 query and 2 KV heads of 8
    rows = architecture_for("phi3").widths[0].unit_rows("self_attn.qkv_proj", 2, 64, config)
    second = [*range(16, 32), *range(40, 48), *range(56, 64)]
    assert rows[1].tolist() == second
    with pytest.raises(ModelError, match="63 features do not split evenly into 8 parts"):
        architecture_for("phi3").widths[0].unit_rows("self_attn.qkv_proj", 2, 63, config)


def stored_names(directory: Path) -> Iterator[str]:
    for path in sorted(directory.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            yield from file.keys()


@pytest.mark.parametrize("family", FAMILIES)
def test_stored_names_become_parameters(family: str, tmp_path: Path) -> None:
    architecture = architecture_for(family)
    save_tiny(tmp_path, family, tied=False, gqa=True, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    assert json.loads((tmp_path / "config.json").read_text())["model_type"] == family
    names = list(stored_names(tmp_path))
    parameters = {name for name, _ in tiny_model(family, tied=False, gqa=True).named_parameters()}
    assert {architecture.parameter_name(name) for name in names} == parameters
    # checkpoints of the bare base model, such as the hub's gpt2
    bare = [name.removeprefix(architecture.base_prefix) for name in names]
    assert {architecture.parameter_name(name) for name in bare} == parameters


def test_former_name_of_the_gpt_neox_head() -> None:
    assert architecture_for("gpt_neox").parameter_name("embed_out.weight") == "lm_head.weight"
    assert architecture_for("gpt_neox").parameter_name("lm_head.weight") == "lm_head.weight"


@pytest.mark.parametrize("family", FAMILIES)
def test_saved_model_loads_as_it_was(family: str, tmp_path: Path) -> None:
    """The tiny models survive their own files: what other tests rely on."""
    from transformers import AutoModelForCausalLM

    settings = {"tied": True, "gqa": True, "dtype": torch.bfloat16}
    loaded = AutoModelForCausalLM.from_pretrained(save_tiny(tmp_path, family, **settings), dtype=torch.bfloat16)
    model, tokens = tiny_model(family, **settings), torch.arange(16).view(1, 16)
    with torch.no_grad():
        assert model(tokens).logits.equal(loaded.eval()(tokens).logits)
    assert not model(tokens).logits.isnan().any()


def test_unknown_architecture() -> None:
    with pytest.raises(ModelError) as caught:
        architecture_for("qwen4")
    text = str(caught.value)
    assert 'unknown architecture "qwen4"; did you mean "qwen' in text
    assert "fix: write compress/architectures/qwen4.toml, about 40 lines of data" in text
    assert caught.value.exit_code == 2


def test_files_are_small_and_served() -> None:
    assert sorted(path.stem for path in FOLDER.glob("*.toml")) == sorted(FAMILIES)
    for path in FOLDER.glob("*.toml"):
        assert len(path.read_text().splitlines()) <= 55, path.name
        assert path.stem in architecture_for(path.stem).model_types


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"subsets": [["a"], ["a"]]}, "a linear is in two subsets"),
        ({"transposed": ["b"]}, "not in any subset: b"),
        ({"colour": "red"}, "Extra inputs are not permitted"),
    ],
)
def test_a_wrong_file_is_refused(change: dict[str, Any], problem: str) -> None:
    data = {
        "model_types": ["x"],
        "blocks": "x.h",
        "base_prefix": "x.",
        "subsets": [["a"]],
        "head": "head",
        "widths": [],
        "hidden": {"reads": ["a"], "writes": [], "vectors": [], "outside": {}},
    }
    assert Architecture.model_validate(data).linears == ("a",)
    with pytest.raises(ValueError, match=problem):
        Architecture.model_validate({**data, **change})
