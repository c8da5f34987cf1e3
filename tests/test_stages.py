"""Plans in stages: what comes behind structured pruning sees a smaller model, as a plan of its own would."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import compress
from compress.barrier import WholeModel
from compress.checking import check_plan, explain
from compress.errors import PlanError
from compress.export.reader import open_model
from tests.conftest import same_bits, tiny_directory

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor, nn

HEAD = """\
[model]
path = "model"
[calibration]
source = "text.txt"
samples = 6
length = 16
[run]
output = "out"
"""
WIDTH = '[[pass]]\nuse = "width"\nchannels = 0.5\nmultiple = 8\n'
NARROWER = '[[pass]]\nuse = "width"\nheads = 0.5\nhidden = 0.25\nmultiple = 8\n'
SPARSE = '[[pass]]\nuse = "sparsegpt"\npattern = "2:4"\n'
GPTQ = '[[pass]]\nuse = "gptq"\ngroup_size = 8\nscale_dtype = "float16"\n'
EORA = '[[pass]]\nuse = "eora"\nrank = 2\n'
PERP = '[[pass]]\nuse = "perp"\nsteps = 4\n'
REST = SPARSE + GPTQ + EORA


def write(folder: Path, passes: str, *, output: str = "out", model: str = "model") -> None:
    text = HEAD.replace('"out"', f'"{output}"').replace('"model"', f'"{model}"')
    (folder / "plan.toml").write_text(text + passes)


def run(folder: Path, **options: Any) -> Any:
    return compress.run(compress.load_plan(folder / "plan.toml"), **options)


def emitted(folder: Path) -> dict[str, bytes]:
    """What a model directory holds, but for what tells of its plan."""
    told = ("plan.toml", "lock.json", "README.md", "report.json", "report.html")
    paths = [path for path in sorted(folder.rglob("*")) if path.is_file() and path.name not in told]
    return {str(path.relative_to(folder)): path.read_bytes() for path in paths}


def left_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


# ---------------------------------------------------------------- composition


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_later_passes_do_what_a_plan_of_their_own_would(family: str, tmp_path: Path) -> None:
    """Statistics, masks, codes and branches are those of the smaller model, bit for bit."""
    tiny_directory(tmp_path / "model", family, blocks=2)
    second = NARROWER if family == "llama" else '[[pass]]\nuse = "width"\nhidden = 0.25\nmultiple = 8\n'
    write(tmp_path, WIDTH + second + REST)
    report = run(tmp_path)
    for number, passes in enumerate((WIDTH, second, REST)):
        write(tmp_path, passes, output=f"hand{number}/out", model=f"hand{number - 1}/out" if number else "model")
        alone = run(tmp_path)
    assert emitted(tmp_path / "out") == emitted(tmp_path / "hand2" / "out")
    assert "adapter/adapter_model.safetensors" in emitted(tmp_path / "out")
    assert left_in(tmp_path) == ["hand0", "hand1", "hand2", "model", "out", "plan.toml", "text.txt"]
    # The report tells of all stages, in order, and of the plan's model.
    assert [one.use for one in report.passes] == ["width", "width", "sparsegpt", "gptq", "eora"]
    assert [one.sweep for one in report.linears] == sorted(one.sweep for one in report.linears)
    assert {one.sweep for one in report.linears} == {0, 1, 2}
    assert report.output.parameters == alone.output.parameters < report.model.parameters
    assert report.model.bytes == (tmp_path / "model" / "model.safetensors").stat().st_size


def test_every_format_holds_the_same_smaller_model(tmp_path: Path) -> None:
    tiny_directory(tmp_path / "model", "llama", blocks=2, intermediate_size=128)
    weights: dict[str, dict[str, Tensor]] = {}
    for form in ("huggingface", "packed", "gptq", "compressed-tensors"):
        passes = (WIDTH + REST).replace("group_size = 8", "group_size = 32")
        write(tmp_path, passes + f'[[export]]\nformat = "{form}"\n', output=form)
        found = check_plan(compress.load_plan(tmp_path / "plan.toml"))
        run(tmp_path)
        files = ("*.safetensors", "*.safetensors.index.json")
        written = [path for one in files for path in (tmp_path / form).rglob(one)]
        assert sum(path.stat().st_size for path in written) == found["output_bytes"]
        config, checkpoint = open_model(tmp_path / form)
        assert config.intermediate_size == 64
        weights[form] = {name: checkpoint.read(name) for name in checkpoint.tensors}
    for form in ("packed", "gptq", "compressed-tensors"):
        assert weights[form].keys() == weights["huggingface"].keys()
        for name, tensor in weights[form].items():
            torch.testing.assert_close(tensor, weights["huggingface"][name], rtol=0, atol=0)
    ids = torch.arange(16).view(1, 16)
    packed = compress.load(tmp_path / "packed", device="cpu")
    stock = AutoModelForCausalLM.from_config(open_model(tmp_path / "packed")[0]).eval()
    assert stock.load_state_dict(weights["packed"], strict=False).unexpected_keys == []
    torch.testing.assert_close(packed(ids).logits, stock(ids).logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("passes", [WIDTH, NARROWER], ids=["channels", "hidden"])
def test_distillation_looks_up_to_the_model_of_the_plan(
    passes: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    teachers: list[dict[str, Tensor]] = []
    original = WholeModel.dense

    def dense(self: WholeModel) -> nn.Module:
        model = original(self)
        teachers.append({name: value.clone() for name, value in model.state_dict().items()})
        return model

    monkeypatch.setattr(WholeModel, "dense", dense)
    write(folder, passes + PERP + 'train = ["weights"]\nholdout = 0.0\nlearning_rate = 1e-4\ndistill = 1.0\n')
    run(folder)
    (teacher,) = teachers
    for name, tensor in load_file(folder / "model" / "model.safetensors").items():
        assert same_bits(teacher[name], tensor), name
    smaller = load_file(folder / "out" / "model.safetensors")
    assert smaller["model.layers.0.mlp.up_proj.weight"].shape == ((24, 32) if passes == WIDTH else (48, 24))
    write(folder, passes, output="untrained")
    run(folder)
    before = load_file(folder / "untrained" / "model.safetensors")
    changed = {name for name in before if not torch.equal(before[name], smaller[name])}
    assert changed == {name for name in before if "proj" in name}


def test_training_before_the_width_goes_into_it(folder: Path) -> None:
    train = PERP + 'train = ["norms"]\nholdout = 0.0\nlearning_rate = 1e-2\n'
    write(folder, train + WIDTH)
    run(folder)
    write(folder, train, output="trained")
    run(folder)
    write(folder, WIDTH, output="by-hand", model="trained")
    run(folder)
    norm = "model.layers.0.input_layernorm.weight"
    found, model = (load_file(folder / name / "model.safetensors")[norm] for name in ("out", "model"))
    assert torch.equal(found, load_file(folder / "by-hand" / "model.safetensors")[norm])
    assert not torch.equal(found, model)


def test_sets_of_scales_belong_to_the_last_stage(folder: Path) -> None:
    quantizing = GPTQ.replace("group_size = 8", "group_size = -1")
    sets = "".join(f'[[pass]]\nuse = "peqa"\nsteps = 2\nname = "{name}"\n' for name in ("one", "two"))
    train = PERP + 'train = ["norms"]\n'  # a barrier of the first stage begins with no set
    write(folder, train + WIDTH + quantizing + sets + '[[export]]\nformat = "gptq"\n')
    run(folder)
    assert left_in(folder / "out" / "scales") == ["one.safetensors", "two.safetensors"]
    scales = load_file(folder / "out" / "scales" / "one.safetensors")
    assert scales["model.layers.0.mlp.down_proj.scale"].shape == (32, 1)
    codes = load_file(folder / "out" / "model.safetensors")["model.layers.0.mlp.down_proj.qweight"]
    assert codes.shape == (24 * 4 // 32, 32)  # eight codes of 4 bits to an int32


def test_weights_alone_need_no_text(folder: Path) -> None:
    text = HEAD.replace('[calibration]\nsource = "text.txt"\nsamples = 6\nlength = 16\n', "")
    (folder / "plan.toml").write_text(text + WIDTH + 'score = "magnitude"\n')
    (folder / "text.txt").unlink()
    run(folder)
    assert load_file(folder / "out" / "model.safetensors")["model.layers.1.mlp.down_proj.weight"].shape == (32, 24)


def test_what_the_model_does_not_know_is_copied_and_not_counted(folder: Path) -> None:
    path = folder / "model" / "model.safetensors"
    tensors = load_file(path) | {"model.unknown": torch.arange(5.0)}
    save_file(tensors, path, metadata={"format": "pt"})
    write(folder, WIDTH)
    report = run(folder)
    smaller = load_file(folder / "out" / "model.safetensors")
    assert torch.equal(smaller.pop("model.unknown"), torch.arange(5.0))
    assert report.output.parameters == sum(tensor.numel() for tensor in smaller.values())


def test_what_check_and_explain_say_of_stages(folder: Path) -> None:
    write(folder, WIDTH + '[[pass]]\nuse = "depth"\nblocks = 1\n' + GPTQ)
    plan = compress.load_plan(folder / "plan.toml")
    found = check_plan(plan)
    assert [one["left"] for one in found["passes"]] == [
        {"heads": 2, "channels": 24, "hidden": 32, "blocks": 2},
        {"heads": 2, "channels": 24, "hidden": 32, "blocks": 1},
        None,
    ]
    assert [one["linears"] for one in found["passes"]] == [2, 14, 7]
    assert [one["sweep"] for one in found["passes"]] == [0, 1, 2]
    assert found["model"]["blocks"] == 2
    lock = compress.compiling.compile_plan(plan)
    first, second = (explain(lock, f"model.layers.{block}.mlp.down_proj") for block in (0, 1))
    assert (first["shape"], second["shape"]) == ([32, 24], [32, 24])
    assert "settings" in first["passes"][2]
    assert second["passes"][2]["skipped"] == "the smaller model has no layer of this name"
    skipped = explain(lock, "model.layers.0.mlp.up_proj")["passes"][0]["skipped"]
    assert skipped == "it works on other linears of the block"
    with pytest.raises(PlanError, match=r'no linear "model.layers.2.mlp.up_proj"; did you mean'):
        explain(lock, "model.layers.2.mlp.up_proj")


# ---------------------------------------------------------------- what is refused


AFTER = {"mask": SPARSE, "grid": GPTQ, "low-rank branch": EORA}


@pytest.mark.parametrize("broken", AFTER)
@pytest.mark.parametrize("match", ["*.q_proj", "*.gate_proj", "*.down_proj"])
def test_width_comes_before_masks_grids_and_branches(broken: str, match: str, folder: Path) -> None:
    """On whatever linear they are: all are cut, whether or not the pass reads them."""
    write(folder, f'{AFTER[broken]}match = "{match}"\n{WIDTH}')
    with pytest.raises(PlanError) as failure:
        run(folder)
    message = str(failure.value)
    assert f"width would break the {broken} that pass[0]" in message
    assert "rule 2: structured pruning comes before any mask or grid" in message
    line = next(n for n, text in enumerate((folder / "plan.toml").read_text().splitlines(), 1) if '"width"' in text)
    assert f"plan.toml:{line - 1}: pass[1]" in message
    assert "fix: move it before" in message


USUAL = "channels = 0.5\nmultiple = 8\n"
NARROW = "hidden = 0.25\nmultiple = 8\n"
TIES = "ties the number of heads to the hidden size"
# What is wrong, where and how the message says so, and settings that follow its advice.
BAD = {
    "no head": ("llama", "heads = 0.9", ":12: pass[0].heads: heads = 0.9 of 2 leaves 0", "heads = 0.5"),
    "every head": ("llama", "heads = 0.1", ":12: pass[0].heads: heads = 0.1 removes none of 2", "heads = 0.5"),
    "no channel": (
        "llama",
        "multiple = 8\nchannels = 0.99",
        ":13: pass[0].channels: channels = 0.99 of 48 leaves 0 in multiples of 8",
        "multiple = 8\nchannels = 0.833333",
    ),
    "all channels": ("llama", "channels = 1.0", ":12: pass[0].channels: Input should be less than 1", USUAL),
    "multiple": ("llama", "channels = 0.5", ":12: pass[0].channels: channels = 0.5 of 48 leaves 0 in multiples", USUAL),
    "hidden": ("llama", "hidden = 0.01\nmultiple = 8", ":12: pass[0].hidden: hidden = 0.01 removes none", NARROW),
    "hidden in heads": ("gpt2", "hidden = 0.1\nmultiple = 1", "removes none of 32 in multiples of 8", NARROW),
    "heads of opt": ("opt", "heads = 0.5", f":12: pass[0].heads: opt {TIES}", NARROW),
    "heads of gpt2": ("gpt2", "heads = 0.5", f":12: pass[0].heads: gpt2 {TIES}", NARROW),
    "heads of gpt_neox": ("gpt_neox", "heads = 0.5", f":12: pass[0].heads: gpt_neox {TIES}", NARROW),
    "nothing": ("llama", "", ":9: pass[0]: nothing is to be removed", USUAL),
    "match": (
        "llama",
        f'{USUAL}match = "*.down_proj"',
        ":14: pass[0].match: width prunes the whole model by one setting",
        USUAL,
    ),
    "except": (
        "llama",
        f'{USUAL}except = "*.0.*"',
        ":14: pass[0].except: width prunes the whole model by one setting",
        USUAL,
    ),
    "where": (
        "llama",
        f'{USUAL}[[pass.where]]\nmatch = "*.down_proj"\nchannels = 0.25',
        ":14: pass[0].where: width prunes the whole model by one setting",
        USUAL,
    ),
    "obs": ("llama", f"{USUAL}update = false", ":14: pass[0].update: obs is a score of the updated weights", USUAL),
    "format": (
        "llama",
        f'{USUAL}[[export]]\nformat = "gptq"',
        ":15: export[0].format: structured pruning at the end leaves plain weights",
        USUAL,
    ),
    "groups of the smaller model": (  # 16 divides 48, but not the 24 that are left
        "llama",
        USUAL + GPTQ.replace("group_size = 8", "group_size = 16"),
        ":14: pass[1]: model.layers.0.mlp.down_proj: group_size 16 does not divide the input width 24",
        USUAL + GPTQ,
    ),
    "states": (
        "llama",
        NARROW + PERP + "hidden = 1.0",
        ":17: pass[1].hidden: the dense model has 2 blocks and a hidden width of 32",
        NARROW + PERP + "distill = 1.0",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_what_cannot_be_is_refused_with_a_fix_that_works(case: str, tmp_path: Path) -> None:
    family, wrong, problem, right = BAD[case]
    tiny_directory(tmp_path / "model", family, blocks=2)
    write(tmp_path, f'[[pass]]\nuse = "width"\nscore = "obs"\n{wrong}\n')
    for action in (run, lambda folder: check_plan(compress.load_plan(folder / "plan.toml"))):
        with pytest.raises(PlanError) as failure:
            action(tmp_path)
        assert problem in str(failure.value)
        assert "\nfix: " in str(failure.value)
    assert left_in(tmp_path) == ["model", "plan.toml", "text.txt"]
    write(tmp_path, f'[[pass]]\nuse = "width"\nscore = "obs"\n{right}\n')
    check_plan(compress.load_plan(tmp_path / "plan.toml"))
