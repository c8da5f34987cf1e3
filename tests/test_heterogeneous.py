"""Blocks of different widths: ranked over the whole model, loaded by compress, taken by nobody for another model."""

from __future__ import annotations

import itertools
import json
import math
import pickle
import subprocess
import sys
from typing import TYPE_CHECKING, Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import compress
import compress.heterogeneous
from compress.architecture import architecture_for
from compress.checking import check_plan, explain
from compress.compiling import compile_plan
from compress.errors import ModelError, PlanError
from compress.export.reader import open_model
from compress.hub import load_config
from compress.passes.base import SettingError
from compress.passes.structured import example
from compress.plan import load_plan
from compress.spread import shares, spread
from compress.structure import Sizes
from compress.sweep import Sweep
from compress.training_store import TrainingStore
from tests.conftest import ROOT, files_of, tiny_directory
from tests.models import FAMILIES, GROUPED, tiny_model
from tests.test_architectures import every_case, logits, matrix
from tests.test_resume import Interrupted
from tests.test_structure import carried_out, found_in, weight_bytes

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor
    from transformers import PreTrainedModel

CHANNELS = '[[pass]]\nuse = "width"\nscore = "wanda"\nchannels = 0.25\nmultiple = 8\nheterogeneous = true\n'
LORAPRUNE = """\
[[pass]]
use = "loraprune"
channels = 0.25
heads = 0.25
multiple = 8
heterogeneous = true
rank = 4
steps = 12
prune_every = 2
evaluate_every = 4
batch_size = 4
learning_rate = 1e-5
"""
SPARSE = '[[pass]]\nuse = "sparsegpt"\npattern = "2:4"\n'
REST = SPARSE + '[[pass]]\nuse = "gptq"\ngroup_size = 8\n[[pass]]\nuse = "eora"\nrank = 2\n'


def opened(directory: Path) -> PreTrainedModel:
    """By transformers, which compress has told of these models, in float64; every tensor finds its place."""
    model, info = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float64, output_loading_info=True)
    assert not any(info.values()), info
    return model.eval()


def masked(model: PreTrainedModel, small: PreTrainedModel) -> tuple[PreTrainedModel, dict[str, list[int]]]:
    """The original with what the smaller one lacks switched off, and how many units each block has left."""
    architecture = architecture_for(model.config.model_type)
    left: dict[str, list[int]] = {width.name: [] for width in architecture.widths}
    blocks = zip(model.get_submodule(architecture.blocks), small.get_submodule(architecture.blocks), strict=True)
    for block, smaller in blocks:
        for width in architecture.widths:
            (reader,) = width.columns
            new, old = (matrix(one, architecture, reader) for one in (smaller, block))
            columns, scales = found_in(new, old)
            torch.testing.assert_close(scales, torch.ones_like(scales))
            left[width.name].append(len(columns) * width.count(model.config) // old.shape[1])
            out = torch.ones(old.shape[1], dtype=torch.bool)
            out[columns] = False
            block.get_submodule(reader).register_forward_pre_hook(
                lambda _, args, out=out: (args[0].masked_fill(out, 0.0),)
            )
    return model, left


def shrink(folder: Path, block: int, share: float = 0.5) -> None:
    """Make a share of the channels of one block matter next to nothing; llama."""
    path = folder / "model" / "model.safetensors"
    tensors = load_file(path)
    weight = tensors[f"model.layers.{block}.mlp.up_proj.weight"]
    weight[: int(share * len(weight))] *= 1e-3
    save_file(tensors, path, metadata={"format": "pt"})


# ------------------------------------------------------------------- spreading


def best_sum(scores: list[Tensor], total: int, step: int) -> float:
    """The largest sum of kept scores of all ways to spread, by trying them."""
    ranges = [range(step, len(own) + 1, step) for own in scores]
    ways = [way for way in itertools.product(*ranges) if sum(way) == total]
    return max(
        sum(float(own.sort(descending=True).values[:n].sum()) for own, n in zip(scores, way, strict=True))
        for way in ways
    )


@pytest.mark.parametrize("step", [1, 2, 3])
@pytest.mark.parametrize("seed", range(4))
def test_no_other_spread_keeps_more(step: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    scores = [torch.randn(n, generator=generator, dtype=torch.float64) for n in (6, 9, 7)]
    whole = sum(len(own) // step for own in scores)
    for groups in range(len(scores), whole + 1):
        found = spread(scores, groups * step, step)
        assert sum(found) == groups * step
        assert all(n >= step and n % step == 0 for n in found)
        kept = sum(float(own.sort(descending=True).values[:n].sum()) for own, n in zip(scores, found, strict=True))
        assert kept == pytest.approx(best_sum(scores, groups * step, step), abs=1e-9)


def test_scores_of_a_block_compare_whatever_their_scale() -> None:
    scores = torch.tensor([1.0, 2.0, 3.0, 6.0])
    assert shares(scores).tolist() == [1 / 12, 2 / 12, 3 / 12, 6 / 12]
    torch.testing.assert_close(shares(1e6 * scores), shares(scores))
    assert shares(torch.zeros(3)).tolist() == [0.0, 0.0, 0.0]


def test_what_check_assumes_is_possible_and_has_the_extremes() -> None:
    for blocks, size, multiple, fraction in itertools.product((1, 2, 5), (12, 13, 16), (1, 4), (0.1, 0.3, 0.6, 0.75)):
        try:
            found = example("channels", fraction, size, blocks, multiple)
        except SettingError:
            total = math.floor(blocks * size * (1 - fraction) / multiple + 0.5)  # multiples: too few, too many, or all
            assert not blocks <= total <= blocks * (size // multiple) or total * multiple == blocks * size
            continue
        widths = (found,) * blocks if isinstance(found, int) else found
        assert len(widths) == blocks
        assert all(multiple <= width <= size and width % multiple == 0 for width in widths)
        assert abs(sum(widths) - blocks * size * (1 - fraction)) <= multiple / 2 + 1e-9
        most = size // multiple * multiple
        assert min(widths) == max(multiple, sum(widths) - (blocks - 1) * most)
        assert max(widths) >= min(most, sum(widths) - (blocks - 1) * multiple) - multiple  # one has more than the least
    found = example("channels", 0.3, 576, 5, 64)  # 2016 in all: the larger of two as near
    assert not isinstance(found, int)
    assert sum(found) == 2048


# ------------------------------------------------------------------- the model


@every_case
def test_the_smaller_model_is_the_masked_one(family: str, settings: dict[str, Any], tmp_path: Path) -> None:
    tiny_directory(tmp_path / "model", family, blocks=3, **settings)
    heads = "heads = 0.34" if family in GROUPED else ""
    lock, report = carried_out(tmp_path, CHANNELS + heads)
    small, model = opened(tmp_path / "out"), AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype="float64")
    before = Sizes.of(lock.architecture, lock.config)
    off, left = masked(model.eval(), small)
    torch.testing.assert_close(logits(small), logits(off), rtol=1e-5, atol=1e-5)

    assert lock.left is not None
    assert isinstance(before.channels, int)
    assert isinstance(before.heads, int)
    assert sum(left["channels"]) == lock.left.total("channels") == 8 * round(3 * before.channels * 0.75 / 8)
    assert sum(left["heads"]) == lock.left.total("heads")
    assert lock.left.total("heads") == (round(3 * before.heads * 0.66) if heads else 3 * before.heads)
    assert all(n % 8 == 0 and n > 0 for n in left["channels"])
    blocks = [small.config.per_layer_config[block] for block in range(3)]
    assert [[width.count(one) for one in blocks] for width in lock.architecture.widths] == [
        left[width.name] for width in lock.architecture.widths
    ]
    # What the lock counted before the run is what is there.
    assert report.output.parameters == sum(p.numel() for p in small.parameters())
    assert report.output.parameters == sum(math.prod(slot.shape) for shard in lock.shards for slot in shard.slots)
    assert report.output.heterogeneous
    assert abs(weight_bytes(tmp_path / "out") - lock.output_bytes) < 200  # digits in a header


@pytest.mark.parametrize("family", FAMILIES)
def test_keeping_everything_is_the_identity(family: str, tmp_path: Path) -> None:
    """The second class, whose blocks are built one by one, computes what the family's own does; and generates."""
    model = tiny_model(family, tied=True, gqa=True, blocks=3)
    model.save_pretrained(tmp_path)
    raw = json.loads((tmp_path / "config.json").read_text())
    width = next(one for one in architecture_for(family).widths if one.name == "channels")
    layers = {"1": {width.units: width.count(model.config)}}
    (tmp_path / "config.json").write_text(
        json.dumps(raw | {"model_type": f"heterogeneous_{family}", "per_layer_config": layers})
    )
    same = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(same).__name__ == f"Heterogeneous{type(model).__name__}"
    ids = torch.arange(24).view(2, 12) + 3
    with torch.no_grad():
        assert torch.equal(same(ids).logits, model(ids).logits)
        assert torch.equal(compress.load(tmp_path, device="cpu")(ids).logits, model(ids).logits)
        options = {"max_new_tokens": 4, "do_sample": False}
        assert torch.equal(same.generate(ids, **options), model.generate(ids, **options))


def test_what_matters_little_goes_wherever_it_is(tmp_path: Path) -> None:
    tiny_directory(tmp_path / "model", "llama", blocks=3)
    shrink(tmp_path, block=1)
    carried_out(tmp_path, CHANNELS)
    _, left = masked(
        AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype="float64"), opened(tmp_path / "out")
    )
    assert left["channels"][1] < min(left["channels"][0], left["channels"][2])
    assert left["heads"] == [2, 2, 2] or left["heads"] == [4, 4, 4]


@pytest.mark.parametrize("score", ["obs", "flap", "magnitude", "random"])
def test_every_score_spreads_and_meets_the_total(score: str, tmp_path: Path) -> None:
    tiny_directory(tmp_path / "model", "llama", blocks=3)
    shrink(tmp_path, block=2)
    _, report = carried_out(tmp_path, CHANNELS.replace("wanda", score))
    config, _ = open_model(tmp_path / "out")
    widths = [config.per_layer_config[block].intermediate_size for block in range(3)]
    assert sum(widths) == 3 * 48 * 3 // 4 + 4  # 108 lies between 104 and 112: the larger
    assert len(report.linears) == len({line.linear for line in report.linears})  # the first look leaves no lines
    assert score == "random" or widths[2] == min(widths)


def test_saved_again_it_is_the_same_model(tmp_path: Path) -> None:
    tiny_directory(tmp_path / "model", "llama", blocks=3)
    carried_out(tmp_path, CHANNELS + "heads = 0.34\n")
    model = compress.load(tmp_path / "out", device="cpu")
    model.save_pretrained(tmp_path / "again")
    assert AutoTokenizer.from_pretrained(tmp_path / "out")("a b").input_ids
    again, ids = compress.load(tmp_path / "again", device="cpu"), torch.arange(12).view(1, 12)
    assert torch.equal(again(ids).logits, model(ids).logits)


def test_it_pickles(tmp_path: Path) -> None:
    """As other models do, and into a process that has made no such class yet."""
    tiny_directory(tmp_path / "model", "llama", blocks=3)
    carried_out(tmp_path, CHANNELS)
    model, ids = compress.load(tmp_path / "out", device="cpu"), torch.arange(12).view(1, 12)
    written = pickle.dumps((model, model.config))
    again, config = pickle.loads(written)
    assert type(again) is type(model)
    assert config.to_dict() == model.config.to_dict()
    assert torch.equal(again(ids).logits, model(ids).logits)
    (tmp_path / "pickled").write_bytes(written)
    read = f"import pickle; print(type(pickle.load(open({str(tmp_path / 'pickled')!r}, 'rb'))[0]).__name__)"
    done = subprocess.run([sys.executable, "-c", read], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "HeterogeneousLlamaForCausalLM", done.stderr
    with pytest.raises(AttributeError, match="no attribute 'HeterogeneousBert'"):
        _ = compress.heterogeneous.HeterogeneousBert


def test_without_compress_nobody_takes_it_for_another_model(tmp_path: Path) -> None:
    tiny_directory(tmp_path / "model", "llama", blocks=3)
    carried_out(tmp_path, CHANNELS)
    first, then = "from transformers import AutoModelForCausalLM as M", f"M.from_pretrained({str(tmp_path / 'out')!r})"

    def read(*lines: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run([sys.executable, "-c", "; ".join(lines)], capture_output=True, text=True, check=False)

    alone = read(first, then)
    assert alone.returncode
    assert "model type `heterogeneous_llama`" in alone.stderr
    for lines in (("import compress", first, then), (first, "import compress", then)):
        told = read(*lines)
        assert told.returncode == 0, told.stderr


# ------------------------------------------------------------------- loraprune


@pytest.mark.parametrize(("family", "gqa"), [("llama", True), ("phi3", False), ("gpt2", False)])
def test_loraprune_ranks_all_blocks_together(family: str, gqa: bool, tmp_path: Path) -> None:
    """Not refitted, and at a learning rate of next to nothing, weights stay, and the masked original is the oracle."""
    tiny_directory(tmp_path / "model", family, blocks=3, gqa=gqa, tied=False)
    passes = LORAPRUNE if family in GROUPED else LORAPRUNE.replace("heads = 0.25\n", "")
    lock, report = carried_out(tmp_path, passes.replace("1e-5", "1e-30") + "update = false\n")
    small, model = opened(tmp_path / "out"), AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype="float64")
    off, left = masked_nearly(model.eval(), small)
    torch.testing.assert_close(logits(small), logits(off), rtol=1e-4, atol=1e-4)
    assert lock.left is not None
    for name, widths in left.items():
        assert sum(widths) == lock.left.total(name)
    assert all(n % 8 == 0 and n > 0 for n in left["channels"])
    assert report.output.parameters == sum(p.numel() for p in small.parameters())
    assert report.output.parameters == sum(math.prod(slot.shape) for shard in lock.shards for slot in shard.slots)


def test_a_stopped_training_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """At a look when some units of some blocks are masked."""
    tiny_directory(tmp_path / "model", "llama", blocks=3)
    passes = LORAPRUNE.replace("evaluate_every = 4", "evaluate_every = 2\nend = 0.9")
    carried_out(tmp_path, passes)
    (tmp_path / "out").rename(tmp_path / "reference")
    original = TrainingStore.save

    def save(self: TrainingStore, tensors: dict[str, Tensor], numbers: dict[str, float]) -> None:
        original(self, tensors, numbers)
        if numbers["step"] == 6:
            alive = [int(one.sum()) for name, one in tensors.items() if name.endswith("channels:alive")]
            assert 3 * 48 > sum(alive) > 112
            raise Interrupted

    with monkeypatch.context() as patch:
        patch.setattr(TrainingStore, "save", save)
        with pytest.raises(Interrupted):
            compress.run(load_plan(tmp_path / "plan.toml"))
    assert compress.run(load_plan(tmp_path / "plan.toml")).resumed == 1
    assert files_of(tmp_path / "out") == files_of(tmp_path / "reference")


def masked_nearly(model: PreTrainedModel, small: PreTrainedModel) -> tuple[PreTrainedModel, dict[str, list[int]]]:
    """`masked`, of weights that merging has rounded: the columns are those that come nearest."""
    architecture = architecture_for(model.config.model_type)
    blocks = zip(model.get_submodule(architecture.blocks), small.get_submodule(architecture.blocks), strict=True)
    for block, smaller in blocks:
        for width in architecture.widths:
            new, old = (matrix(one, architecture, width.columns[0]) for one in (smaller, block))
            distance, index = torch.cdist(new.T, old.T).min(1)
            assert float(distance.max()) < 1e-5
            with torch.no_grad():
                new.copy_(old[:, index])
    return masked(model, small)


# ------------------------------------------------------------------- with others


@pytest.mark.parametrize("first", [CHANNELS + "heads = 0.34\n", LORAPRUNE], ids=["width", "loraprune"])
def test_later_passes_and_all_formats(first: str, tmp_path: Path) -> None:
    tiny_directory(tmp_path / "model", "llama", blocks=3)
    weights: dict[str, dict[str, Tensor]] = {}
    for form in ("huggingface", "packed", "gptq", "compressed-tensors"):
        passes = first + REST + f'[[export]]\nformat = "{form}"\n[evaluate]\nperplexity = ["text.txt"]\nwindow = 16\n'
        passes = passes.replace("multiple = 8", "multiple = 16").replace("group_size = 8", "group_size = 16")
        _, report = carried_out(tmp_path, passes, overwrite=True)
        assert report.evaluation[0].compressed.perplexity
        config, checkpoint = open_model(tmp_path / "out")
        weights[form] = {name: checkpoint.read(name) for name in checkpoint.tensors}
        ids = torch.arange(16).view(1, 16)
        loaded = compress.load(tmp_path / "out", device="cpu")
        plain = AutoModelForCausalLM.from_config(config).eval()
        assert plain.load_state_dict(weights[form], strict=False).unexpected_keys == []
        torch.testing.assert_close(loaded(ids).logits, plain(ids).logits, rtol=1e-4, atol=1e-4)
    for form in ("packed", "gptq", "compressed-tensors"):
        assert weights[form].keys() == weights["huggingface"].keys()
        for name, tensor in weights[form].items():
            torch.testing.assert_close(tensor, weights["huggingface"][name], rtol=0, atol=0)


@pytest.mark.parametrize("family", ["llama", "phi3", "opt"])
def test_scales_go_along_the_units_of_each_block(family: str, tmp_path: Path) -> None:
    """AWQ moves scales from one linear into another; with the rows of another block's width the model would break."""
    tiny_directory(tmp_path / "model", family, blocks=3)
    first = CHANNELS + ("heads = 0.34\n" if family in GROUPED else "")
    carried_out(tmp_path, first)
    before = logits(opened(tmp_path / "out"))
    _, report = carried_out(
        tmp_path, first + '[[pass]]\nuse = "awq"\n[[pass]]\nuse = "rtn"\nbits = 8\ngroup_size = 8\n', overwrite=True
    )
    after = logits(opened(tmp_path / "out"))
    assert 0 < float((after - before).norm() / before.norm()) < 0.03
    assert any(line.use == "awq" and line.detail for line in report.linears)


def test_an_output_is_a_model_for_another_plan(tmp_path: Path) -> None:
    tiny_directory(tmp_path / "model", "qwen2", blocks=3)
    carried_out(tmp_path, CHANNELS + SPARSE)
    (tmp_path / "out").rename(tmp_path / "together")
    carried_out(tmp_path, CHANNELS)
    (tmp_path / "model").rename(tmp_path / "dense")
    (tmp_path / "out").rename(tmp_path / "model")
    carried_out(tmp_path, SPARSE)
    first, second = (load_file(tmp_path / name / "model.safetensors") for name in ("together", "out"))
    assert all(torch.equal(first[name], second[name]) for name in first)
    with pytest.raises(PlanError, match="blocks have different widths already") as failure:
        carried_out(tmp_path, CHANNELS, overwrite=True)
    assert "give the model from before" in str(failure.value)


@pytest.mark.parametrize("stop", [(0, 1), (1, 0), (1, 2)])
def test_a_stopped_run_goes_on(stop: tuple[int, int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the sweep that scores, between both, and in the one that prunes."""
    tiny_directory(tmp_path / "model", "llama", blocks=3)
    carried_out(tmp_path, CHANNELS.replace("wanda", "obs") + SPARSE)
    (tmp_path / "out").rename(tmp_path / "reference")
    original, blocks = Sweep.block, []

    def watched(self: Sweep, index: int, *arguments: Any) -> Any:
        if (self.number, index) == stop and not blocks:
            raise Interrupted
        return original(self, index, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(Sweep, "block", watched)
        with pytest.raises(Interrupted):
            compress.run(load_plan(tmp_path / "plan.toml"))
    assert compress.run(load_plan(tmp_path / "plan.toml")).resumed == 1
    assert files_of(tmp_path / "out") == files_of(tmp_path / "reference")


# ------------------------------------------------------------------- beforehand


def test_explain_makes_up_no_width(tmp_path: Path) -> None:
    """Before the run there are only the widths of the source."""
    tiny_directory(tmp_path / "model", "llama", blocks=3)
    carried_out(tmp_path, CHANNELS)
    for rest in ("", SPARSE):
        (tmp_path / "more.toml").write_text((tmp_path / "plan.toml").read_text() + rest)
        lock = compile_plan(load_plan(tmp_path / "more.toml"))
        found = explain(lock, "model.layers.0.mlp.down_proj")
        assert (found["shape"], found["undecided"]) == ([32, 48], ["in_features"])
        found = explain(lock, "model.layers.0.mlp.up_proj")
        assert (found["shape"], found["undecided"]) == ([48, 32], ["out_features"])
        assert explain(lock, "model.layers.0.self_attn.o_proj")["undecided"] == []


def test_check_says_who_loads_it(tmp_path: Path) -> None:
    tiny_directory(tmp_path / "model", "llama", blocks=3)
    carried_out(tmp_path, CHANNELS)
    found = check_plan(load_plan(tmp_path / "plan.toml"))
    assert found["passes"][0]["left"] == {"heads": 2, "channels": {"total": 112}, "hidden": 32, "blocks": 3}
    assert not found["output_bytes_exact"]
    (tmp_path / "plan.toml").write_text((tmp_path / "plan.toml").read_text() + SPARSE)
    assert check_plan(load_plan(tmp_path / "plan.toml"))["model"]["architecture"] == "llama"  # that of the source
    (said,) = (text for text in found["warnings"] if "different widths" in text)
    assert "compress.load reads the result" in said
    assert "stock transformers, GPTQModel and vLLM do not" in said
    assert "import compress  # transformers then knows the model" in (tmp_path / "out" / "README.md").read_text()
    carried_out(tmp_path, CHANNELS.replace("heterogeneous = true\n", ""), overwrite=True)
    found = check_plan(load_plan(tmp_path / "plan.toml"))
    assert not any("different widths" in text for text in found["warnings"])
    assert found["output_bytes_exact"]
    assert "import compress" not in (tmp_path / "out" / "README.md").read_text()


@pytest.mark.parametrize(
    ("passes", "message", "fix"),
    [
        (CHANNELS.replace("0.25", "0.9"), "channels = 0.9 of 3 blocks of 48 leaves 16 in multiples of 8", "leaves 24"),
        (CHANNELS.replace("= 8", "= 64"), "leaves 128 in multiples of 64", "none of 64 is below 48"),
        (CHANNELS + CHANNELS, "blocks have different widths already", "in front of the pass with heterogeneous"),
        (CHANNELS + '[[pass]]\nuse = "depth"\nblocks = 1\n', "blocks have different widths already", "in front"),
        (
            CHANNELS + '[[pass]]\nuse = "rtn"\ngroup_size = 16\n',
            "group_size 16 does not divide the input width 24",
            "choose among 24",
        ),
        (CHANNELS + "match = ['*']\n", "width prunes the whole model by one setting", 'leave "match" out'),
    ],
)
def test_what_cannot_be_is_refused_beforehand(passes: str, message: str, fix: str, tmp_path: Path) -> None:
    tiny_directory(tmp_path / "model", "llama", blocks=3)
    with pytest.raises(PlanError) as failure:
        carried_out(tmp_path, passes)
    assert message in str(failure.value)
    assert fix in str(failure.value)
    assert not (tmp_path / ".out.compress").exists()


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        ({"1": {"hidden_size": 16}}, '"per_layer_config" has "hidden_size"'),
        ({"1": {"intermediate_size": -8}}, "a positive integer is needed"),
        ({"7": {"intermediate_size": 8}}, "range"),
        ([8, 8, 8], "does not map blocks to settings"),
    ],
)
def test_a_configuration_that_means_nothing_is_refused(layers: Any, message: str, tmp_path: Path) -> None:
    tiny_directory(tmp_path / "model", "llama", blocks=3)
    path = tmp_path / "model" / "config.json"
    raw = json.loads(path.read_text())
    path.write_text(json.dumps(raw | {"model_type": "heterogeneous_llama", "per_layer_config": layers}))
    with pytest.raises(ModelError, match=message):
        load_config(tmp_path / "model", trust_remote_code=False)


def test_no_lock_is_changed_for_uniform_plans(tmp_path: Path) -> None:
    tiny_directory(tmp_path / "model", "llama", blocks=3)
    lock, _ = carried_out(tmp_path, CHANNELS.replace("heterogeneous = true\n", ""))
    assert lock.sweeps == ((0,),)
    assert json.loads((tmp_path / "out" / "lock.json").read_text())["left"] == {
        "heads": 2,
        "channels": 40,
        "hidden": 32,
        "blocks": 3,
    }
    assert "per_layer_config" not in json.loads((tmp_path / "out" / "config.json").read_text())
    assert compile_plan(load_plan(tmp_path / "plan.toml")).heterogeneous is False
