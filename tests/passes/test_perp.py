"""PERP: what learns and nothing else, losses by hand in float64, blocks against hooks on the whole model."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from pydantic import ValidationError
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForCausalLM

import compress
from compress import barrier, end_to_end, pipeline, training
from compress.calibration.tokens import TokenSet
from compress.compiling import compile_plan
from compress.errors import RunError
from compress.flows import Flows
from compress.journal import Workspace
from compress.passes import GPTQ, PERP, DepthPruning, EoRA, Magnitude, SparseGPT, Wanda, Where, perp
from compress.plan import load_plan
from compress.rules import RULES
from compress.sweep import Sweep
from tests.conftest import tiny_directory
from tests.test_cli import PLAN, command, refused

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from torch import Tensor

# Trained on all samples and for few steps: what learns must move, not get better on others.
SHORT: dict[str, Any] = {
    "steps": 5,
    "evaluate_every": 5,
    "batch_size": 8,
    "holdout": 0.0,
    "warmup": 0.0,
    "learning_rate": 3e-3,
    "rank": 4,
}
VARIANTS = ["lora", "lora-prune", "masklora", "scalelora"]
KINDS = ["norms", "biases", "embeddings", "head", "low_rank", "weights"]


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Folders with a tiny model and a text; not to be changed."""
    made: dict[tuple[str, bool], Path] = {}

    def source(family: str, tied: bool = True) -> Path:
        if (family, tied) not in made:
            made[family, tied] = tmp_path_factory.mktemp(f"{family}-{tied}")
            tiny_directory(made[family, tied] / "model", family, tied=tied, blocks=2)
        return made[family, tied]

    return source


def plan_of(source: Path, output: Path, *passes: Any, refresh: str = "block", **settings: Any) -> compress.Plan:
    return compress.Plan(
        model=compress.Model(path=str(source / "model")),
        calibration=compress.Calibration(source=str(source / "text.txt"), samples=8, length=16),
        run=compress.Run(output=str(output), refresh=refresh),
        passes=passes,
        **settings,
    )


def weights_of(directory: Path) -> dict[str, Tensor]:
    return load_file(directory / "model.safetensors")


def branches_of(directory: Path) -> dict[str, Tensor]:
    path = directory / "adapter" / "adapter_model.safetensors"
    return load_file(path) if path.exists() else {}


def model_of(directory: Path) -> nn.Module:
    """The emitted model in transformers, its branches added to the weights."""
    model: nn.Module = AutoModelForCausalLM.from_pretrained(directory).eval()
    branches = branches_of(directory)
    with torch.no_grad():
        for name, up in branches.items():
            if name.endswith("lora_B.weight"):
                product = up @ branches[name.replace("lora_B", "lora_A")]
                weight = model.get_parameter(name.removeprefix("base_model.model.").replace("lora_B.", ""))
                weight += product if weight.shape == product.shape and "transformer" not in name else product.T
    return model


class Watch:
    """What every training began and ended with: its loss on all samples, with what the pass had set up."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.losses: list[tuple[float, float]] = []
        self.names: list[set[str]] = []
        self.numbers: list[dict[str, float]] = []
        self.sizes: list[int] = []
        self.during: Callable[[Any], None] = lambda settings: None
        original = perp.train

        def watched(
            parameters: Any, loss: Any, samples: int, settings: Any, store: Any, *more: Any
        ) -> dict[str, float]:
            every = torch.arange(samples)
            self.names.append(set(parameters))
            self.sizes.append(sum(p.numel() for p in parameters.values()))
            self.during(store)
            with torch.no_grad():
                before = float(loss(every))
                numbers = original(parameters, loss, samples, settings, store, *more)
                self.losses.append((before, float(loss(every))))
            self.numbers.append(numbers)
            return numbers

        for module in (perp, end_to_end):
            monkeypatch.setattr(module, "train", watched)


@pytest.fixture
def watch(monkeypatch: pytest.MonkeyPatch) -> Iterator[Watch]:
    made = Watch(monkeypatch)
    yield made
    assert made.losses, "nothing was trained"


# ---------------------------------------------------------------- what learns

ENDS = {
    "llama": {"norms": ("norm.weight",), "head": "lm_head.weight", "embeddings": "model.embed_tokens.weight"},
    "opt": {"head": "lm_head.weight", "embeddings": "model.decoder.embed_tokens.weight"},
    "gpt2": {"head": "lm_head.weight", "embeddings": "transformer.wte.weight"},
}


def kind_by_name(family: str, name: str) -> str:
    """What a stored tensor is, by the names that transformers gives it."""
    name = name if "." in name else f"transformer.{name}"
    leaf = name.split(".")[-2]
    if name == ENDS[family]["head"]:
        return "head"
    if leaf in ("embed_tokens", "wte"):
        return "embeddings"
    if leaf in ("embed_positions", "wpe"):
        return "positions"
    if "norm" in leaf or leaf.startswith("ln_"):
        return "norms"
    return "biases" if name.endswith("bias") else "low_rank"


def changed(before: dict[str, Tensor], after: dict[str, Tensor]) -> set[str]:
    assert before.keys() == after.keys()
    return {name for name, value in before.items() if not torch.equal(value, after[name])}


@pytest.fixture(scope="module")
def pruned(sources: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Outputs of 2:4 pruning alone."""
    made: dict[tuple[str, bool], Path] = {}

    def output(family: str, tied: bool = True) -> Path:
        if (family, tied) not in made:
            made[family, tied] = tmp_path_factory.mktemp("pruned") / "out"
            compress.run(plan_of(sources(family, tied), made[family, tied], Wanda(pattern="2:4")))
        return made[family, tied]

    return output


def zeros_in_groups(name: str, weight: Tensor, family: str) -> Tensor:
    """How many of every four consecutive inputs are zero."""
    weight = weight.T if family == "gpt2" else weight
    return (weight.reshape(-1, 4) == 0).sum(1)


def check_only(family: str, before: dict[str, Tensor], after: dict[str, Tensor], kinds: set[str]) -> None:
    """Of every kind that learns all tensors have changed, and none of another kind; what was pruned stays pruned."""
    found = changed(before, after)
    for name in before:
        kind = kind_by_name(family, name)
        assert (name in found) == (kind in kinds), (name, kind)
        if kind == "low_rank":
            assert torch.equal(before[name] == 0, after[name] == 0), name
            assert (zeros_in_groups(name, after[name], family) == 2).all()


CASES = [(family, kind, "end-to-end") for family in ("llama", "opt", "gpt2") for kind in KINDS]
CASES += [(family, kind, "reconstruct") for family in ("llama", "opt", "gpt2") for kind in KINDS[:2] + KINDS[4:]]
CASES = [one for one in CASES if one[:2] != ("llama", "biases")]


@pytest.mark.parametrize(("family", "kind", "mode"), CASES)
def test_only_what_is_asked_for_learns(
    family: str,
    kind: str,
    mode: str,
    sources: Callable[..., Path],
    pruned: Callable[..., Path],
    tmp_path: Path,
    watch: Watch,
) -> None:
    """And the loss on what it is trained on falls, in every training."""
    tied = kind != "head"
    one = PERP(train=(kind,), mode=mode, variant="masklora", **SHORT)
    compress.run(plan_of(sources(family, tied), tmp_path / "out", Wanda(pattern="2:4"), one))
    before, after = weights_of(pruned(family, tied)), weights_of(tmp_path / "out")
    kinds = {"low_rank" if kind == "weights" else kind}
    if mode == "reconstruct":  # what is in no block does not learn
        outside = {n: v for n, v in before.items() if ".0." not in n and ".1." not in n and ".h." not in f".{n}"}
        assert not changed(outside, {name: after[name] for name in outside})
        before, after = ({n: v for n, v in some.items() if n not in outside} for some in (before, after))
    check_only(family, before, after, kinds)
    assert len(watch.losses) == (2 if mode == "reconstruct" else 1)
    assert all(last < first for first, last in watch.losses)
    assert not (tmp_path / "out" / "adapter").exists()
    if tied and kind == "embeddings":
        out = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
        assert out.get_output_embeddings().weight is out.get_input_embeddings().weight


@pytest.mark.parametrize("mode", ["end-to-end", "reconstruct"])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_all_learns(
    family: str, mode: str, sources: Callable[..., Path], pruned: Callable[..., Path], tmp_path: Path, watch: Watch
) -> None:
    """Every parameter (of the blocks, when it is block by block) that the mask leaves, and no pruned weight."""
    compress.run(
        plan_of(sources(family), tmp_path / "out", Wanda(pattern="2:4"), PERP(train=("all",), mode=mode, **SHORT))
    )
    before, after = weights_of(pruned(family)), weights_of(tmp_path / "out")
    inside = {name for name in before if ".layers." in name or ".h." in name}
    assert changed(before, after) == (inside if mode == "reconstruct" else set(before))
    linears = [name for name in inside if before[name].ndim == 2]
    assert all(torch.equal(before[name] == 0, after[name] == 0) for name in linears)
    assert all(last < first for first, last in watch.losses)


@pytest.mark.parametrize(
    ("family", "apart"), [("gpt2", "*.attn.c_proj"), ("gpt2", "*.mlp.c_proj"), ("llama", "*.down_proj")]
)
def test_all_but_what_is_left_alone_learns(
    family: str, apart: str, sources: Callable[..., Path], tmp_path: Path
) -> None:
    """Linears that `except` names stay as they were: masked, with a branch, and not transposed."""
    first = (Wanda(pattern="2:4"), EoRA(rank=2, match=(apart,)))
    compress.run(plan_of(sources(family), tmp_path / "before", *first))
    compress.run(plan_of(sources(family), tmp_path / "after", *first, PERP(train=("all",), except_=(apart,), **SHORT)))
    before, after = weights_of(tmp_path / "before"), weights_of(tmp_path / "after")
    alone = {name for name in before if apart.strip("*") in name}
    assert len(alone) == (4 if family == "gpt2" else 2)  # with their biases
    assert changed(before, after) == set(before) - alone
    one, other = branches_of(tmp_path / "before"), branches_of(tmp_path / "after")
    assert one.keys() == other.keys()
    assert all(torch.equal(tensor, other[name]) for name, tensor in one.items())


@pytest.mark.parametrize("family", ["gpt2", "opt"])
def test_later_sweeps_see_what_was_trained_outside_blocks(
    family: str, sources: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Positions, too, which are loaded once and stay in memory."""
    seen = []
    embedded = Flows.embedded

    def look(flows: Flows) -> Any:
        made = embedded(flows)
        small = [name for name in flows.skeleton.outside if name not in (flows.skeleton.embedding, flows.skeleton.head)]
        seen.append({name: flows.skeleton.model.get_parameter(name).detach().clone() for name in small})
        return made

    monkeypatch.setattr(Flows, "embedded", look)
    fast = SHORT | {"learning_rate": 0.1}
    compress.run(plan_of(sources(family), tmp_path / "out", PERP(train=("all",), **fast), Wanda(sparsity=0.5)))
    emitted = weights_of(tmp_path / "out")
    (found,) = seen
    assert sum("wpe" in name or "positions" in name for name in found) == 1
    for name, value in found.items():
        (stored,) = [tensor for key, tensor in emitted.items() if name.endswith(key) or key.endswith(name)]
        assert torch.equal(value, stored.float()), name


@pytest.mark.parametrize("holdout", [0.0, 0.5])
@pytest.mark.parametrize("mode", ["end-to-end", "reconstruct"])
def test_parts_of_a_batch_count_as_much_as_they_hold(
    mode: str, holdout: float, sources: Callable[..., Path], tmp_path: Path, watch: Watch
) -> None:
    """Eight documents, long and short, in one forward or in four: one loss over all of them, held out or learned."""
    texts = [chr(ord("a") + number) * (3 + 11 * (number % 3)) for number in range(16)]
    (tmp_path / "texts.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in texts), encoding="utf-8")
    for batch_size in (8, 2):
        plan = compress.Plan(
            model=compress.Model(path=str(sources("llama") / "model")),
            calibration=compress.Calibration(
                source=str(tmp_path / "texts.jsonl"), samples=16, length=32, packing="documents"
            ),
            run=compress.Run(output=str(tmp_path / str(batch_size))),
            passes=(
                Wanda(pattern="2:4"),
                PERP(
                    mode=mode,
                    train=("norms",),
                    steps=3,
                    batch_size=batch_size,
                    accumulation=8 // batch_size,
                    holdout=holdout,
                    evaluate_every=1,
                    patience=9,
                ),
            ),
        )
        compress.run(plan)
    half = len(watch.numbers) // 2
    for whole, parts in zip(watch.numbers[:half], watch.numbers[half:], strict=True):
        for name in ("first", "best"):
            assert parts[name] == pytest.approx(whole[name], rel=1e-5)
    for (before, after), (_, again) in zip(watch.losses[:half], watch.losses[half:], strict=True):
        assert again == pytest.approx(after, rel=1e-5)
        assert holdout or after != before


@pytest.mark.parametrize("distill", [0.0, 0.5])
def test_a_sample_without_a_token_to_predict_is_worth_nothing(
    distill: float, sources: Callable[..., Path], tmp_path: Path
) -> None:
    """Of a document of one token alone in a batch; training does not diverge on it."""
    texts = ["abcdef ghij"] * 7 + ["a"]
    (tmp_path / "texts.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in texts), encoding="utf-8")
    plan = compress.Plan(
        model=compress.Model(path=str(sources("llama") / "model")),
        calibration=compress.Calibration(
            source=str(tmp_path / "texts.jsonl"), samples=8, length=8, packing="documents", special_tokens=False
        ),
        run=compress.Run(output=str(tmp_path / "out")),
        passes=(
            Wanda(sparsity=0.5),
            PERP(steps=16, batch_size=1, holdout=0.3, evaluate_every=4, rank=2, distill=distill),
        ),
    )
    assert compress.run(plan).linears


@pytest.mark.parametrize(
    ("one", "missing"),
    [
        (PERP(steps=4, rank=2, holdout=0.3), "calibration sample"),
        (PERP(steps=4, rank=2, holdout=0.3), "held-out sample"),
        (DepthPruning(blocks=1, score="perplexity"), "calibration sample"),
    ],
)
def test_texts_without_a_token_to_predict_are_refused(
    one: Any, missing: str, sources: Callable[..., Path], tmp_path: Path
) -> None:
    texts = ["abcdef ghij" if missing == "held-out sample" else "a"] * 8
    if isinstance(one, PERP):
        for number in one.split(8)[1].tolist():
            texts[number] = "a"
    (tmp_path / "texts.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in texts), encoding="utf-8")
    plan = compress.Plan(
        model=compress.Model(path=str(sources("llama") / "model")),
        calibration=compress.Calibration(
            source=str(tmp_path / "texts.jsonl"),
            samples=8,
            length=8,
            packing="documents",
            selection="first",
            special_tokens=False,
        ),
        run=compress.Run(output=str(tmp_path / "out")),
        passes=(one,),
    )
    with pytest.raises(RunError, match=f"no {missing} has a token that could be predicted"):
        compress.run(plan)


@pytest.mark.parametrize("mode", ["end-to-end", "reconstruct"])
def test_the_report_has_the_error_before(mode: str, sources: Callable[..., Path], tmp_path: Path) -> None:
    """That of the pass before it, as this one finds it."""
    masked = SHORT | {"train": ("low_rank",), "variant": "masklora"}
    report = compress.run(
        plan_of(sources("llama"), tmp_path / "out", Magnitude(sparsity=0.5), PERP(mode=mode, **masked))
    )
    lines = {(line.use, line.linear): line for line in report.linears}
    for (use, name), line in lines.items():
        if use == "perp":
            assert line.error_before == pytest.approx(lines["magnitude", name].error_after, rel=1e-5)
            assert line.error_after != line.error_before


@pytest.mark.parametrize("mode", ["end-to-end", "reconstruct"])
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_variants(
    family: str,
    variant: str,
    mode: str,
    sources: Callable[..., Path],
    pruned: Callable[..., Path],
    tmp_path: Path,
    watch: Watch,
) -> None:
    """lora leaves the weights as they are and adds a branch; the others merge under the mask."""
    one = PERP(train=("low_rank",), mode=mode, variant=variant, **SHORT)
    compress.run(plan_of(sources(family), tmp_path / "out", Wanda(pattern="2:4"), one))
    before, after = weights_of(pruned(family)), weights_of(tmp_path / "out")
    # In the second block, reconstruction reads what the first became: other values, not another mask.
    check_only(family, before, after, set() if variant == "lora" else {"low_rank"})
    branches = branches_of(tmp_path / "out")
    assert bool(branches) == (variant == "lora")
    assert all(value.any() for value in branches.values())
    assert all(4 in value.shape for value in branches.values())
    assert all(last < first for first, last in watch.losses)


def test_how_many_learn_is_in_the_report(sources: Callable[..., Path], tmp_path: Path, watch: Watch) -> None:
    """Llama with 2 blocks of width 32, 2 KV heads of 8, MLP 48; five norms; rank 4."""
    report = compress.run(plan_of(sources("llama"), tmp_path / "out", Wanda(sparsity=0.5), PERP(**SHORT)))
    shapes = [(32, 32), (16, 32), (16, 32), (32, 32), (48, 32), (48, 32), (32, 48)]
    wanted = 5 * 32 + 2 * sum(4 * (out + width) for out, width in shapes)
    assert watch.sizes == [wanted]
    lines = [line for line in report.linears if line.use == "perp"]
    assert len(lines) == 14
    numbers = watch.numbers[0]
    says = f"{wanted:,} trained, loss {numbers['first']:.4f} to {numbers['best']:.4f}"
    assert {line.detail for line in lines} == {says}
    assert numbers["best"] < numbers["first"]


@pytest.mark.parametrize("mode", ["end-to-end", "reconstruct"])
@pytest.mark.parametrize("family", ["opt", "gpt2"])
def test_the_bias_of_a_linear_that_is_left_alone_is_no_norm(
    family: str, mode: str, sources: Callable[..., Path], pruned: Callable[..., Path], tmp_path: Path, watch: Watch
) -> None:
    leaf = "fc1" if family == "opt" else "c_fc"
    one = PERP(train=("norms", "biases"), mode=mode, match=f"*.{leaf}", **SHORT)
    compress.run(plan_of(sources(family), tmp_path / "out", Wanda(pattern="2:4"), one))
    found = changed(weights_of(pruned(family)), weights_of(tmp_path / "out"))
    assert {name for name in found if kind_by_name(family, name) != "norms"} == {
        name for name in weights_of(pruned(family)) if name.endswith(f"{leaf}.bias")
    }
    assert any(kind_by_name(family, name) == "norms" for name in found)


# ---------------------------------------------------------------- what is refused

HEAD = PLAN[: PLAN.index("[[pass]]")].replace("samples = 2", "samples = 4")
FIRST = HEAD.count("\n") + 1  # the line of the first [[pass]]
SPARSE, QUANTIZED = 'use = "wanda"\nsparsity = 0.5', 'use = "rtn"\ngroup_size = 16'


def write(*passes: str) -> None:
    Path("plan.toml").write_text(HEAD + "".join(f"[[pass]]\n{one}\n" for one in passes))


@pytest.mark.parametrize("mode", ["end-to-end", "reconstruct"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_what_would_leave_the_grid_is_refused(
    variant: str, mode: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write(SPARSE, QUANTIZED, f'use = "perp"\nvariant = "{variant}"\nmode = "{mode}"')
    if variant == "lora":
        compile_plan(load_plan("plan.toml"))
        return
    found = " ".join(refused(capsys, "plan.toml").split())
    assert f"plan.toml:{FIRST + 6}: pass[2]: perp would break the grid that pass[1] rtn makes" in found
    assert f"rule 4: {RULES[4][0]}" in found
    assert f"fix: {RULES[4][1]}" in found


@pytest.mark.parametrize(
    ("passes", "says"),
    [
        ((QUANTIZED, 'use = "perp"\ntrain = ["weights"]'), "perp would break the grid that pass[0] rtn makes"),
        (
            (SPARSE, 'use = "eora"\nrank = 4', 'use = "perp"\nvariant = "masklora"'),
            "perp would break the low-rank branch that pass[1] eora makes",
        ),
        ((SPARSE, 'use = "perp"', QUANTIZED), "rtn would break the low-rank branch that pass[1] perp makes"),
        ((SPARSE, 'use = "perp"', SPARSE), "wanda would break the low-rank branch that pass[1] perp makes"),
    ],
)
def test_orders_that_are_refused(
    passes: tuple[str, ...], says: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write(*passes)
    assert says in " ".join(refused(capsys, "plan.toml").split())


@pytest.mark.parametrize(
    "passes",
    [
        (SPARSE, 'use = "perp"\ntrain = ["norms"]', QUANTIZED, 'use = "eora"\nrank = 4'),
        (SPARSE, 'use = "perp"\nvariant = "scalelora"', QUANTIZED, 'use = "perp"'),
        (SPARSE, 'use = "perp"\ntrain = ["weights"]', SPARSE),
        (QUANTIZED, 'use = "perp"\ntrain = ["norms"]\nmode = "reconstruct"'),
        (SPARSE, 'use = "eora"\nrank = 4', 'use = "perp"\ntrain = ["norms", "low_rank"]'),
    ],
)
def test_orders_that_are_not(passes: tuple[str, ...], folder: Path) -> None:
    write(*passes)
    compile_plan(load_plan("plan.toml"))


@pytest.mark.parametrize(
    ("settings", "key", "says", "fix"),
    [
        ('train = ["head"]', "train", "the head is tied to the embeddings", '"embeddings" too'),
        ('train = ["biases"]', "train", "the model has nothing of biases to train", '"low_rank"'),
        ('train = ["weights", "low_rank"]', "train", "weights and low_rank exclude each other", "leave one out"),
        ('train = ["embeddings"]\nmode = "reconstruct"', "mode", "are in no block", 'mode = "end-to-end"'),
        ('distill = 0.5\nmode = "reconstruct"', "mode", "reconstruct compares blocks by itself", "leave them out"),
        (
            'gradient_checkpointing = true\nmode = "reconstruct"',
            "gradient_checkpointing",
            "reconstruct has one block at a time",
            "leave it out",
        ),
        ("holdout = 0.9", "holdout", "4 calibration samples leave none to train on", "more samples"),
        ("rank = 17", "", "rank 17 is above 16", "rank = 16 or less"),
        ('[[pass.where]]\nmatch = "*.q_proj"\nrank = 2', "where", "has one set of settings", "match and except"),
        ('mode = "reconstruct"\n[[pass.where]]\nmatch = "*"\nrank = 2', "where", "one set of settings", "leave where"),
    ],
)
def test_settings_that_are_refused(
    settings: str, key: str, says: str, fix: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Before anything is read: exit code 2, the line, and what to write instead."""
    write(SPARSE, f'use = "perp"\n{settings}')
    found = refused(capsys, "plan.toml")
    place = found.split(": pass[1]")[0]
    lines = Path("plan.toml").read_text().splitlines()
    number = int(place.rpartition(":")[2])
    assert lines[number - 1].startswith(key or "[[pass]]") or lines[number - 1] in ("[[pass]]", "[[pass.where]]")
    assert says in found
    assert fix in found.rpartition("fix: ")[2]
    assert not Path("out").exists()
    assert not Path(".out.compress").exists()


@pytest.mark.parametrize(
    ("before", "says", "fix"),
    [
        ((), "of the model as it came", 'before it, or use mode = "end-to-end"'),
        (('use = "width"\nchannels = 0.5\nmultiple = 8',), "of the smaller model as it came", "with distill = 1.0"),
        (('use = "depth"\nblocks = 1',), "of the smaller model as it came", "with distill = 1.0"),
    ],
    ids=["first", "width", "depth"],
)
def test_a_reconstruction_has_something_to_make_up_for(
    before: tuple[str, ...], says: str, fix: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Where nothing has changed since, every block is its dense self already: all steps would learn nothing."""
    one = 'use = "perp"\nmode = "reconstruct"\nrank = 2'
    write(*before, one)
    found = refused(capsys, "plan.toml")
    assert f"towards those {says}, which no pass before has changed" in found
    assert fix in found.rpartition("fix: ")[2]
    assert found.split(": pass[")[1].startswith(f"{len(before)}].mode")
    write(*before, SPARSE, one)
    compile_plan(load_plan("plan.toml"))


def test_a_training_that_diverges_ends_with_exit_code_3(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The message names pass, step and layer, and what was finished stays."""
    for mode, where in (("end-to-end", "perp, step "), ("reconstruct", "perp on block 0, step ")):
        train = 'train = ["weights"]\nlearning_rate = 1e30\nschedule = "constant"\nwarmup = 0\nholdout = 0'
        write(SPARSE, f'use = "perp"\nmode = "{mode}"\n{train}')
        found = refused(capsys, "plan.toml", "--restart", code=3)
        assert where in found
        assert "training diverged" in found
        if mode == "end-to-end":  # weights of 1e30: the first product of a layer with them is not finite
            assert "perp, step 2, model.layers.0." in found
        assert Path(".out.compress/journal.jsonl").exists()


def test_what_a_pass_refuses_while_it_runs_is_a_mistake_of_the_plan(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the lock cannot know, because it reads no weight, is told like what it can."""

    def refuse(*_: Any) -> None:
        raise perp.SettingError("cannot be", "write something else", ("train",))

    monkeypatch.setattr(PERP, "apply_model", refuse)
    monkeypatch.setattr(PERP, "apply", refuse)
    for mode in ("end-to-end", "reconstruct"):
        write(SPARSE, f'use = "perp"\ntrain = ["norms"]\nmode = "{mode}"')
        found = refused(capsys, "plan.toml", "--restart")
        assert f"plan.toml:{FIRST + 5}: pass[1].train: cannot be" in found
        assert "fix: write something else" in found


# ---------------------------------------------------------------- losses


def comparison(
    source: Path, monkeypatch: pytest.MonkeyPatch, **settings: Any
) -> tuple[float, nn.Module, nn.Module, Tensor, Tensor]:
    """The loss of a pruned model on padded samples, before training; that model, the dense one, tokens and mask."""
    seen: list[Any] = []

    def look(parameters: Any, loss: Any, samples: int, settings: Any, store: Any, *more: Any) -> dict[str, float]:
        seen.append(float(loss(torch.arange(samples))))
        return {"first": 0.0, "best": 0.0}

    def padded(tokens: TokenSet) -> TokenSet:
        mask = torch.arange(16) < torch.tensor([16, 5, 9, 16, 16, 2, 12, 16]).unsqueeze(1)
        return TokenSet(torch.where(mask, tokens.ids, 0), mask)

    original = barrier.WholeModel.adapt

    def adapt(self: Any, *arguments: Any, **keywords: Any) -> Any:
        self.tokens = padded(self.tokens)
        seen.append(self.tokens)
        return original(self, *arguments, **keywords)

    monkeypatch.setattr(end_to_end, "train", look)
    monkeypatch.setattr(barrier.WholeModel, "adapt", adapt)
    one = PERP(train=("norms",), **settings)
    output = source / f"loss-{len(list(source.iterdir()))}"
    compress.run(plan_of(source, output, Wanda(sparsity=0.5), one))
    tokens, loss = seen
    dense = AutoModelForCausalLM.from_pretrained(source / "model").eval()
    return loss, model_of(output), dense, tokens.ids, tokens.mask


def forward(model: nn.Module, ids: Tensor, blocks: str) -> tuple[Tensor, list[Tensor]]:
    """Logits in float64, and what each block gives."""
    states: list[Tensor] = []
    hooks = [
        block.register_forward_hook(
            lambda _, __, out: states.append((out[0] if isinstance(out, tuple) else out).double())
        )
        for block in model.get_submodule(blocks)
    ]
    with torch.no_grad():
        logits = model(input_ids=ids, use_cache=False).logits.double()
    for hook in hooks:
        hook.remove()
    return logits, states


BLOCKS = {"llama": "model.layers", "opt": "model.decoder.layers", "gpt2": "transformer.h"}


@pytest.mark.parametrize("family", ["llama", "opt", "gpt2"])
def test_the_loss_by_hand(family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Cross entropy, T² KL and hidden states, over what is no padding: token by token in float64."""
    tiny_directory(tmp_path / "model", family, blocks=2)
    for distill, hidden, T in ((0.0, 0.0, 1.0), (1.0, 0.0, 3.0), (0.0, 1.0, 1.0), (0.3, 0.7, 2.0)):
        with monkeypatch.context() as patch:
            loss, model, dense, ids, mask = comparison(tmp_path, patch, distill=distill, hidden=hidden, temperature=T)
        (logits, states), (target, wanted) = (forward(one, ids, BLOCKS[family]) for one in (model, dense))
        entropy, divergence = [], []
        for row in range(len(ids)):
            for place in range(ids.shape[1] - 1):
                if not mask[row, place + 1]:
                    continue
                entropy.append(-logits[row, place].log_softmax(0)[ids[row, place + 1]])
                p, q = (one[row, place].div(T).softmax(0) for one in (target, logits))
                divergence.append((p * (p.log() - q.log())).sum())
        gaps = [
            sum((a[r, t] - b[r, t]).square().sum() for r, t in mask.nonzero().tolist())
            / sum(b[r, t].square().sum() for r, t in mask.nonzero().tolist())
            for a, b in zip(states, wanted, strict=True)
        ]
        by_hand = (1 - distill) * float(torch.stack(entropy).mean())
        by_hand += distill * T * T * float(torch.stack(divergence).mean())
        by_hand += hidden * float(torch.tensor(gaps).mean())
        assert len(states) == 2
        assert loss == pytest.approx(by_hand, rel=1e-4), (distill, hidden)


def test_a_dense_model_has_nothing_to_learn_from_itself(
    sources: Callable[..., Path], tmp_path: Path, watch: Watch
) -> None:
    """Distillation and hidden states alone: the loss of a model that nothing has changed is 0."""
    one = PERP(distill=1.0, hidden=1.0, **(SHORT | {"steps": 1, "learning_rate": 1e-9}))
    compress.run(plan_of(sources("llama"), tmp_path / "out", one))
    assert watch.losses[0][0] == pytest.approx(0.0, abs=1e-6)


@pytest.mark.parametrize("family", ["llama", "opt", "gpt2"])
def test_gradient_checkpointing_changes_nothing(
    family: str, sources: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nor does it turn dropout on, which OPT and GPT-2 have by default. That blocks run again is counted."""
    calls: list[int] = []
    original = nn.LayerNorm.forward

    def counted(self: nn.LayerNorm, x: Tensor) -> Tensor:
        calls[-1] += 1
        return original(self, x)

    monkeypatch.setattr(nn.LayerNorm, "forward", counted)
    found = []
    for checkpointing in (False, True):
        one = PERP(gradient_checkpointing=checkpointing, variant="masklora", hidden=0.5, **SHORT)
        calls.append(0)
        compress.run(plan_of(sources(family), tmp_path / f"{checkpointing}", Wanda(sparsity=0.5), one))
        found.append(weights_of(tmp_path / f"{checkpointing}"))
    assert not changed(*found)
    if family != "llama":  # llama has norms of its own
        assert calls[1] == calls[0] + 5 * 2 * 2  # steps, blocks, norms


def test_bfloat16(sources: Callable[..., Path], pruned: Callable[..., Path], tmp_path: Path, watch: Watch) -> None:
    """Mixed precision: products in bfloat16, parameters in float32; about the same result."""
    found = []
    for precision in ("float32", "bfloat16"):
        one = PERP(precision=precision, variant="masklora", gradient_checkpointing=True, **SHORT)
        compress.run(plan_of(sources("llama"), tmp_path / precision, Wanda(pattern="2:4"), one))
        found.append(weights_of(tmp_path / precision))
    assert changed(*found)
    before = weights_of(pruned("llama"))
    for name in changed(before, found[0]):
        step, other = found[0][name] - before[name], found[1][name] - before[name]
        assert float((step - other).norm()) < 0.5 * float(step.norm()), name
    assert all(last < first for first, last in watch.losses)


# ---------------------------------------------------------------- block by block


def block_output(model: nn.Module, family: str, index: int, ids: Tensor, replaced: Tensor | None = None) -> Tensor:
    """What a block of a whole model gives, for its own input or for another one."""
    block = model.get_submodule(BLOCKS[family])[index]
    out: list[Tensor] = []
    hooks = [block.register_forward_hook(lambda _, __, found: out.append(found))]
    if replaced is not None:
        hooks.append(block.register_forward_pre_hook(lambda _, args: (replaced, *args[1:])))
    with torch.no_grad():
        model(input_ids=ids, use_cache=False)
    for hook in hooks:
        hook.remove()
    return out[0]


@pytest.mark.parametrize("variant", ["lora", "masklora"])
@pytest.mark.parametrize("family", ["llama", "opt", "gpt2"])
def test_a_block_is_compared_with_its_dense_self_on_compressed_inputs(
    family: str, variant: str, sources: Callable[..., Path], pruned: Callable[..., Path], tmp_path: Path, watch: Watch
) -> None:
    """Before and after training, by hooks on whole models: x is what the emitted blocks before give."""
    source = sources(family)
    one = PERP(mode="reconstruct", variant=variant, **SHORT)
    plan = plan_of(source, tmp_path / "out", Wanda(pattern="2:4"), one)
    compress.run(plan)
    ids = watched_tokens(plan)
    dense = AutoModelForCausalLM.from_pretrained(source / "model").eval()
    out, before = model_of(tmp_path / "out"), model_of(pruned(family))
    assert len(watch.losses) == 2
    for index, (first, last) in enumerate(watch.losses):
        x = block_input(out, family, index, ids)
        wanted = block_output(dense, family, index, ids, x).double()
        for model, loss in ((before, first), (out, last)):
            gap = block_output(model, family, index, ids, x).double() - wanted
            if index == 0 or model is out:  # without training, the pruning of the second block is that of other inputs
                assert loss == pytest.approx(float(gap.square().sum() / wanted.square().sum()), rel=1e-4)
        assert last < first


def block_input(model: nn.Module, family: str, index: int, ids: Tensor) -> Tensor:
    block = model.get_submodule(BLOCKS[family])[index]
    found: list[Tensor] = []
    hook = block.register_forward_pre_hook(lambda _, args: found.append(args[0]))
    with torch.no_grad():
        model(input_ids=ids, use_cache=False)
    hook.remove()
    return found[0]


def watched_tokens(plan: compress.Plan) -> Tensor:
    """The calibration set of a plan, made anew."""
    from compress.calibration.plan_source import make_tokens

    return make_tokens(compile_plan(plan), torch.device("cpu")).ids


def test_only_one_block_is_in_memory(sources: Callable[..., Path], tmp_path: Path, watch: Watch) -> None:
    """While a block is trained, all parameters of other blocks, embedding and head are on the meta device."""
    seen = []

    def during(store: Any) -> None:
        skeleton = store.run.skeleton
        for number, block in enumerate(skeleton.blocks):
            real = {p.device.type for p in block.parameters()}
            assert real == ({"cpu"} if number == store.training["block"] else {"meta"})
        for name in (skeleton.embedding, skeleton.head):
            assert skeleton.model.get_parameter(name).is_meta
        seen.append(store.training["block"])

    watch.during = during
    compress.run(plan_of(sources("llama"), tmp_path / "out", Wanda(sparsity=0.5), PERP(mode="reconstruct", **SHORT)))
    assert seen == [0, 1]


def test_a_trained_block_is_kept_until_the_journal_has_it(
    sources: Callable[..., Path], tmp_path: Path, watch: Watch, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What stops the run between the last step and the block's line costs no step; then the states go."""
    plan = plan_of(sources("llama"), tmp_path / "out", Wanda(sparsity=0.5), PERP(mode="reconstruct", **SHORT))
    work = tmp_path / ".out.compress"
    steps, original = [], training._step

    def step(*arguments: Any) -> float:
        steps.append(1)
        return original(*arguments)

    def stop(self: Sweep, *arguments: Any) -> None:
        if self.lock.block_passes(self.number):
            raise KeyboardInterrupt
        commit(self, *arguments)

    monkeypatch.setattr(training, "_step", step)
    commit = Sweep._commit
    with monkeypatch.context() as patch:
        patch.setattr(Sweep, "_commit", stop)
        with pytest.raises(KeyboardInterrupt):
            compress.run(plan)
    assert len(steps) == SHORT["steps"]
    assert list(work.glob("training-1-1-0-*"))
    left = []
    watch.during = lambda store: left.append([path.name for path in work.glob("training-*")])
    compress.run(plan)
    assert len(steps) == 2 * SHORT["steps"]  # of the second block
    assert left[0]
    assert all(name.startswith("training-1-1-0-") for name in left[0])
    assert not left[1]


@pytest.mark.parametrize("refresh", ["block", "subset"])
def test_a_quantizer_shares_the_sweep_of_a_reconstruction(
    refresh: str, sources: Callable[..., Path], tmp_path: Path, watch: Watch
) -> None:
    """It sees the block as it was trained; where forwards wait between subsets, the training does not."""
    source, leaf = sources("llama"), "*.up_proj"
    one = PERP(mode="reconstruct", train=("norms", "low_rank"), variant="masklora", match=leaf, **SHORT)
    plan = plan_of(source, tmp_path / "out", Wanda(pattern="2:4"), one, GPTQ(bits=8, group_size=16), refresh=refresh)
    assert compile_plan(plan).sweeps == ((0,), (1, 2))
    compress.run(plan)
    compress.run(plan_of(source, tmp_path / "without", Wanda(pattern="2:4"), one, refresh=refresh))
    found, trained = (weights_of(tmp_path / name) for name in ("out", "without"))
    norm = "model.layers.0.input_layernorm.weight"
    assert torch.equal(found[norm], trained[norm])
    for name, weight in trained.items():
        if ".layers.0." in name and name.endswith("_proj.weight"):
            assert torch.allclose(found[name], weight, atol=0.02 * float(weight.abs().max())), name  # 8 bits
            assert not found[name][weight == 0].any()
    assert all(last < first for first, last in watch.losses)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_blocks_that_compute_in_half_precision_are_trained_in_float32(
    dtype: torch.dtype, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, watch: Watch
) -> None:
    """As on a GPU, where a sweep computes in the checkpoint's dtype."""
    choose = pipeline.choose_mode
    monkeypatch.setattr(pipeline, "choose_mode", lambda lock: replace(choose(lock), dtype=dtype))
    tiny_directory(tmp_path / "model", "llama", blocks=2, dtype=dtype)
    one = PERP(mode="reconstruct", train=("norms", "low_rank"), **(SHORT | {"learning_rate": 1e-4}))
    original = perp.train
    dtypes: set[torch.dtype] = set()

    def look(parameters: dict[str, nn.Parameter], *more: Any) -> Any:
        dtypes.update(p.dtype for p in parameters.values())
        return original(parameters, *more)

    monkeypatch.setattr(perp, "train", look)
    compress.run(plan_of(tmp_path, tmp_path / "out", Wanda(pattern="2:4"), one))
    assert dtypes == {torch.float32}
    assert all(last < first for first, last in watch.losses)  # steps so small that half precision would lose them


class Interrupted(BaseException):
    pass


# What the journal of a run of two blocks holds: wanda's sweep, then for each block two looks and its result.
LINES = ["begin", "threads", "calibration", "block", "block", *["training", "training", "block"] * 2]


@pytest.mark.parametrize("lines", [6, 7, 9, 10])
def test_a_stopped_reconstruction_goes_on_with_the_same_bytes(
    lines: int, sources: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Within the training of a block, and between its end and the journal."""
    one = PERP(mode="reconstruct", variant="masklora", **(SHORT | {"steps": 4, "evaluate_every": 2, "holdout": 0.25}))
    steps = [Wanda(pattern="2:4"), one, GPTQ(bits=4, group_size=16)]
    compress.run(plan_of(sources("llama"), tmp_path / "whole", *steps))
    plan = plan_of(sources("llama"), tmp_path / "out", *steps)
    original, kinds = Workspace._commit, list[str]()

    def commit(self: Workspace, entry: dict[str, Any], *more: Any) -> None:
        if len(kinds) == lines:
            raise Interrupted
        original(self, entry, *more)
        kinds.append(entry["kind"])

    with monkeypatch.context() as patch:
        patch.setattr(Workspace, "_commit", commit)
        with pytest.raises(Interrupted):
            compress.run(plan)
    assert kinds == LINES[:lines]
    assert not (tmp_path / "out").exists()
    assert compress.run(plan).resumed == 1
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("out", "whole")]
    assert weights[0] == weights[1]


# ---------------------------------------------------------------- with other passes


@pytest.mark.parametrize("mode", ["end-to-end", "reconstruct"])
def test_it_continues_a_branch(mode: str, sources: Callable[..., Path], tmp_path: Path, watch: Watch) -> None:
    """Of eora: same ranks, whatever `rank` and `alpha` say; codes and masks stay, and at first the function does."""
    steps = [
        SparseGPT(pattern="2:4"),
        GPTQ(bits=4, group_size=16),
        EoRA(rank=3, where=(Where(match="*.q_proj", rank=5),)),
    ]
    one = PERP(train=("low_rank",), mode=mode, alpha=100.0, **SHORT)
    settings = {"exports": [compress.Export(format="gptq")]}
    source = sources("llama")
    compress.run(plan_of(source, tmp_path / "eora", *steps, **settings))
    compress.run(plan_of(source, tmp_path / "out", *steps, one, **settings))
    assert not changed(weights_of(tmp_path / "eora"), weights_of(tmp_path / "out"))  # codes, scales, all else
    masks = [(tmp_path / name / "masks.safetensors").read_bytes() for name in ("eora", "out")]
    assert masks[0] == masks[1]
    before, after = branches_of(tmp_path / "eora"), branches_of(tmp_path / "out")
    assert changed(before, after) == set(before)
    # One step of AdamW moves a value by the learning rate: the branch is still near what eora made of it.
    for name, value in before.items():
        assert float((after[name] - value).abs().max()) <= 5 * 3e-3 * 1.01, name
        assert value.shape == after[name].shape
    assert all(last < first for first, last in watch.losses)


def test_norms_and_biases_beside_a_branch(sources: Callable[..., Path], tmp_path: Path, watch: Watch) -> None:
    """The factors of a branch are no biases."""
    source, steps = sources("opt"), [Wanda(pattern="2:4"), EoRA(rank=3)]
    compress.run(plan_of(source, tmp_path / "eora", *steps))
    for mode in ("end-to-end", "reconstruct"):
        one = PERP(train=("norms", "biases"), mode=mode, **SHORT)
        compress.run(plan_of(source, tmp_path / mode, *steps, one))
        assert not changed(branches_of(tmp_path / "eora"), branches_of(tmp_path / mode))
        kinds = {kind_by_name("opt", n) for n in changed(weights_of(tmp_path / "eora"), weights_of(tmp_path / mode))}
        assert kinds == {"norms", "biases"}
    assert all(last < first for first, last in watch.losses)


def grams_of_gptq(plan: compress.Plan) -> dict[str, Tensor]:
    """What `gptq` is given in a run, by linear."""
    seen: dict[str, Tensor] = {}
    original = GPTQ.apply

    def look(self: GPTQ, linear: Any, moments: Any) -> Any:
        seen.setdefault(linear.name, moments.gram().clone().double())
        return original(self, linear, moments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(GPTQ, "apply", look)
        compress.run(plan)
    return seen


def gram_in(model: Any, leaf: str, plan: compress.Plan) -> Tensor:
    """XᵀX of a linear in the first block of a model, on the calibration set."""
    found: list[Tensor] = []
    module = model.model.layers[0].get_submodule(leaf)
    hook = module.register_forward_pre_hook(lambda _, args: found.append(args[0]))
    with torch.no_grad():
        model(input_ids=watched_tokens(plan))
    hook.remove()
    x = found[0].double().flatten(0, 1)
    return x.T @ x


def test_what_comes_later_sees_trained_norms_and_embeddings(
    sources: Callable[..., Path], tmp_path: Path, watch: Watch
) -> None:
    """The first linear's moments are those of a model that has the emitted norms and embeddings."""
    source = sources("llama")
    one = PERP(train=("norms", "embeddings"), **(SHORT | {"learning_rate": 0.05}))
    plan = plan_of(source, tmp_path / "out", SparseGPT(pattern="2:4"), one, GPTQ(bits=4, group_size=16), EoRA(rank=2))
    assert compile_plan(plan).sweeps == ((0,), (1,), (2, 3))
    seen = grams_of_gptq(plan)
    out = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    dense = AutoModelForCausalLM.from_pretrained(source / "model").eval()
    grams = [gram_in(model, "self_attn.q_proj", plan) for model in (out, dense)]
    gram = seen["model.layers.0.self_attn.q_proj"]
    assert torch.allclose(gram, grams[0], rtol=1e-4, atol=1e-4 * float(gram.abs().max()))
    assert not torch.allclose(gram, grams[1], rtol=1e-2, atol=1e-2 * float(gram.abs().max()))


@pytest.mark.parametrize("refresh", ["block", "subset"])
def test_a_quantizer_sees_the_inputs_that_a_reconstruction_has_left(
    sources: Callable[..., Path], tmp_path: Path, watch: Watch, refresh: str
) -> None:
    """The moments of the first block are those of a model that stops after the reconstruction."""
    settings = SHORT | {"learning_rate": 0.05}
    one = PERP(mode="reconstruct", train=("norms", "low_rank"), variant="masklora", **settings)
    steps = (SparseGPT(pattern="2:4"), one)
    compress.run(plan_of(sources("llama"), tmp_path / "repaired", *steps, refresh=refresh))
    plan = plan_of(sources("llama"), tmp_path / "out", *steps, GPTQ(bits=8, group_size=16), refresh=refresh)
    seen = grams_of_gptq(plan)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "repaired").eval()
    for leaf in ("self_attn.q_proj", "mlp.gate_proj", "mlp.down_proj"):
        gram = seen[f"model.layers.0.{leaf}"]
        assert float((gram - gram_in(model, leaf, plan)).norm()) < 0.02 * float(gram.norm()), (
            leaf
        )  # the linears before it have 8 bits


def test_the_same_plan_gives_the_same_bytes(sources: Callable[..., Path], tmp_path: Path) -> None:
    """Twice in one process, whatever the state of torch's generator."""
    found = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        (tmp_path / str(seed)).mkdir()
        one = PERP(variant="scalelora", **(SHORT | {"holdout": 0.25}))
        compress.run(plan_of(sources("llama"), tmp_path / str(seed) / "out", Wanda(sparsity=0.5), one))
        found.append((tmp_path / str(seed) / "out" / "model.safetensors").read_bytes())
    assert found[0] == found[1]


def test_the_command(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A plan file through the command: steps are told, and the same command finds the work done."""
    write(SPARSE, 'use = "perp"\nsteps = 4\nevaluate_every = 2\nholdout = 0.25\nbatch_size = 2')
    shown = command(capsys, "plan.toml")
    assert shown.code == 0
    assert "step 2/4" in shown.out
    assert "held-out" in shown.out
    files = {path: path.read_bytes() for path in Path("out").rglob("*") if path.is_file()}
    assert Path("out/adapter/adapter_model.safetensors") in files
    assert command(capsys, "plan.toml").code == 0
    assert files == {path: path.read_bytes() for path in Path("out").rglob("*") if path.is_file()}


@pytest.mark.parametrize("form", ["huggingface", "packed"])
def test_more_ranks_beside_those_of_eora(form: str, folder: Path) -> None:
    """The old ranks stay, the new ones are trained, and the lock knew the bytes."""
    eora = EoRA(rank=3)
    more = PERP(train=("low_rank",), extend=True, **(SHORT | {"rank": 2}))
    outputs = {}
    for name, passes in (("before", (Wanda(pattern="2:4"), eora)), ("after", (Wanda(pattern="2:4"), eora, more))):
        plan = plan_of(folder, folder / name, *passes, exports=(compress.Export(format=form),))
        promised = compile_plan(plan).output_bytes
        report = compress.run(plan)
        assert report.output.bytes == promised
        files = [file for path in (folder / name).rglob("*.safetensors") for file in load_file(path).items()]
        outputs[name] = dict(files)
    suffixes = (("lora_A.weight", 0), ("lora_B.weight", 1), ("low_rank_down", 0), ("low_rank_up", 1))
    for key, tensor in outputs["before"].items():
        along = next((along for suffix, along in suffixes if key.endswith(suffix)), None)
        if along is None:
            assert torch.equal(outputs["after"][key], tensor), key
            continue
        found = outputs["after"][key]
        assert found.shape[along] == 5
        assert torch.equal(found.narrow(along, 0, 3), tensor)
        assert bool(found.narrow(along, 3, 2).any())


def test_only_a_branch_is_extended() -> None:
    with pytest.raises(ValidationError, match="only a branch can be extended"):
        PERP(train=("low_rank",), variant="masklora", extend=True)
