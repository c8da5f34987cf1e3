"""A method of the user's own: one class of some twenty lines, named by a plan or given as an object."""

from __future__ import annotations

import importlib
import sys
from typing import TYPE_CHECKING, Any

import pytest
import torch
from safetensors.torch import load_file

import compress
from compress.checking import explain
from compress.cli import main
from compress.compiling import compile_plan
from compress.errors import PlanError, RunError
from tests.conftest import files_of, tiny_directory

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

MODULE = '''
"""Keep the weights whose removal would cost the most, by the exact diagonal of the inverse Gram matrix."""

from typing import ClassVar

from pydantic import Field

from compress.passes import LinearPass, LinearState, Moments, Note, PruningPass, Statistics


class BrainSurgeon(PruningPass):
    """Prune the lowest w² / [H⁻¹]_jj of each row."""

    damping: float = Field(default=0.01, gt=0)

    statistics: ClassVar[Statistics] = Statistics.GRAM

    def apply(self, linear: LinearState, moments: Moments) -> Note:
        factor = moments.factor(self.damping)
        scores = linear.weight.square() / factor.upper.square().sum(0)
        count = int(self.sparsity * linear.in_features)
        threshold = scores.kthvalue(count, dim=1, keepdim=True).values
        linear.prune(scores <= threshold)
        return {"damping": factor.damping}


class Scale(LinearPass):
    """No pruning at all: multiply the weights."""

    by: float = 0.5

    def apply(self, linear: LinearState, moments: Moments) -> Note:
        linear.weight = linear.weight * self.by
        return {}


class Careless(LinearPass):
    """Forgets the mask."""

    preserves = PruningPass.preserves

    def apply(self, linear: LinearState, moments: Moments) -> Note:
        linear.weight = linear.weight + 1
        return {}
'''
PLAN = """
[model]
path = "model"
[calibration]
source = "text.txt"
samples = 20
length = 24
[run]
output = "out"
"""


@pytest.fixture
def mine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """The user's module, importable by name."""
    tiny_directory(tmp_path / "model", "llama")
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "my_module.py").write_text(MODULE)
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    yield importlib.import_module("my_module")
    del sys.modules["my_module"]


def planned(folder: Path, passes: str) -> compress.Plan:
    (folder / "plan.toml").write_text(PLAN + passes)
    return compress.load_plan(folder / "plan.toml")


SURGEON = """
[[pass]]
use = "my_module:BrainSurgeon"
sparsity = 0.5
damping = 0.02
except = ["*.layers.0.*"]
[[pass.where]]
match = "*.v_proj"
sparsity = 0.25
"""


def test_a_plan_names_a_pass_of_another_module(tmp_path: Path, mine: Any) -> None:
    plan = planned(tmp_path, SURGEON)
    report = compress.run(plan)
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    lines = {line.linear: line for line in report.linears}
    assert len(lines) == 14
    assert {line.use for line in lines.values()} == {"my_module:BrainSurgeon"}
    assert {line.damping for line in lines.values()} == {0.02}
    for name in lines:
        weight = tensors[f"{name}.weight"]
        share = 0.25 if name.endswith("v_proj") else 0.5
        assert bool(((weight == 0).sum(1) == int(share * weight.shape[1])).all()), name
    assert report.passes[0].use == "my_module:BrainSurgeon"
    assert report.passes[0].settings["damping"] == 0.02
    found = explain(compile_plan(plan), "model.layers.1.self_attn.v_proj")["passes"][0]["settings"]
    assert {one["key"]: one["value"] for one in found}["sparsity"] == 0.25


def test_the_object_is_the_same_pass(tmp_path: Path, mine: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    compress.run(planned(tmp_path, SURGEON))
    (tmp_path / "out").rename(tmp_path / "from-toml")
    monkeypatch.chdir(tmp_path)
    one = mine.BrainSurgeon(
        sparsity=0.5, damping=0.02, except_=["*.layers.0.*"], where=[{"match": "*.v_proj", "sparsity": 0.25}]
    )
    plan = compress.Plan(
        model=compress.Model(path="model"),
        calibration=compress.Calibration(source="text.txt", samples=20, length=24),
        run=compress.Run(output="out"),
        passes=[one],
    )
    compress.run(plan)
    ours, theirs = files_of(tmp_path / "out"), files_of(tmp_path / "from-toml")
    assert ours.keys() == theirs.keys()
    assert {name for name in ours if ours[name] != theirs[name]} <= {"plan.toml", "README.md"}
    # The plan that lies beside the weights builds the same plan again.
    again = compress.load_plan(tmp_path / "out" / "plan.toml")
    assert again.canonical() == plan.canonical()


def test_it_shares_a_sweep_with_the_others(tmp_path: Path, mine: Any) -> None:
    plan = planned(
        tmp_path, SURGEON + '[[pass]]\nuse = "my_module:Scale"\n[[pass]]\nuse = "sparsegpt"\npattern = "2:4"\n'
    )
    with pytest.raises(PlanError, match=r"my_module:Scale would break the mask"):
        compile_plan(plan)
    plan = planned(
        tmp_path, '[[pass]]\nuse = "my_module:Scale"\nby = 0.25\n[[pass]]\nuse = "magnitude"\npattern = "2:4"\n'
    )
    assert compile_plan(plan).sweeps == ((0, 1),)
    compress.run(plan)
    before, after = load_file(tmp_path / "model/model.safetensors"), load_file(tmp_path / "out/model.safetensors")
    name = "model.layers.2.mlp.up_proj.weight"
    kept = after[name] != 0
    assert torch.equal(after[name][kept], 0.25 * before[name][kept])


def test_its_mistakes_are_found(tmp_path: Path, mine: Any) -> None:
    """A pass that says it preserves masks, and does not: the weight is masked or the run refused, never revived."""
    plan = planned(tmp_path, '[[pass]]\nuse = "wanda"\nsparsity = 0.5\n[[pass]]\nuse = "my_module:Careless"\n')
    with pytest.raises(RunError, match=r"a pruned weight is not zero after pass\[1\]") as caught:
        compress.run(plan)
    assert "my_module:Careless on model.layers.0.self_attn.q_proj" in str(caught.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("use", "message"),
    [
        ("my_module:Missing", "cannot import"),
        ("no_such_module:Pass", "cannot import"),
        ("my_module:ClassVar", "not a pass"),
        ("my_module", "unknown pass"),
    ],
)
def test_what_cannot_be_used_is_named(tmp_path: Path, mine: Any, use: str, message: str) -> None:
    with pytest.raises(PlanError, match=message):
        planned(tmp_path, f'[[pass]]\nuse = "{use}"\n')


@pytest.mark.parametrize(
    ("text", "use", "problem", "fix"),
    [
        (
            "",
            "BrainSurgoen",
            'has no class "BrainSurgoen"; did you mean "BrainSurgeon"?',
            "BrainSurgeon, Scale, Careless",
        ),
        (
            "import torch\ntorch.NORM",
            "Scale",
            "AttributeError: module 'torch' has no attribute 'NORM' (",
            "correct theirs",
        ),
        ("NORM = {}\nNORM['x']", "Scale", "KeyError: 'x' (", "correct theirs"),
        ("class Scale(", "Scale", "SyntaxError: '(' was never closed (theirs.py, line 1)", "correct theirs"),
        ("import no_such_package", "Scale", "ModuleNotFoundError: No module named 'no_such_package' (", "install"),
    ],
)
def test_what_is_wrong_with_its_module(text: str, use: str, problem: str, fix: str, tmp_path: Path, mine: Any) -> None:
    (tmp_path / "site" / "theirs.py").write_text(text or MODULE)
    with pytest.raises(PlanError) as failure:
        planned(tmp_path, f'[[pass]]\nuse = "theirs:{use}"\n')
    sys.modules.pop("theirs", None)
    assert problem in failure.value.problem
    assert fix in str(failure.value.fix)
    if problem.endswith(" ("):
        assert f"theirs.py:{text.count(chr(10)) + 1})" in failure.value.problem


def test_its_keys_are_checked_like_any_others(tmp_path: Path, mine: Any) -> None:
    with pytest.raises(PlanError, match='unknown key "dampin"; did you mean "damping"'):
        planned(tmp_path, '[[pass]]\nuse = "my_module:BrainSurgeon"\nsparsity = 0.5\ndampin = 1\n')


BROKEN = {
    "linear": ("apply", 'raise ValueError("no [b]idea[/b]")', "ValueError: no [b]idea[/b]"),
    "result": ("apply", "linear.weight = 3", "AttributeError: 'int' object has no attribute"),
    "check": ("check_shape", "raise KeyError(3)", "KeyError: 3"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_an_error_that_it_did_not_foresee_fails_the_run(
    case: str, tmp_path: Path, mine: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Exit code 1 would mean that a gate failed."""
    method, text, says = BROKEN[case]
    exec(f"def {method}(self, linear, _):\n    {text}", space := {})
    monkeypatch.setattr(mine.Scale, method, space[method])
    planned(tmp_path, '[[pass]]\nuse = "my_module:Scale"\n')
    assert main([str(tmp_path / "plan.toml")]) == 3
    shown = capsys.readouterr().err
    assert shown.startswith("Traceback (most recent call last):")
    assert f"\nerror: my_module:Scale on model.layers.0.self_attn.q_proj: {says}" in shown
    assert "\nfix: correct the pass, then run the same command again" in shown


def test_an_error_that_compress_did_not_foresee(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("compress.schema.json_schema", lambda: {}["x"])
    assert main(["schema"]) == 3
    shown = capsys.readouterr().err
    assert "Traceback" in shown
    assert "\nerror: KeyError: 'x'\nfix: this is a mistake in compress: report it" in shown
