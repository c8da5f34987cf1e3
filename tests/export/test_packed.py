"""Directories in the packed format: the weights of plain ones, masks in positions, exact sizes, and what is refused."""

from __future__ import annotations

import json
import os
import shutil
from typing import TYPE_CHECKING, Any

import pytest
import torch
from safetensors.torch import load_file

import compress
from compress.compiling import compile_plan
from compress.errors import ModelError
from compress.export.reader import open_model
from compress.kernels.pack import unpack_positions
from compress.passes import GPTQ, RTN, EoRA, LQLoRA, Magnitude, SparseGPT, Wanda
from tests.conftest import same_bits, tiny_directory

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from compress.passes import LinearPass
    from compress.report import Report

GRID: dict[str, Any] = {"group_size": 16, "clip": "minmax"}
PLANS: dict[str, tuple[LinearPass, ...]] = {
    "2:4": (Wanda(pattern="2:4"),),
    "1:2 in some linears": (Magnitude(pattern="1:2", match=("*.0.*",)),),
    "4 bits": (RTN(bits=4, **GRID),),
    "3 bits, asymmetric, scales in float32": (RTN(bits=3, symmetric=False, scale_dtype="float16", **GRID),),
    "2:4 and 4 bits": (SparseGPT(pattern="2:4"), GPTQ(bits=4, **GRID)),
    "1:4 and 8 bits by row": (Magnitude(pattern="1:4"), RTN(bits=8, group_size=-1, clip="minmax")),
    "twice pruned, 4 bits": (Wanda(pattern="2:4"), Magnitude(sparsity=0.6), RTN(bits=4, **GRID)),
    "4:8 and 4 bits": (Magnitude(pattern="4:8"), RTN(bits=4, **GRID)),
    "2:4, 4 bits, a branch": (Wanda(pattern="2:4"), RTN(bits=4, **GRID), EoRA(rank=3)),
    "2:4, a branch by budget": (Wanda(pattern="2:4"), EoRA(rank=6, budget=900)),
    "a branch alone": (Magnitude(sparsity=0.5), EoRA(rank=2)),
    "normal floats": (LQLoRA(bits=3, rank=2, group_size=16, iterations=2),),
    "normal floats under a budget": (LQLoRA(budget=8, rank=1, choices_group=(16, 32), survey_iterations=1),),
    "2:4 and normal floats": (Wanda(pattern="2:4"), LQLoRA(bits=4, rank=0, group_size=16, second_dtype="bfloat16")),
}


@pytest.fixture(autouse=True)
def _no_sync(monkeypatch: pytest.MonkeyPatch) -> None:
    """Half of the time of a tiny run is waiting for the disk."""
    monkeypatch.setattr(os, "fsync", lambda _: None)


def run(folder: Path, form: str, passes: tuple[LinearPass, ...]) -> tuple[Report, int]:
    plan = compress.Plan(
        model=compress.Model(path=str(folder / "model")),
        calibration=compress.Calibration(source=str(folder / "text.txt"), samples=4, length=16),
        run=compress.Run(output=str(folder / form), device="cpu", threads=1),
        passes=list(passes),
        exports=[compress.Export(format=form)],
    )
    return compress.run(plan), compile_plan(plan).output_bytes


def tensors_of(directory: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for path in directory.glob("*.safetensors") for name, tensor in load_file(path).items()}


@pytest.mark.parametrize("name", PLANS)
def test_it_says_what_plain_weights_say(name: str, tmp_path: Path) -> None:
    """Tensor for tensor and bit for bit; and the lock knew every byte, where no budget decides."""
    number = list(PLANS).index(name)
    family, dtype = ("llama", "gpt2")[number % 2], (torch.float16, torch.bfloat16, torch.float32)[number % 3]
    tiny_directory(tmp_path / "model", family, blocks=2, dtype=dtype)
    _, _ = run(tmp_path, "huggingface", PLANS[name])
    report, promised = run(tmp_path, "packed", PLANS[name])
    assert not (tmp_path / "packed" / "adapter").exists()
    _, plain = open_model(tmp_path / "huggingface")
    _, packed = open_model(tmp_path / "packed")
    assert plain.tensors.keys() == packed.tensors.keys()
    for one in plain.tensors:
        assert plain.tensors[one].shape == packed.tensors[one].shape, one
        assert same_bits(plain.read(one), packed.read(one)), one
    written = sum(path.stat().st_size for path in (tmp_path / "packed").glob("*.safetensors*"))
    assert written == report.output.bytes
    assert written < promised if "budget" in name else written == promised


MASKS = {"2:4": True, "2:4 and 4 bits": True, "twice pruned, 4 bits": False, "4:8 and 4 bits": False}


@pytest.mark.parametrize(("name", "inside"), MASKS.items())
def test_the_mask_is_in_the_positions_or_beside_the_weights(name: str, inside: bool, tmp_path: Path) -> None:
    """The masks are those that other formats write; without a grid they are the zeros."""
    tiny_directory(tmp_path / "model", "llama", blocks=1)
    run(tmp_path, "packed", PLANS[name])
    run(tmp_path, "gptq", PLANS[name])
    found, wanted = tensors_of(tmp_path / "packed"), tensors_of(tmp_path / "gptq")
    assert (tmp_path / "packed" / "masks.safetensors").exists() != inside
    masks = {key: mask for key, mask in wanted.items() if key.endswith(".mask")}
    assert masks
    for key, mask in masks.items():
        if not inside:
            assert torch.equal(found[key], mask)
            continue
        width = 8 * mask.shape[1]
        bits = ((mask.unsqueeze(-1) >> torch.arange(8, dtype=torch.uint8)) & 1).flatten(1).bool()
        assert torch.equal(unpack_positions(found[key.removesuffix("mask") + "positions"], width), bits)


def test_one_scheme_for_all_linears_of_a_layout(tmp_path: Path) -> None:
    tiny_directory(tmp_path / "model", "llama", blocks=2, dtype=torch.bfloat16)
    run(tmp_path, "packed", PLANS["2:4, 4 bits, a branch"])
    quantization = json.loads((tmp_path / "packed" / "config.json").read_text())["quantization_config"]
    assert (quantization["quant_method"], quantization["version"]) == ("compress", 1)
    shapes = [tuple(scheme["shape"]) for scheme in quantization["schemes"]]
    assert len(shapes) == len(set(shapes))
    assert sum(len(scheme["modules"]) for scheme in quantization["schemes"]) == 14
    for scheme in quantization["schemes"]:
        assert (scheme["sparsity"], scheme["rank"], scheme["dtype"]) == ("2:4", 3, "bfloat16")
        assert scheme["grid"]["bits"] == 4
        assert scheme["grid"]["scale_codes"] is None


# ---------------------------------------------------------------- what is refused


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("packed")
    tiny_directory(folder / "model", "llama", blocks=1)
    run(folder, "packed", PLANS["2:4, 4 bits, a branch"])
    return folder / "packed"


def first(config: dict[str, Any]) -> dict[str, Any]:
    scheme: dict[str, Any] = config["schemes"][0]
    return scheme


WRONG: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "a version to come": (lambda c: c.update(version=2), "version 2 of the packed format is newer than 1; update"),
    "no version": (lambda c: c.pop("version"), "there is no version None"),
    "two schemes": (lambda c: c["schemes"].append(first(c)), "2 schemes name it"),
    "no scheme": (lambda c: first(c)["modules"].clear(), "0 schemes name it"),
    "another sparsity": (lambda c: first(c).update(sparsity="1:4"), "there is no sparsity 1:4"),
    "no sparsity": (lambda c: first(c).update(sparsity=None), "positions is surplus"),
    "another rank": (lambda c: first(c).update(rank=4), "low_rank_"),
    "a negative rank": (lambda c: first(c).update(rank=-1), "a branch of rank -1"),
    "another shape": (lambda c: first(c).update(shape=[64, 64]), "is torch"),
    "no shape": (lambda c: first(c).update(shape=[0, 32]), "there is no linear of 0 × 32"),
    "another dtype": (lambda c: first(c).update(dtype="int8"), "int8"),
    "5 bits": (lambda c: first(c)["grid"].update(bits=5), "there is no grid of 5 bits"),
    "bits that are no integer": (lambda c: first(c)["grid"].update(bits=4.0), "there is no grid of 4.0 bits"),
    "groups that do not divide": (lambda c: first(c)["grid"].update(group_size=24), "with groups of 24"),
    "another kind": (lambda c: first(c)["grid"].update(kind="fp"), "4 bits (fp)"),
    "other scales": (lambda c: first(c)["grid"].update(scale_dtype="bfloat16"), "scale is torch.float"),
    "no grid": (lambda c: first(c).update(grid=None), "is surplus"),
    "no rank": (lambda c: first(c).pop("rank"), "together: there is no 'rank'"),
    "no list": (lambda c: c.update(schemes=3), ""),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_configuration_of_other_tensors_is_refused_at_once(name: str, made: Path, tmp_path: Path) -> None:
    change, problem = WRONG[name]
    directory = shutil.copytree(made, tmp_path / "out")
    config = json.loads((directory / "config.json").read_text())
    change(config["quantization_config"])
    (directory / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError) as failure:
        open_model(directory)
    assert "tensors and quantization_config do not belong together" in str(failure.value)
    assert problem in str(failure.value)
