"""The branches as a PEFT adapter: PEFT computes with them what we evaluate, and damaged ones are refused."""

from __future__ import annotations

import json
import math
import shutil
from typing import TYPE_CHECKING, Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, CompressedTensorsConfig, GPTQConfig

import compress
from compress.architecture import architecture_for
from compress.calibration.tokenizer import load_tokenizer
from compress.calibration.tokens import eval_stream
from compress.compiling import compile_plan
from compress.errors import ModelError
from compress.evals.perplexity import evaluate
from compress.export.reader import open_model
from compress.passes import GPTQ, PERP, RTN, EoRA, SparseGPT, Wanda, Where
from tests.conftest import tiny_directory

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from torch import Tensor, nn

    from compress.passes import LinearState, Moments, Note

FAMILIES = ["llama", "gpt2", "qwen2", "phi3"]
PREFIX = "base_model.model."
RANKS = (Where(match="*.0.*", rank=2), Where(match="*.mlp.*", rank=7))


def plan_of(folder: Path, *passes: Any, form: str = "huggingface", output: str = "out") -> compress.Plan:
    return compress.Plan(
        model=compress.Model(path=str(folder / "model")),
        calibration=compress.Calibration(source=str(folder / "text.txt"), samples=8, length=16),
        run=compress.Run(output=str(folder / output)),
        passes=passes,
        exports=[compress.Export(format=form)],
    )


def run(folder: Path, family: str, *passes: Any, form: str = "huggingface", **settings: Any) -> Path:
    """The output of a plan on a tiny model."""
    tiny_directory(folder / "model", family, blocks=2, **settings)
    compress.run(plan_of(folder, *passes, form=form))
    return folder / "out"


def adapter_of(directory: Path) -> dict[str, Tensor]:
    return load_file(directory / "adapter" / "adapter_model.safetensors")


def config_of(directory: Path) -> dict[str, Any]:
    return dict(json.loads((directory / "adapter" / "adapter_config.json").read_text()))


def ids_of(rows: int = 3, length: int = 20) -> Tensor:
    return torch.randint(3, 60, (rows, length), generator=torch.Generator().manual_seed(1))


def logits_of(model: nn.Module, ids: Tensor) -> Tensor:
    with torch.no_grad():
        return model(input_ids=ids).logits.float()


def with_peft(directory: Path, **settings: Any) -> nn.Module:
    peft = pytest.importorskip("peft")
    base = AutoModelForCausalLM.from_pretrained(directory, **settings)
    model: nn.Module = peft.PeftModel.from_pretrained(base, directory / "adapter").eval()
    return model


def merged_by_hand(directory: Path) -> nn.Module:
    """The base with W + up · down in the place of W, in float32."""
    model: nn.Module = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    branches = adapter_of(directory)
    transposed = architecture_for(model.config.model_type).transposed
    with torch.no_grad():
        for name, up in branches.items():
            if name.endswith(".lora_B.weight"):
                module = name.removeprefix(PREFIX).removesuffix(".lora_B.weight")
                product = up.float() @ branches[name.replace("lora_B", "lora_A")].float()
                product = product.T if module.endswith(tuple(transposed)) else product
                model.get_submodule(module).weight += product
    return model


def perplexity_of(model: nn.Module, directory: Path, text: Path, window: int) -> float:
    """exp of the mean negative log-likelihood over windows that do not overlap, in float64."""
    ids, _ = eval_stream(text.read_text(), load_tokenizer(directory))
    windows = ids[: len(ids) // window * window].view(-1, window)
    logs = logits_of(model, windows)[:, :-1].double().log_softmax(-1)
    return math.exp(-float(logs.gather(-1, windows[:, 1:].unsqueeze(-1)).mean()))


# ---------------------------------------------------------------- what PEFT makes of it


@pytest.mark.parametrize("passes", ["where", "budget", "perp"])
@pytest.mark.parametrize("family", FAMILIES)
def test_peft_computes_what_we_evaluate(family: str, passes: str, tmp_path: Path) -> None:
    """Logits of the weights with their branches added, and the perplexity that `compress eval` finds."""
    steps = {
        "where": [EoRA(rank=4, where=RANKS)],
        "budget": [EoRA(rank=6, budget=1500)],
        "perp": [PERP(train=("low_rank",), rank=3, steps=3, holdout=0.0, evaluate_every=3, warmup=0)],
    }[passes]
    out = run(tmp_path, family, SparseGPT(pattern="2:4"), *steps)
    model, merged = with_peft(out), merged_by_hand(out)
    plain = AutoModelForCausalLM.from_pretrained(out).eval()
    found, wanted = logits_of(model, ids_of()), logits_of(merged, ids_of())
    size = float(wanted.abs().max())
    assert torch.allclose(found, wanted, rtol=0, atol=2e-5 * size)
    assert not torch.allclose(logits_of(plain, ids_of()), wanted, rtol=0, atol=1e-3 * size)
    ranks = {value.shape[0] for name, value in adapter_of(out).items() if "lora_A" in name}
    assert (len(ranks) > 1) == (passes != "perp")
    text = tmp_path / "text.txt"
    (line,) = evaluate(out, compress.Evaluate(perplexity=(str(text),), window=32))
    assert line.compressed.perplexity == pytest.approx(perplexity_of(model, out, text, 32), rel=1e-5)


def test_peft_knows_every_module(tmp_path: Path) -> None:
    """No branch of the file is left out, none is made anew, and none counts more or less than once."""
    out = run(tmp_path, "llama", Wanda(sparsity=0.5), EoRA(rank=4, where=RANKS, except_="*.o_proj"))
    model = with_peft(out)
    held = {name.replace(".default", ""): p for name, p in model.named_parameters() if "lora_" in name}
    assert held.keys() == adapter_of(out).keys()
    assert all(torch.equal(held[name], value) for name, value in adapter_of(out).items())
    scalings = [module.scaling["default"] for module in model.modules() if hasattr(module, "lora_A")]
    assert scalings == [1.0] * (2 * 6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_branches_have_the_dtype_of_the_model(dtype: torch.dtype, tmp_path: Path) -> None:
    out = run(tmp_path, "llama", Wanda(sparsity=0.5), EoRA(rank=4), dtype=dtype)
    assert {value.dtype for value in adapter_of(out).values()} == {dtype}
    found = logits_of(with_peft(out, dtype=torch.float32), ids_of())
    wanted = logits_of(merged_by_hand(out), ids_of())
    assert torch.allclose(found, wanted, rtol=0, atol=2e-5 * float(wanted.abs().max()))


@pytest.mark.parametrize("form", ["gptq", "compressed-tensors"])
def test_peft_on_codes(form: str, tmp_path: Path) -> None:
    """On the quantized base that transformers loads: the weights that the codes stand for, plus the branch.

    With the kernel of GPTQModel that decodes, and compressed-tensors decoded when it is loaded: PEFT asks its packed
    layers for a weight, which they do not have. Both decode to float16, the dtype of the scales.
    """
    for package in {"gptq": ("gptqmodel", "optimum"), "compressed-tensors": ("compressed_tensors",)}[form]:
        pytest.importorskip(package, reason="install the extra: pip install '.[readers]'")
    steps = [SparseGPT(pattern="2:4"), GPTQ(bits=4, group_size=32, scale_dtype="float16"), EoRA(rank=4, where=RANKS)]
    out = run(tmp_path, "llama", *steps, form=form, intermediate_size=64)
    decoded = {"gptq": GPTQConfig(bits=4, backend="gptq_torch")}.get(form, CompressedTensorsConfig(dequantize=True))
    with torch.compiler.set_stance("force_eager"):
        found = logits_of(with_peft(out, dtype=torch.float32, quantization_config=decoded), ids_of())
    branches = adapter_of(out)
    shutil.rmtree(out / "adapter")
    _, base = open_model(out)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model").eval()
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.copy_(base.read(name).half() if name.endswith("_proj.weight") else base.read(name))
        without = logits_of(model, ids_of())
        for name, up in branches.items():
            if name.endswith(".lora_B.weight"):
                linear = model.get_submodule(name.removeprefix(PREFIX).removesuffix(".lora_B.weight"))
                linear.weight += up @ branches[name.replace("lora_B", "lora_A")]
    wanted = logits_of(model, ids_of())
    size = float(wanted.abs().max())
    assert torch.allclose(found, wanted, rtol=0, atol=2e-5 * size)
    assert not torch.allclose(without, wanted, rtol=0, atol=1e-2 * size)


# ---------------------------------------------------------------- what is written


@pytest.mark.parametrize("form", ["huggingface", "gptq", "compressed-tensors"])
def test_the_lock_knows_every_byte(form: str, tmp_path: Path) -> None:
    """For fixed ranks; a budget writes at most as much."""
    tiny_directory(tmp_path / "model", "llama", blocks=2, intermediate_size=64)
    for output, branch in (("fixed", EoRA(rank=4, where=RANKS)), ("budget", EoRA(rank=6, budget=900))):
        steps = [SparseGPT(pattern="2:4"), RTN(group_size=32, scale_dtype="float16"), branch]
        plan = plan_of(tmp_path, *steps, form=form, output=output)
        report = compress.run(plan)
        promised = compile_plan(plan).output_bytes
        files = [*(tmp_path / output).rglob("*.safetensors"), *(tmp_path / output).glob("*.index.json")]
        written = sum(path.stat().st_size for path in files)
        assert report.output.bytes == written
        assert written == promised if output == "fixed" else written < promised
        count = sum(value.numel() for value in adapter_of(tmp_path / output).values())
        assert report.output.parameters == report.model.parameters + count
        if output == "budget":
            assert count <= 900


@pytest.mark.parametrize("form", ["huggingface", "gptq"])
def test_masks_and_codes_are_those_without_the_branch(
    form: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is emitted of every linear is what it was before the branch was found."""
    held: dict[str, tuple[Tensor, Tensor, Tensor]] = {}
    original = EoRA.apply

    def look(self: EoRA, linear: LinearState, moments: Moments) -> Note:
        assert linear.mask is not None
        assert linear.grid is not None
        held[linear.name] = linear.mask.clone(), linear.grid.codes.clone(), linear.weight.clone()
        return original(self, linear, moments)

    monkeypatch.setattr(EoRA, "apply", look)
    steps = [SparseGPT(pattern="2:4"), GPTQ(bits=4, group_size=32, scale_dtype="float16"), EoRA(rank=4)]
    out = run(tmp_path, "llama", *steps, form=form, intermediate_size=64)
    shutil.rmtree(out / "adapter")
    _, base = open_model(out)
    assert len(held) == 14
    masks = load_file(out / "masks.safetensors") if form == "gptq" else {}
    for name, (mask, codes, weight) in held.items():
        found = base.read(f"{name}.weight").float()
        assert torch.equal(found, weight), name
        assert not found[~mask].any()
        if form == "gptq":
            packed = load_file(out / "model.safetensors")[f"{name}.qweight"]  # eight codes in 32 bits, along the inputs
            every = torch.stack([(packed >> (4 * place)) & 15 for place in range(8)], dim=1).flatten(0, 1).T
            assert torch.equal(every.to(torch.uint8), codes)
            bits = torch.stack([(masks[f"{name}.mask"] >> place) & 1 for place in range(8)], dim=-1).flatten(1)
            assert torch.equal(bits.bool(), mask)


def test_the_same_with_and_without(tmp_path: Path) -> None:
    """After a sweep of its own nothing but the branch is new: the weights are the same bytes."""
    tiny_directory(tmp_path / "model", "llama", blocks=2)
    settle = PERP(train=("norms",), steps=1, learning_rate=1e-30, holdout=0.0, evaluate_every=1)
    for output, more in (("with", [EoRA(rank=4)]), ("without", [])):
        compress.run(plan_of(tmp_path, SparseGPT(pattern="2:4"), settle, *more, output=output))
    assert (tmp_path / "with" / "adapter").is_dir()
    assert not (tmp_path / "without" / "adapter").exists()
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("with", "without")]
    assert weights[0] == weights[1]


# ---------------------------------------------------------------- what is damaged

UP = f"{PREFIX}model.layers.0.self_attn.q_proj.lora_B.weight"
DOWN = UP.replace("lora_B", "lora_A")


@pytest.fixture(scope="module")
def emitted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("adapter")
    run(folder, "llama", Wanda(sparsity=0.5), EoRA(rank=4, where=(Where(match="*.down_proj", rank=2),)))
    return folder


@pytest.fixture
def damaged(emitted: Path, tmp_path: Path) -> Path:
    shutil.copytree(emitted / "out", tmp_path / "out")
    return tmp_path / "out"


def reshaped(name: str, *shape: int) -> Callable[[dict[str, Tensor]], None]:
    def change(tensors: dict[str, Tensor]) -> None:
        tensors[name] = torch.zeros(shape)

    return change


def removed(name: str) -> Callable[[dict[str, Tensor]], None]:
    def change(tensors: dict[str, Tensor]) -> None:
        del tensors[name]

    return change


def renamed(module: str) -> Callable[[dict[str, Tensor]], None]:
    def change(tensors: dict[str, Tensor]) -> None:
        for name in (UP, DOWN):
            tensors[name.replace("model.layers.0.self_attn.q_proj", module)] = tensors.pop(name)

    return change


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (reshaped(UP, 31, 4), "self_attn.q_proj"),
        (reshaped(DOWN, 4, 33), "self_attn.q_proj"),
        (reshaped(UP, 32, 3), "self_attn.q_proj"),
        (reshaped(DOWN, 128), "self_attn.q_proj"),
        (reshaped(UP, 32, 4, 1), "self_attn.q_proj"),
        (removed(UP), "self_attn.q_proj"),
        (removed(DOWN), "self_attn.q_proj"),
        (renamed("model.layers.7.self_attn.q_proj"), "target_modules"),
        (lambda tensors: tensors.update({f"{PREFIX}model.norm.bias": torch.zeros(3)}), "model.norm.bias"),
        (lambda tensors: tensors.update({DOWN: torch.zeros(4, 32, dtype=torch.int32)}), "self_attn.q_proj"),
    ],
)
def test_damaged_tensors(damaged: Path, change: Any, says: str) -> None:
    """Found when the directory is opened: before hours of work, and without a traceback."""
    path = damaged / "adapter" / "adapter_model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)
    with pytest.raises(ModelError) as caught:
        open_model(damaged)
    assert says in str(caught.value)
    assert str(damaged / "adapter") in (caught.value.where or "")
    assert caught.value.fix


@pytest.mark.parametrize(
    ("module", "says"),
    [
        ("model.layers.7.self_attn.q_proj", "model.layers.7.self_attn.q_proj, which the model lacks"),
        ("lm_head", "lm_head, which the model lacks"),  # it is tied: there is no such tensor
        ("model.norm", "model.norm is for [32, 32], the model has [32]"),
        ("model.layers.0.mlp.up_proj.weight", "which the model lacks"),
        ("model.embed_tokens", "model.embed_tokens is for [32, 32], the model has [64, 32]"),
    ],
)
def test_modules_that_have_no_branch(damaged: Path, module: str, says: str) -> None:
    """Tensors and configuration agree, but not with the model."""
    path = damaged / "adapter" / "adapter_model.safetensors"
    tensors = load_file(path)
    renamed(module)(tensors)
    save_file(tensors, path)
    config = config_of(damaged)
    others = [name for name in config["target_modules"] if name != "model.layers.0.self_attn.q_proj"]
    changed = config | {"target_modules": sorted([*others, module])}
    (damaged / "adapter" / "adapter_config.json").write_text(json.dumps(changed))
    with pytest.raises(ModelError) as caught:
        open_model(damaged)
    assert says in str(caught.value)


@pytest.mark.parametrize(
    "change",
    [
        {"lora_alpha": 8},
        {"alpha_pattern": {}},
        {"rank_pattern": {}},
        {"r": 5, "lora_alpha": 5},
        {"use_dora": True},
        {"use_rslora": True},
        {"peft_type": "LOHA"},
        {"peft_type": None},
        {"target_modules": 5},
        {"target_modules": [["a"]]},
        {"target_modules": "all-linear"},
        {"rank_pattern": [1]},
        {"alpha_pattern": "x"},
        {"lora_alpha": "4"},
        {"bias": "all"},
        {"modules_to_save": ["lm_head"]},
        {"layers_to_transform": [0]},
    ],
)
def test_other_configurations(damaged: Path, change: dict[str, Any]) -> None:
    """What PEFT would compute otherwise, and what it would not understand."""
    path = damaged / "adapter" / "adapter_config.json"
    path.write_text(json.dumps(config_of(damaged) | change))
    with pytest.raises(ModelError) as caught:
        open_model(damaged)
    assert next(iter(change)) in str(caught.value)
    assert caught.value.where == str(path)
    assert caught.value.fix


def test_files_that_are_gone_or_cut(damaged: Path) -> None:
    path = damaged / "adapter" / "adapter_model.safetensors"
    data = path.read_bytes()
    path.write_bytes(data[:-10])
    with pytest.raises(ModelError, match="truncated"):
        open_model(damaged)
    path.unlink()
    with pytest.raises(ModelError):
        open_model(damaged)
    path.write_bytes(data)
    config = damaged / "adapter" / "adapter_config.json"
    config.write_text("{")
    with pytest.raises(ModelError, match="JSON"):
        open_model(damaged)
    config.unlink()
    with pytest.raises(ModelError, match=r"adapter_config\.json"):
        open_model(damaged)  # branches that nobody reads would be left out of what is measured


def test_it_is_read_as_it_was_written(emitted: Path) -> None:
    """Sums in float32, of linears with a branch; all else as stored."""
    _, ours = open_model(emitted / "out")
    merged = dict(merged_by_hand(emitted / "out").named_parameters())
    plain = load_file(emitted / "out" / "model.safetensors")
    for name, value in plain.items():
        assert torch.allclose(ours.read(name), merged[name], rtol=1e-6, atol=1e-6)
        assert torch.equal(ours.read(name), value) != name.endswith("_proj.weight")
