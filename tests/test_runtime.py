"""Emitted directories that run: each linear against float64, whole models against dense ones, and what is refused."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from typing import TYPE_CHECKING, Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoModelForCausalLM
from transformers.utils import logging

import compress
from compress.cli import main
from compress.errors import ModelError, PlanError, RunError
from compress.export.reader import BranchedCheckpoint, DecodedCheckpoint, open_model
from compress.grid import normal_float
from compress.kernels import cpu
from compress.kernels.choose import choose
from compress.kernels.pack import _nibbles
from compress.packed_linear import PackedLinear
from compress.passes import RTN, EoRA, LQLoRA, Magnitude
from tests.conftest import ROOT, same_bits, tiny_directory
from tests.models import FAMILIES, VOCABULARY

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from torch import Tensor
    from transformers import PreTrainedModel

    from compress.passes import LinearPass

ROUND = 2.0**-8  # relative, to the nearest bfloat16
SPARSE4: tuple[LinearPass, ...] = (Magnitude(pattern="2:4"), RTN(bits=4, group_size=32))
BRANCHED: tuple[LinearPass, ...] = (*SPARSE4, EoRA(rank=2))


@pytest.fixture(autouse=True)
def _no_sync(monkeypatch: pytest.MonkeyPatch) -> None:
    """Half of the time of a tiny run is waiting for the disk."""
    monkeypatch.setattr(os, "fsync", lambda _: None)


def emit(folder: Path, form: str, passes: tuple[LinearPass, ...]) -> Path:
    """The output of passes on the model in the folder."""
    plan = compress.Plan(
        model=compress.Model(path=str(folder / "model")),
        calibration=compress.Calibration(source=str(folder / "text.txt"), samples=4, length=16),
        run=compress.Run(output=str(folder / form), device="cpu", threads=1),
        passes=list(passes),
        exports=[compress.Export(format=form)],
    )
    compress.run(plan)
    return folder / form


def wide_directory(directory: Path, family: str, **settings: Any) -> Path:
    """A tiny model of widths that groups of 32 divide."""
    inner = {"opt": "ffn_dim", "gpt2": "n_inner"}.get(family, "intermediate_size")
    return tiny_directory(directory, family, **({"blocks": 2, "dtype": torch.bfloat16, inner: 64} | settings))


def tokens(rows: int = 2, length: int = 12) -> Tensor:
    return torch.randint(3, VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(0))


def logits(model: PreTrainedModel) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(tokens(), use_cache=False).logits
    return found


def dense_model(directory: Path, dtype: torch.dtype) -> PreTrainedModel:
    """transformers' own model with the weights, branches in them, that the directory stands for."""
    config, checkpoint = open_model(directory)
    model = AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
    values = {name.removeprefix(f"{model.base_model_prefix}."): checkpoint.read(name) for name in checkpoint.tensors}
    for name, parameter in model.named_parameters():
        parameter.data.copy_(values[name.removeprefix(f"{model.base_model_prefix}.")])
    return model


def packed_linears(model: PreTrainedModel) -> dict[str, PackedLinear]:
    return {name: module for name, module in model.named_modules() if isinstance(module, PackedLinear)}


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_runs(family: str, tmp_path: Path) -> None:
    """2:4, 4 bits and a branch; head and embedding tied and not. Every linear of the model in bfloat16 is within what
    its roundings allow of the product in float64, and in float32 the logits are those of the dense model."""
    wide_directory(tmp_path / "model", family, tied=FAMILIES.index(family) % 2 == 0)
    directory = emit(tmp_path, "packed", BRANCHED)
    _, checkpoint = open_model(directory)
    model = compress.load(directory, device="cpu")
    assert not model.training
    assert not any(parameter.requires_grad for parameter in model.parameters())
    found = packed_linears(model)
    assert model.compress_kernels.keys() == found.keys() == checkpoint.layouts.keys()
    assert {one["kernel"] for one in model.compress_kernels.values()} == {"int4"}
    seen: dict[str, tuple[Tensor, Tensor]] = {}
    for name, module in found.items():
        module.register_forward_hook(lambda _, given, result, name=name: seen.update({name: (given[0], result)}))
    low = logits(model)
    for name, (x, y) in seen.items():
        parts = checkpoint.packed(name)
        up, down = parts["low_rank_up"].double(), parts["low_rank_down"].double()
        base = checkpoint._coded[checkpoint._names[name]].stored.weight(parts).double()  # without the branch
        x, bias = x.double(), found[name].bias
        exact = x @ base.T + x @ down.T @ up.T + (0 if bias is None else bias.double())
        size = 3 * x.abs() @ base.abs().T + 5 * x.abs() @ down.abs().T @ up.abs().T
        size += 0 if bias is None else 2 * bias.double().abs()
        assert bool(((y.double() - exact).abs() <= 1.1 * ROUND * size + 1e-6).all()), name
    wanted = logits(dense_model(directory, torch.float32))
    alone = (logits(dense_model(directory, torch.bfloat16)).float() - wanted).abs().max()
    assert (low.float() - wanted).abs().max() <= 3 * alone  # of the same order as bfloat16 in the dense model
    exact = logits(compress.load(directory, device="cpu", dtype=torch.float32))
    torch.testing.assert_close(exact, wanted, rtol=1e-4, atol=1e-4)
    again = AutoModelForCausalLM.from_pretrained(directory)
    assert again.compress_kernels == model.compress_kernels
    assert torch.equal(logits(again), low)
    body = AutoModel.from_pretrained(directory)
    assert len(packed_linears(body)) == len(found)
    with torch.no_grad():
        states = [one(tokens(), use_cache=False).last_hidden_state for one in (body, again.base_model)]
    assert torch.equal(*states)


FORMS: dict[str, tuple[str, tuple[LinearPass, ...], str]] = {
    "gptq": ("gptq", SPARSE4, "int4"),
    "gptq, a branch": ("gptq", BRANCHED, "int4"),
    "compressed-tensors, asymmetric": ("compressed-tensors", (RTN(bits=4, group_size=32, symmetric=False),), "int4"),
    "compressed-tensors, a branch": ("compressed-tensors", BRANCHED, "int4"),
    "plain weights, a branch": ("huggingface", BRANCHED, "decoded"),
    "3 bits": ("packed", (RTN(bits=3, group_size=32),), "int4"),
    "8 bits, asymmetric": ("packed", (RTN(bits=8, group_size=32, symmetric=False),), "int4"),
    "4 bits in groups of 16": ("packed", (RTN(bits=4, group_size=16),), "decoded"),
    "8 bits by row": ("packed", (RTN(bits=8, group_size=-1),), "int8"),
    "2:4": ("packed", (Magnitude(pattern="2:4"),), "decoded"),
    "normal floats": ("packed", (LQLoRA(bits=4, rank=2, group_size=32, iterations=2),), "decoded"),
    "4 bits in some": ("packed", (RTN(bits=4, group_size=32, match=("*.0.*",)),), "int4"),
}


@pytest.mark.parametrize("name", FORMS)
def test_every_format_runs(name: str, tmp_path: Path) -> None:
    """What has codes or a branch is packed, whatever the format; float32 gives the dense model's logits."""
    form, passes, kernel = FORMS[name]
    wide_directory(tmp_path / "model", "llama")
    directory = emit(tmp_path, form, passes)
    model = compress.load(str(directory), device="cpu")
    assert {one["kernel"] for one in model.compress_kernels.values()} == {kernel}
    assert len(model.compress_kernels) == (7 if name == "4 bits in some" else 14)
    wanted = logits(dense_model(directory, torch.float32))
    alone = (logits(dense_model(directory, torch.bfloat16)).float() - wanted).abs().max()
    assert (logits(model).float() - wanted).abs().max() <= 3 * alone
    for kernels in ("auto", "decoded", "reference"):
        exact = logits(compress.load(directory, device="cpu", dtype="float32", kernels=kernels))
        torch.testing.assert_close(exact, wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "name",
    ["gptq, a branch", "compressed-tensors, a branch", "compressed-tensors, asymmetric", "3 bits", "normal floats"],
)
def test_the_default_device_does_not_matter(name: str, tmp_path: Path) -> None:
    """A program may have set another one, such as its GPU; files are read, and kernels made, where they say."""
    form, passes, _ = FORMS[name]
    wide_directory(tmp_path / "model", "llama", blocks=1)
    directory = emit(tmp_path, form, passes)
    x, found = torch.ones(3, 32, dtype=torch.bfloat16), []
    for default in ("cpu", "meta"):
        for cached in (cpu._block, normal_float, _nibbles):
            cached.cache_clear()
        with torch.device(default):
            _, checkpoint = open_model(directory)
            assert isinstance(checkpoint, (DecodedCheckpoint, BranchedCheckpoint))
            layout, parts = checkpoint.layouts[NAME], checkpoint.packed(NAME)
            kernel = choose(layout, torch.device("cpu"), torch.bfloat16).kernel(layout, parts, torch.bfloat16)
            found.append((checkpoint.read(f"{NAME}.weight"), kernel(x)))
    assert all(same_bits(a, b) for a, b in zip(*found, strict=True))


def test_scales_may_be_smaller_than_weights(tmp_path: Path) -> None:
    """Scales in float16 of a float32 checkpoint: decoded as it was evaluated, packed where bfloat16 is asked for."""
    wide_directory(tmp_path / "model", "llama", dtype=torch.float32)
    directory = emit(tmp_path, "gptq", (RTN(bits=4, group_size=32, scale_dtype="float16"),))
    model = compress.load(directory, device="cpu")
    assert {one["kernel"] for one in model.compress_kernels.values()} == {"decoded"}
    torch.testing.assert_close(logits(model), logits(dense_model(directory, torch.float32)), rtol=1e-4, atol=1e-4)
    low = compress.load(directory, device="cpu", dtype=torch.bfloat16)
    assert {one["kernel"] for one in low.compress_kernels.values()} == {"int4"}


def test_a_plain_directory_is_transformers_own(tmp_path: Path) -> None:
    wide_directory(tmp_path / "model", "llama")
    directory = emit(tmp_path, "huggingface", (Magnitude(sparsity=0.5),))
    model = compress.load(directory, device="cpu")
    assert model.compress_kernels == {}
    assert torch.equal(logits(model), logits(AutoModelForCausalLM.from_pretrained(directory)))


def test_a_branch_is_not_merged(tmp_path: Path) -> None:
    """Pruned weights of a plain directory stay 0 beside the branch of its adapter."""
    wide_directory(tmp_path / "model", "gpt2")
    model = compress.load(emit(tmp_path, "huggingface", BRANCHED), device="cpu")
    for module in packed_linears(model).values():
        assert module.kernel is not None
        assert int((module.kernel.get_buffer("weight") == 0).sum()) >= module.in_features * module.out_features // 2
        assert module.kernel.get_buffer("low_rank_up").shape == (module.out_features, 2)


def test_it_generates(tmp_path: Path) -> None:
    """Greedily, the dense model's tokens in float32; and in bfloat16 with the generation settings of the directory."""
    model = wide_directory(tmp_path / "model", "qwen3")
    (model / "generation_config.json").write_text('{"eos_token_id": 63, "pad_token_id": 0}')
    directory = emit(tmp_path, "packed", BRANCHED)
    settings: dict[str, Any] = {"max_new_tokens": 8, "do_sample": False}
    loaded = compress.load(directory, device="cpu", dtype=torch.float32)
    wanted = dense_model(directory, torch.float32).generate(tokens(1), eos_token_id=63, **settings)
    assert torch.equal(loaded.generate(tokens(1), **settings), wanted)
    low = compress.load(directory, device="cpu")
    assert low.generation_config.eos_token_id == 63
    assert low.generate(tokens(1), **settings)[0, :12].equal(tokens(1)[0])


def test_packed_weights_are_small(tmp_path: Path) -> None:
    """4 bits in groups of 128: 4.25 bits a weight with scale and zero in bfloat16, and no dense weight beside them."""
    tiny_directory(tmp_path / "model", "llama", blocks=1, dtype=torch.bfloat16, hidden_size=128, intermediate_size=256)
    model = compress.load(emit(tmp_path, "packed", (RTN(bits=4),)), device="cpu")
    for module in packed_linears(model).values():
        bits = 8 * sum(buffer.nbytes for buffer in module.buffers()) / (module.in_features * module.out_features)
        assert bits == 4.25
        assert not list(module.parameters())


# ---------------------------------------------------------------- what is refused


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runtime")
    wide_directory(folder / "model", "llama", blocks=1)
    return emit(folder, "packed", BRANCHED)


NAME = "model.layers.0.self_attn.q_proj"


def spoil_tensor(suffix: str, value: float) -> Callable[[Path], None]:
    def spoil(directory: Path) -> None:
        tensors = load_file(directory / "model.safetensors")
        tensors[f"{NAME}.{suffix}"].view(-1)[0] = value
        save_file(tensors, directory / "model.safetensors", {"format": "pt"})

    return spoil


def without(end: str) -> Callable[[Path], None]:
    def spoil(directory: Path) -> None:
        tensors = load_file(directory / "model.safetensors")
        kept = {name: tensor for name, tensor in tensors.items() if not name.startswith(f"{NAME}.{end}")}
        save_file(kept, directory / "model.safetensors", {"format": "pt"})

    return spoil


def configured(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    def spoil(directory: Path) -> None:
        config = json.loads((directory / "config.json").read_text())
        change(config["quantization_config"])
        (directory / "config.json").write_text(json.dumps(config))

    return spoil


def first(config: dict[str, Any]) -> Any:
    return config["schemes"][0]


DAMAGED: dict[str, tuple[Callable[[Path], None], str]] = {
    "positions that do not ascend": (spoil_tensor("positions", 0x11), f"(?s){NAME}.*1 and 0 do not ascend"),
    "a negative scale": (spoil_tensor("scale", -1.0), f"(?s){NAME}.*a scale is not positive"),
    "an infinite branch": (spoil_tensor("low_rank_up", torch.inf), f"(?s){NAME}.*branch is not finite"),
    "no scale": (without("scale"), "scale is missing"),
    "no tensors at all": (without(""), "names model.layers.0.self_attn.q_proj, but its packed tensors are missing"),
    "a version to come": (configured(lambda c: c.update(version=2)), "version 2 of the packed format is newer than 1"),
    "a version to come with more keys": (
        configured(lambda c: c.update(version=2, layout="rows")),
        "version 2 of the packed format is newer than 1; update compress",
    ),
    "another shape": (configured(lambda c: first(c).update(shape=[32, 64])), r"is torch.\w+ \[|not in any|surplus"),
    "a linear that is not there": (
        configured(lambda c: first(c)["modules"].append("model.layers.7.mlp.up_proj")),
        r"names model.layers.7.mlp.up_proj, but",
    ),
    "no schemes": (configured(lambda c: c.pop("schemes")), "schemes"),
}


@pytest.mark.parametrize("name", DAMAGED)
@pytest.mark.parametrize("load", [compress.load, AutoModelForCausalLM.from_pretrained], ids=["load", "from_pretrained"])
def test_damage_is_found_when_the_model_is_loaded(
    name: str, load: Callable[[Path], Any], made: Path, tmp_path: Path
) -> None:
    spoil, problem = DAMAGED[name]
    directory = shutil.copytree(made, tmp_path / "out")
    spoil(directory)
    with pytest.raises(ModelError, match=problem) as failure:
        load(directory)
    assert failure.value.where
    assert failure.value.fix


@pytest.mark.parametrize(
    ("settings", "problem"),
    [
        ({"device": "tpu9"}, 'there is no device "tpu9"'),
        ({"device": None}, 'there is no device "None"'),
        ({"device": "mps"}, "do not run on mps"),
        ({"device": "cuda:99"}, "torch sees no device cuda:99"),
        ({"dtype": "int8"}, "no kernels for int8"),
        ({"dtype": torch.float64}, "no kernels for torch.float64"),
        ({"kernels": "fastest"}, 'no kernels "fastest"'),
    ],
)
def test_impossible_settings_are_refused(settings: dict[str, Any], problem: str, made: Path) -> None:
    with pytest.raises(PlanError, match=problem) as failure:
        compress.load(made, **settings)
    assert failure.value.fix


@pytest.mark.parametrize(
    ("path", "problem"),
    [
        ("", "no directory is given"),
        ("a" * 5000, "cannot be looked for"),
        ("~nobody-of-this-name/model", "cannot be looked for: Could not determine home directory"),
    ],
    ids=["empty", "long", "nobody's home"],
)
def test_a_path_that_cannot_be_is_refused(path: str, problem: str) -> None:
    with pytest.raises(PlanError, match=problem) as failure:
        compress.load(path)
    assert failure.value.fix


def test_transformers_cannot_ask_for_the_impossible(made: Path, tmp_path: Path) -> None:
    with pytest.raises(PlanError, match="no kernels for torch"):
        AutoModelForCausalLM.from_pretrained(made, dtype=torch.float64)
    with pytest.raises(PlanError, match="do not run on mps"):
        AutoModelForCausalLM.from_pretrained(made, device_map={"": "mps"})
    with pytest.raises(PlanError, match="no directory"):
        compress.load(tmp_path / "nothing")
    directory = shutil.copytree(made, tmp_path / "out")
    configured(lambda c: c.update(kernels="fastest"))(directory)
    with pytest.raises(PlanError, match='no kernels "fastest"'):
        AutoModelForCausalLM.from_pretrained(directory)
    for device, problem in (("cuda:99", "torch sees no device"), ("meta", "do not run on meta")):
        configured(lambda c, device=device: c.update(kernels="auto", device=device))(directory)
        with pytest.raises(PlanError, match=problem):
            AutoModelForCausalLM.from_pretrained(directory)


@pytest.mark.parametrize("load", [compress.load, AutoModelForCausalLM.from_pretrained], ids=["load", "from_pretrained"])
def test_tensors_that_the_model_has_not_are_reported(
    load: Callable[[Path], Any], made: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """As transformers does, and with its exceptions: what older versions stored is none."""
    directory = shutil.copytree(made, tmp_path / "out")
    more = {"model.layers.0.mlp.odd": torch.ones(2), "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}
    save_file(load_file(directory / "model.safetensors") | more, directory / "model.safetensors", {"format": "pt"})
    logging.enable_propagation()
    try:
        load(directory)
    finally:
        logging.disable_propagation()
    assert re.search(r"layers\.0\.mlp\.odd +\| UNEXPECTED", caplog.text)
    assert "inv_freq" not in caplog.text


def test_saving_says_why_it_is_refused(made: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """transformers' own error points to the log."""
    with pytest.raises(ValueError, match="not serializable - check out the warnings from the logger"):
        compress.load(made, device="cpu").save_pretrained(tmp_path / "saved")
    assert "copy the directory they were loaded from" in caplog.text
    assert not list(tmp_path.glob("saved/*"))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_refused_change_changes_nothing(family: str, tmp_path: Path) -> None:
    """Every parameter and buffer is where and what it was: the refusal comes before the embedding has followed."""
    wide_directory(tmp_path / "model", family, tied=False)
    directory = emit(tmp_path, "packed", (RTN(bits=4, group_size=32),))
    for model in (compress.load(directory, device="cpu"), AutoModel.from_pretrained(directory)):
        before = {name: (value.dtype, value.device) for name, value in every_tensor(model)}
        changes: list[Callable[[Any], Any]] = [lambda m: m.to(torch.float32), lambda m: m.double()]
        changes += [lambda m: m.to("meta"), lambda m: m.base_model.half()]
        for change in changes:
            with pytest.raises((RunError, ValueError), match=r"packed for cpu|not supported for quantized"):
                change(model)
            assert {name: (value.dtype, value.device) for name, value in every_tensor(model)} == before
        model.to("cpu", torch.bfloat16)


def every_tensor(model: PreTrainedModel) -> list[tuple[str, Tensor]]:
    return [*model.named_parameters(), *model.named_buffers()]


# ---------------------------------------------------------------- the command, and the import


def test_explain_says_which_kernel_and_why(made: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["explain", str(made), NAME]) == 0
    shown = capsys.readouterr().out
    assert f"{NAME}  32 × 32  bfloat16" in shown
    assert "int4" in shown
    assert "codes of 4 bits, bfloat16" in shown
    assert main(["explain", str(made), NAME, "--dtype", "float32", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["kernel"], found["runs_in"], found["sparsity"], found["rank"]) == ("decoded", "float32", "2:4", 2)
    assert "too coarse for float32" in found["why"]
    assert main(["explain", str(made), NAME, "--dtype", "float64"]) == 2
    assert "--dtype: there are no kernels for float64" in capsys.readouterr().err
    assert main(["explain", str(made), "model.layers.0.self_attn.q"]) == 2
    assert f'did you mean "{NAME}"' in capsys.readouterr().err


def test_explain_knows_which_layers_are_there(made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A plain linear is there, a misspelt one is not; also where all are plain."""
    plain = wide_directory(tmp_path / "model", "llama")
    assert main(["explain", str(plain), NAME]) == 2
    message = capsys.readouterr().err
    assert f'"{NAME}" is no packed linear: it has plain weights' in message
    assert "the directory has no packed ones" in message
    for directory in (made, plain):
        assert main(["explain", str(directory), "model.layers.0.self_attn.q"]) == 2
        message = capsys.readouterr().err
        assert f'no linear "model.layers.0.self_attn.q"; did you mean "{NAME}"?' in message
        assert "layers are named like model." in message


ORDERS = {
    "compress first": "import compress; assert not {'torch', 'transformers'} & sys.modules.keys(); import transformers",
    "transformers first": "import transformers, transformers.quantizers.auto; import compress",
}


@pytest.mark.parametrize("order", ORDERS)
def test_transformers_knows_the_quantizer(order: str) -> None:
    """Whichever is imported first; and `import compress` alone imports neither torch nor transformers."""
    check = (
        "from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING as table; assert 'compress' in table; "
        "assert not [one for one in sys.meta_path if type(one).__module__.startswith('compress')]"
    )
    command = [sys.executable, "-c", f"import sys; {ORDERS[order]}; {check}"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
