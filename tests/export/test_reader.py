"""Quantized directories read as the plain models they stand for, and what damaged or hostile ones come to."""

from __future__ import annotations

import json
import os
import shutil
from typing import TYPE_CHECKING, Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import compress
from compress.cli import main
from compress.errors import ModelError
from compress.evals.perplexity import evaluate
from compress.export.reader import DecodedCheckpoint, open_model
from compress.passes import RTN
from compress.plan import Evaluate
from tests.conftest import same_bits, tiny_directory

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from torch import Tensor

LINEAR = "model.layers.0.mlp.down_proj"
FORMATS = ("gptq", "compressed-tensors")


def quantized(model: Path, output: Path, form: str, **settings: Any) -> Path:
    plan = compress.Plan(
        model=compress.Model(path=str(model)),
        run=compress.Run(output=str(output), device="cpu", threads=1),
        passes=[RTN(**({"bits": 4, "group_size": 16, "clip": "minmax"} | settings))],
        exports=[compress.Export(format=form)],
    )
    compress.run(plan)
    return output


@pytest.fixture(scope="module")
def outputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A plan's output in every format, symmetric and not."""
    folder = tmp_path_factory.mktemp("outputs")
    model = tiny_directory(folder / "model", "llama", blocks=1, dtype=torch.float16)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda _: None)
        for form in ("huggingface", *FORMATS):
            quantized(model, folder / f"{form}-True", form)
            quantized(model, folder / f"{form}-False", form, symmetric=False)
    return folder


@pytest.fixture(params=FORMATS)
def form(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def copy(outputs: Path, form: str, tmp_path: Path) -> Path:
    """A symmetric output, to be damaged."""
    shutil.copytree(outputs / f"{form}-True", tmp_path / "model")
    shutil.copy(outputs / "text.txt", tmp_path)
    return tmp_path / "model"


def configure(directory: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Rewrite the quantization_config."""
    path = directory / "config.json"
    config = json.loads(path.read_text())
    change(config["quantization_config"])
    path.write_text(json.dumps(config))


def change_tensors(directory: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    path = directory / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path, metadata={"format": "pt"})
    names = directory / "model.safetensors.index.json"
    names.write_text(json.dumps({"metadata": {}, "weight_map": dict.fromkeys(tensors, path.name)}))


def refused(directory: Path, says: str | None = None) -> ModelError:
    """Opening or reading it ends in a ModelError that names the directory; so does the command, without a traceback."""
    with pytest.raises(ModelError, match=says) as failure:
        evaluate(directory, Evaluate(perplexity=str(directory.parent / "text.txt"), window=16, windows=1))
    assert failure.value.where is not None
    assert str(directory) in failure.value.where
    assert failure.value.fix
    return failure.value


# ---------------------------------------------------------------- what is well


@pytest.mark.parametrize("symmetric", [True, False])
def test_codes_appear_as_the_plain_weights_they_stand_for(outputs: Path, form: str, symmetric: bool) -> None:
    config, checkpoint = open_model(outputs / f"{form}-{symmetric}")
    plain_config, plain = open_model(outputs / f"huggingface-{symmetric}")
    assert isinstance(checkpoint, DecodedCheckpoint)
    assert not isinstance(plain, DecodedCheckpoint)
    assert not hasattr(config, "quantization_config")
    for one in (config, plain_config):
        one._name_or_path = ""
    assert config.to_dict() == plain_config.to_dict()
    assert checkpoint.tensors.keys() == plain.tensors.keys()
    for name, info in plain.tensors.items():
        found = checkpoint.tensors[name]
        assert (found.dtype, found.shape, found.bytes) == (info.dtype, info.shape, info.bytes)
        assert same_bits(checkpoint.read(name), plain.read(name)), name


def test_it_is_scored_like_the_plain_model_by_the_command_too(
    copy: Path, outputs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shown = []
    for directory in (copy, outputs / "huggingface-True"):
        text = outputs / "text.txt"
        assert main(["eval", str(directory), "--text", str(text), "--window", "16", "--windows", "4"]) == 0
        shown.append(capsys.readouterr().out)
    assert shown[0] == shown[1]
    assert "perplexity" in shown[0]


@pytest.mark.parametrize("dtype", ["float32", "float16", None])
def test_scales_of_a_smaller_dtype_do_not_round_the_weights(
    form: str, dtype: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Weights are of the checkpoint's dtype, whether its configuration says so or not."""
    monkeypatch.setattr(os, "fsync", lambda _: None)
    found = both_ways(tmp_path, form, torch.float32, dtype, scale_dtype="float16")
    assert found[0].dtype == torch.float32
    assert same_bits(found[0], found[1])


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16", None])
@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_weights_are_of_the_dtype_that_they_had(
    form: str, stored: torch.dtype, dtype: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The plain output is the oracle; config.json may name another dtype than that of the tensors."""
    monkeypatch.setattr(os, "fsync", lambda _: None)
    found = both_ways(tmp_path, form, stored, dtype)
    assert found[0].dtype == stored
    assert same_bits(found[0], found[1])


def both_ways(folder: Path, form: str, stored: torch.dtype, dtype: str | None, **settings: Any) -> list[Tensor]:
    """A weight in plain and in this format, of a model of a dtype whose config.json says this one."""
    model = tiny_directory(folder / "model", "llama", blocks=1, dtype=stored)
    config = json.loads((model / "config.json").read_text())
    config["dtype"] = dtype
    (model / "config.json").write_text(json.dumps(config))
    outputs = [quantized(model, folder / name, name, **settings) for name in ("huggingface", form)]
    return [open_model(output)[1].read(f"{LINEAR}.weight") for output in outputs]


# ---------------------------------------------------------------- configurations that do not belong to the tensors


def inner(config: dict[str, Any]) -> dict[str, Any]:
    """Where a format keeps the settings of a grid."""
    return config["config_groups"]["group_0"]["weights"] if "config_groups" in config else config


SPELLED = {"bits": {"gptq": "bits", "compressed-tensors": "num_bits"}}


@pytest.mark.parametrize(
    "bits", [2, 3, 8, 0, -4, 5, 64, 10**30, "four", None, [], {}, float("inf"), float("nan"), 1e300]
)
def test_other_bits(copy: Path, form: str, bits: object) -> None:
    configure(copy, lambda config: inner(config).update({SPELLED["bits"][form]: bits}))
    refused(copy)


@pytest.mark.parametrize("size", [32, 8, 0, -2, 7, 10**30, "all", [], float("inf"), float("nan")])
def test_another_group_size(copy: Path, size: object) -> None:
    configure(copy, lambda config: inner(config).update(group_size=size))
    refused(copy)


@pytest.mark.parametrize("method", ["awq", "", None, 3, ["gptq"], {}])
def test_another_method(copy: Path, method: object) -> None:
    configure(copy, lambda config: config.update(quant_method=method))
    assert "config.json" in str(refused(copy).where)


@pytest.mark.parametrize("whole", ["gptq", 3, ["gptq"], True, [{}]])
def test_a_quantization_config_that_is_no_table(copy: Path, whole: object) -> None:
    path = copy / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"quantization_config": whole}))
    refused(copy)


def test_no_quantization_config(copy: Path) -> None:
    path = copy / "config.json"
    config = json.loads(path.read_text())
    del config["quantization_config"]
    path.write_text(json.dumps(config))
    refused(copy, "are not in the checkpoint")


def test_the_other_format(copy: Path, form: str) -> None:
    other = "gptq" if form == "compressed-tensors" else "compressed-tensors"
    configure(copy, lambda config: config.update(quant_method=other))
    refused(copy)


@pytest.mark.parametrize("symmetric", [True, False])
def test_symmetric_said_of_asymmetric_and_the_reverse(
    outputs: Path, form: str, symmetric: bool, tmp_path: Path
) -> None:
    """Zero-points would be made up, or missed."""
    shutil.copytree(outputs / f"{form}-{symmetric}", tmp_path / "model")
    shutil.copy(outputs / "text.txt", tmp_path)
    key = "sym" if form == "gptq" else "symmetric"
    configure(tmp_path / "model", lambda config: inner(config).update({key: not symmetric}))
    refused(tmp_path / "model", "do not belong together")


@pytest.mark.parametrize(
    "change",
    [
        lambda config: config.update(checkpoint_format="marlin"),
        lambda config: config.update(dynamic={"(": {"bits": 8}}),
        lambda config: config.update(dynamic={"+:[": {}}),
        lambda config: config.update(dynamic={"+:.*": 3}),
        lambda config: config.update(dynamic={"+:.*": {"bits": 8}}),
        lambda config: config.update(dynamic=["x"]),
        lambda config: config.pop("bits"),
        lambda config: config.pop("sym"),
    ],
)
def test_odd_configurations_of_gptq(outputs: Path, change: Callable[[dict[str, Any]], object], tmp_path: Path) -> None:
    shutil.copytree(outputs / "gptq-True", tmp_path / "model")
    shutil.copy(outputs / "text.txt", tmp_path)
    configure(tmp_path / "model", change)
    refused(tmp_path / "model")


def scheme(config: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = config["config_groups"]["group_0"]
    return found


@pytest.mark.parametrize(
    "change",
    [
        lambda config: config.update(format="int-quantized"),
        lambda config: config.pop("format"),
        lambda config: config.update(config_groups={}),
        lambda config: config.update(config_groups=[]),
        lambda config: config.update(config_groups="group_0"),
        lambda config: scheme(config).update(targets=["re:("]),
        lambda config: scheme(config).update(targets=["re:^model.layers.1"]),
        lambda config: scheme(config).update(targets=[3]),
        lambda config: scheme(config).update(targets=None),
        lambda config: scheme(config).pop("weights"),
        lambda config: scheme(config).update(weights=None),
        lambda config: scheme(config)["weights"].update(type="float"),
        lambda config: scheme(config)["weights"].update(strategy="tensor"),
        lambda config: scheme(config)["weights"].update(strategy="channel"),
        lambda config: scheme(config)["weights"].update(strategy=["group"]),
        lambda config: scheme(config).update(input_activations={"num_bits": 8, "dynamic": True}),
    ],
)
def test_odd_configurations_of_compressed_tensors(
    outputs: Path, change: Callable[[dict[str, Any]], object], tmp_path: Path
) -> None:
    shutil.copytree(outputs / "compressed-tensors-True", tmp_path / "model")
    shutil.copy(outputs / "text.txt", tmp_path)
    configure(tmp_path / "model", change)
    refused(tmp_path / "model")


# ---------------------------------------------------------------- tensors that do not belong to the configuration


PARTS = {"gptq": ("qweight", "qzeros", "scales", "g_idx"), "compressed-tensors": ("weight_packed", "weight_scale")}


@pytest.mark.parametrize("how", ["missing", "row", "column", "flat", "scalar", "empty", "int16", "float8"])
@pytest.mark.parametrize("part", range(4))
def test_a_tensor_of_a_linear(copy: Path, form: str, part: int, how: str) -> None:
    suffix = (*PARTS[form], "weight_shape", "weight_shape")[part]
    name = f"{LINEAR}.{suffix}"
    changes: dict[str, Callable[[Tensor], Tensor]] = {
        "row": lambda t: t[:-1],
        "column": lambda t: t[..., :-1],
        "flat": lambda t: t.flatten().unsqueeze(0).unsqueeze(0),
        "scalar": lambda t: t.flatten()[0].clone(),
        "empty": lambda t: t[:0],
        "int16": lambda t: t.to(torch.int16),
        "float8": lambda t: t.float().to(torch.float8_e4m3fn),
    }

    def change(tensors: dict[str, Tensor]) -> None:
        tensor = tensors.pop(name)
        if how != "missing":
            tensors[name] = changes[how](tensor)

    change_tensors(copy, change)
    refused(copy)


@pytest.mark.parametrize("shape", [(32, 47), (31, 48), (48, 32), (0, 0), (-32, -48), (2**62, 2**62), (32, 2**40)])
def test_a_shape_that_the_codes_do_not_have(outputs: Path, shape: tuple[int, int], tmp_path: Path) -> None:
    shutil.copytree(outputs / "compressed-tensors-True", tmp_path / "model")
    shutil.copy(outputs / "text.txt", tmp_path)
    name = f"{LINEAR}.weight_shape"
    change_tensors(tmp_path / "model", lambda tensors: tensors.update({name: torch.tensor(shape)}))
    refused(tmp_path / "model", "do not belong together")


def test_groups_gathered_by_an_index(outputs: Path, tmp_path: Path) -> None:
    shutil.copytree(outputs / "gptq-True", tmp_path / "model")
    shutil.copy(outputs / "text.txt", tmp_path)
    name = f"{LINEAR}.g_idx"
    change_tensors(tmp_path / "model", lambda tensors: tensors.update({name: tensors[name].flip(0)}))
    refused(tmp_path / "model", "desc_act")


@pytest.mark.parametrize("value", [0.0, -1.0, float("nan"), float("inf")])
def test_a_scale_that_no_grid_has(copy: Path, form: str, value: float) -> None:
    """Refused where it is decoded, as it is where it is loaded to run."""
    name = f"{LINEAR}.{'scales' if form == 'gptq' else 'weight_scale'}"
    change_tensors(copy, lambda tensors: tensors[name].view(-1)[:1].fill_(value))
    refused(copy, "scale is not positive and finite")


def test_zero_points_of_a_symmetric_grid(outputs: Path, tmp_path: Path) -> None:
    """They are stored and all the same; another one would be decoded by some readers and passed over by others."""
    shutil.copytree(outputs / "gptq-True", tmp_path / "model")
    shutil.copy(outputs / "text.txt", tmp_path)
    name = f"{LINEAR}.qzeros"
    change_tensors(tmp_path / "model", lambda tensors: tensors[name].view(-1)[:1].add_(1))
    refused(tmp_path / "model", "zero-point of a symmetric grid")
    with pytest.raises(ModelError, match="zero-point of a symmetric grid"):
        compress.load(tmp_path / "model", device="cpu")


@pytest.mark.parametrize("suffix", ["weight_g_idx", "input_scale"])
def test_tensors_of_a_linear_that_are_not_read(copy: Path, suffix: str) -> None:
    """Other writers of these formats have more of them, such as an order of columns: without it a weight is another."""
    change_tensors(copy, lambda tensors: tensors.update({f"{LINEAR}.{suffix}": torch.arange(48, dtype=torch.int32)}))
    refused(copy, f"{LINEAR}.*{suffix} is not read")


def test_a_bias_beside_the_codes_is_read(form: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fsync", lambda _: None)
    model = tiny_directory(tmp_path / "model", "qwen2", blocks=1, dtype=torch.float16)
    _, checkpoint = open_model(quantized(model, tmp_path / form, form))
    assert any(name.endswith("q_proj.bias") for name in checkpoint.tensors)


def test_a_plain_weight_beside_the_codes(copy: Path) -> None:
    """Which of both is meant?"""
    change_tensors(copy, lambda tensors: tensors.update({f"{LINEAR}.weight": torch.ones(32, 48).half()}))
    refused(copy, "weight")


def test_codes_of_a_linear_that_the_model_does_not_have(copy: Path, form: str) -> None:
    """The linear itself is missing then."""

    def rename(tensors: dict[str, Tensor]) -> None:
        for name in [name for name in tensors if name.startswith(f"{LINEAR}.")]:
            tensors[name.replace("down_proj", "odd_proj")] = tensors.pop(name)

    change_tensors(copy, rename)
    refused(copy)


def test_a_file_that_ends_too_early(copy: Path) -> None:
    path = copy / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-64])
    refused(copy, "truncated")


def test_a_quantized_model_is_not_compressed_again(copy: Path, tmp_path: Path) -> None:
    plan = compress.Plan(
        model=compress.Model(path=str(copy)), run=compress.Run(output=str(tmp_path / "again")), passes=[RTN()]
    )
    with pytest.raises(ModelError, match="already quantized"):
        compress.run(plan)
