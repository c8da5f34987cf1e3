"""eval, baseline and gate as a user meets them: words, files, exit codes; tasks and a gate in a plan."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import torch
from transformers import AutoModelForCausalLM

pytest.importorskip("lm_eval")

from huggingface_hub import ModelCard

from compress.evals.outcomes import Outcomes
from compress.evals.planned import check_tasks
from compress.plan import load_plan
from compress.report import load_report
from tests.conftest import LETTERS, some_text, write_tokenizer
from tests.test_cli import PLAN, command, refused

PAIRS = "minimal_pairs:pairs.jsonl"
ROLLING = "rolling_perplexity:held-out.txt"
GATED = f"""
[evaluate]
tasks = ["{PAIRS}", "{ROLLING}"]
[gate]
margin = 0.9
perplexity_margin = 1e9
"""


@pytest.fixture
def folder(folder: Path) -> Path:
    """The working directory, with a model, a plan and samples for two tasks."""
    (folder / "plan.toml").write_text(PLAN)
    rows = [{"sentence_good": f"{a} {b} is", "sentence_bad": f"{a} {b} are"} for a, b in zip(LETTERS, LETTERS[9:])]  # noqa: B905
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "held-out.txt").write_text(some_text(400, seed=3))
    return folder


def spoil(directory: Path, scale: float) -> None:
    """Noise on the head of a model."""
    model = AutoModelForCausalLM.from_pretrained(directory)
    noise = torch.randn(model.lm_head.weight.shape, generator=torch.Generator().manual_seed(0))
    model.lm_head.weight.data += scale * noise
    model.save_pretrained(directory)


def changed(path: Path, **values: Any) -> None:
    """Other values in a JSON file."""
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def test_a_fresh_run_of_the_same_model_passes(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made = command(capsys, "baseline", "model", "--tasks", f"{PAIRS},{ROLLING}", "--out", "base.json")
    assert made.code == 0
    assert "minimal_pairs:pairs (43)" in made.out
    known = Outcomes.load(folder / "base.json")
    assert [task.spec for task in known.tasks] == [PAIRS, ROLLING]
    assert (folder / "base.parquet").stat().st_size < 30_000
    result = command(capsys, "gate", "model", "--baseline", "base.json", "--no-cache")
    assert result.code == 0
    assert "gate: pass" in result.out
    found = json.loads((folder / "model" / "gate.json").read_text())
    assert {one["verdict"] for one in found["comparisons"]} == {"pass", None}
    assert ElementTree.parse(folder / "model" / "gate.xml").getroot().find("testsuite[@failures='0']") is not None


def test_a_spoilt_model_fails(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    command(capsys, "baseline", "model", "--tasks", ROLLING, "--out", "base.json")
    spoil(folder / "model", 0.1)
    monkeypatch.setenv("GITHUB_ACTIONS", "true")
    monkeypatch.setenv("GITHUB_STEP_SUMMARY", str(folder / "summary.md"))
    result = command(capsys, "gate", "model", "--baseline", "base.json", "--out", ".")
    assert result.code == 1
    assert "gate: fail" in result.out
    assert "::error title=compress gate%3A rolling_perplexity" in result.out
    assert "## compress gate: fail" in (folder / "summary.md").read_text()
    assert (folder / "gate.xml").is_file()
    assert command(capsys, "gate", "model", "--baseline", "base.json", "--perplexity-margin", "1e9").code == 0


def test_too_few_samples_are_inconclusive(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command(capsys, "baseline", "model", "--tasks", PAIRS, "--out", "base.json")
    spoil(folder / "model", 0.001)  # other log-likelihoods, the same answers
    result = command(capsys, "gate", "model", "--baseline", "base.json")
    assert result.code == 1
    assert "gate: inconclusive" in result.out
    assert "269 samples would do" in result.out  # z² (1 − m) / m = 2.7055 · 99 = 267.8, and one more
    allowed = command(capsys, "gate", "model", "--baseline", "base.json", "--inconclusive", "pass")
    assert allowed.code == 0
    assert "gate: inconclusive, which the plan allows" in allowed.out


def test_a_baseline_moves_with_its_samples(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "ci").mkdir()
    for name in ("pairs.jsonl", "held-out.txt"):
        (folder / name).rename(folder / "ci" / name)
    tasks = "minimal_pairs:ci/pairs.jsonl"
    assert command(capsys, "baseline", "model", "--tasks", tasks, "--out", "ci/base.json").code == 0
    assert str(folder) not in (folder / "ci" / "base.json").read_text()
    (folder / "ci").rename(folder / "elsewhere")
    assert command(capsys, "gate", "model", "--baseline", "elsewhere/base.json").code == 0


def test_a_task_file_of_the_home_folder(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(folder))
    (folder / "mine.yaml").write_text(
        f"task: mine\ndataset_path: json\ndataset_kwargs: {{data_files: {folder / 'pairs.jsonl'}}}\n"
        'test_split: train\noutput_type: multiple_choice\ndoc_to_text: ""\ndoc_to_target: 0\n'
        'doc_to_choice: "{{[sentence_good, sentence_bad]}}"\nmetric_list: [{metric: acc}]\n'
    )
    (folder / "ci").mkdir()
    assert command(capsys, "baseline", "model", "--tasks", "~/mine.yaml", "--out", "ci/base.json").code == 0
    assert command(capsys, "gate", "model", "--baseline", "ci/base.json").code == 0


def test_a_number_of_examples_that_a_task_does_not_heed(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    says = "minimal_pairs:pairs: prompts have 0 examples, as its file says, not 2"
    arguments = ("model", "--tasks", PAIRS, "--num-fewshot", "2")
    assert says in command(capsys, "eval", *arguments).out
    assert says in command(capsys, "baseline", *arguments, "--out", "base.json").out
    assert says not in command(capsys, "eval", *arguments[:-1], "0").out
    Path("plan.toml").write_text(PLAN + GATED.replace("[gate]", "num_fewshot = 2\n[gate]"))
    assert says in command(capsys, "plan.toml").out


def test_groups_are_in_the_json_as_in_the_table(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "mine").mkdir()
    for name, start in (("one", 0), ("two", 30)):
        (folder / "mine" / f"{name}.jsonl").write_text(
            "".join((folder / "pairs.jsonl").read_text().splitlines(keepends=True)[start:])
        )
        (folder / "mine" / f"{name}.yaml").write_text(
            f"task: {name}\ndataset_path: json\ndataset_kwargs: {{data_files: {folder / 'mine' / name}.jsonl}}\n"
            'test_split: train\noutput_type: multiple_choice\ndoc_to_text: ""\ndoc_to_target: 0\n'
            'doc_to_choice: "{{[sentence_good, sentence_bad]}}"\nmetric_list: [{metric: acc}]\n'
        )
    aggregate = "aggregate_metric_list: [{metric: acc, weight_by_size: true}]"
    (folder / "mine" / "both.yaml").write_text(f"group: both\ntask: [one, two]\n{aggregate}\n")
    arguments = ("eval", "model", "--tasks", "both", "--include-path", "mine")
    found = json.loads(command(capsys, *arguments, "--json").out)
    right = sum(line["samples"] * line["metrics"][0]["compressed"]["value"] for line in found["tasks"])
    assert [line["samples"] for line in found["tasks"]] == [43, 13]
    assert found["groups"] == {"both": {"acc": pytest.approx(right / 56)}}
    assert "group both" in command(capsys, *arguments).out


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"harness": "0.4.2"}, "the baseline has lm-eval 0.4.2, not"),
        ({"tokenizer_hash": "0"}, "the tokenizer differs from the baseline's"),
        ({"batch_size": 0}, "batch_size"),
        ({"limit": "many"}, "limit"),
    ],
)
def test_baselines_that_are_refused(
    change: dict[str, Any], says: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command(capsys, "baseline", "model", "--tasks", PAIRS, "--out", "base.json")
    changed(folder / "base.json", **change)
    assert says in refused(capsys, "gate", "model", "--baseline", "base.json")


def test_another_tokenizer_is_refused(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    command(capsys, "baseline", "model", "--tasks", PAIRS, "--out", "base.json")
    write_tokenizer(folder / "model", pad="</s>")
    tokenizer = json.loads((folder / "model" / "tokenizer.json").read_text())
    tokenizer["post_processor"] = None  # adds no BOS any more
    (folder / "model" / "tokenizer.json").write_text(json.dumps(tokenizer))
    monkeypatch.setattr("compress.evals.harness.run_tasks", None)  # before anything is evaluated
    assert "the tokenizer differs from the baseline's" in refused(capsys, "gate", "model", "--baseline", "base.json")
    Path("plan.toml").write_text(PLAN + '[gate]\nbaseline = "base.json"\n')
    says = "gate.baseline: base.json: the tokenizer differs from the baseline's"
    assert says in refused(capsys, "check", "plan.toml")
    assert says in refused(capsys, "plan.toml")
    assert not (folder / "out").exists()


def test_other_samples_are_refused(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command(capsys, "baseline", "model", "--tasks", PAIRS, "--out", "base.json")
    rows = (folder / "pairs.jsonl").read_text().splitlines(keepends=True)
    (folder / "pairs.jsonl").write_text("".join(rows[::-1]))
    assert command(capsys, "gate", "model", "--baseline", "base.json").code == 0  # the order does not matter
    (folder / "pairs.jsonl").write_text("".join(rows[1:]).replace("is", "was", 1))
    message = refused(capsys, "gate", "model", "--baseline", "base.json")
    assert "do not match one to one: 2 of the baseline's 43 are not among the 42 here, and 1 here are new" in message


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["eval", "model"], "--tasks TASK"),
        (["eval", "model", "--tasks", "minimal_pair:pairs.jsonl"], 'did you mean "minimal_pairs"?'),
        (["eval", "model", "--tasks", PAIRS, "--limit", "0"], "limit"),
        (["eval", "model", "--tasks", ""], "--tasks names no task"),
        (["baseline", "model", "--tasks", ",", "--out", "b.json"], "--tasks names no task"),
        (["eval", "model", "--tasks", PAIRS, "--dtype", "float8"], "dtype"),
        (["eval", "model", "--tasks", PAIRS, "--include-path", "gone"], "no such folder"),
        (["baseline", "model", "--tasks", PAIRS], "--out"),
        (["baseline", "gone", "--tasks", PAIRS, "--out", "b.json"], "no such directory"),
        (["baseline", "model", "--tasks", PAIRS, "--out", "b.txt"], "--out b.json"),
        (["baseline", "model", "--tasks", PAIRS, "--out", "gone/b.json"], "no such folder"),
        (["gate", "model"], "--baseline"),
        (["gate", "gone", "--baseline", "b.json"], "gone: no such directory"),
        (["gate", "model", "--baseline", "b.json"], "b.json: cannot be read"),
        (["gate", "model", "--baseline", "b.json", "--alpha", "2"], "alpha"),
        (["gate", "model", "--baseline", "b.json", "--out", "gone"], "no such folder"),
    ],
)
def test_words_that_cannot_be(
    arguments: list[str], says: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert says in refused(capsys, *arguments)


def test_without_lm_eval(folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)  # as if it were not installed
    Path("plan.toml").write_text(PLAN + GATED)
    tasks = ("--tasks", PAIRS)
    for arguments in (["check", "plan.toml"], ["eval", "model", *tasks], ["gate", "model", "--baseline", "b.json"]):
        message = refused(capsys, *arguments)
        assert "tasks need lm-eval, which is not installed" in message
        assert "pip install 'llm-compress[eval]'" in message


def test_a_model_of_nan_is_no_baseline(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """It would be right on every pair."""
    spoil(folder / "model", float("inf"))
    result = command(capsys, "eval", "model", "--tasks", PAIRS)
    assert "43 of 43 samples have log-likelihoods that are not finite" in " ".join(result.out.split())
    message = refused(capsys, "baseline", "model", "--tasks", PAIRS, "--out", "base.json")
    assert "log-likelihoods of minimal_pairs:pairs are not finite" in message
    assert not (folder / "base.json").exists()


# ------------------------------------------------------------------ in a plan


def test_tasks_and_a_gate_in_a_plan(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("plan.toml").write_text(PLAN + GATED)
    result = command(capsys, "plan.toml")
    assert result.code == 0
    assert "gate: pass" in result.out
    report = load_report(folder / "out")
    assert [line.task for line in report.tasks] == ["minimal_pairs:pairs", "rolling_perplexity:held-out"]
    line = report.tasks[1]
    measured = json.loads(command(capsys, "eval", "out", "--tasks", ROLLING, "--json", "--no-cache").out)["tasks"][0]
    assert [m["compressed"]["value"] for m in measured["metrics"]] == [one.compressed.value for one in line.metrics]
    assert line.divergence is not None
    assert sum(one.tokens for one in line.positions) > 300
    page = (folder / "out" / "report.html").read_text()
    assert "mean KL of rolling_perplexity:held-out by position" in page
    assert "Pass, against the dense model." in page
    card = ModelCard.load(folder / "out" / "README.md")
    found = {(one.dataset_name, one.metric_type): one.metric_value for one in card.data.eval_results}
    assert found["minimal_pairs:pairs", "acc"] == report.tasks[0].metrics[0].compressed.value
    assert "Gate: **pass** against `the dense model`, 2 of 2 comparisons passed" in str(card)
    assert (folder / "out" / "gate.json").is_file()


def test_a_plan_whose_gate_fails_has_written_its_output(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command(capsys, "baseline", "model", "--tasks", ROLLING, "--out", "base.json")
    Path("plan.toml").write_text(PLAN + '[gate]\nbaseline = "base.json"\nperplexity_margin = 1e-9\n')
    for _ in range(2):  # the second time the output is there already
        result = command(capsys, "plan.toml")
        assert result.code == 1
        assert "gate: inconclusive" in result.out or "gate: fail" in result.out
    gate = load_report(folder / "out").gate
    assert gate is not None
    assert [one.task for one in gate.tokens] == ["rolling_perplexity:held-out"]
    assert command(capsys, "gate", "out", "--baseline", "base.json").code == 1  # by the margin of the plan
    assert command(capsys, "gate", "out", "--baseline", "base.json", "--perplexity-margin", "1e9").code == 0


@pytest.mark.parametrize(
    ("tables", "says"),
    [
        ('[evaluate]\ntasks = "minimal_pairs:gone.jsonl"\n', "gone.jsonl: no such file"),
        ('[evaluate]\ntasks = ["minimal_pair:pairs.jsonl"]\n', "plan.toml:15: evaluate.tasks: unknown form of task"),
        ('[evaluate]\ntasks = "hellaswga"\n', 'evaluate.tasks: unknown task "hellaswga"; did you mean "hellaswag"?'),
        (
            '[evaluate]\ntasks = "arc_easy"\ninclude_path = "gone"\n',
            "plan.toml:16: evaluate.include_path: no such folder",
        ),
        ("[gate]\nmargin = 0.1\n", "plan.toml:14: gate: the gate has nothing to judge"),
        ('[gate]\nbaseline = "gone.json"\n', "plan.toml:15: gate.baseline: "),
        ("[gate]\nmargin = 0\n", "plan.toml:15: gate.margin"),
        ("[gate]\nmagrin = 0.1\n", 'did you mean "margin"?'),
        ('[gate]\ninconclusive = "maybe"\n', "plan.toml:15: gate.inconclusive"),
    ],
)
def test_plans_that_are_refused_before_a_weight_is_read(
    tables: str, says: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("plan.toml").write_text(PLAN + tables)
    for arguments in (["plan.toml"], ["check", "plan.toml"]):
        assert says in refused(capsys, *arguments)
    assert not (folder / "out").exists()


@pytest.mark.parametrize("name", ["arc_easy", "mmlu", "ai2_arc", "own"])
def test_names_of_tasks_that_are_known(name: str, folder: Path) -> None:
    """A task, a group and a tag of lm-eval, and a task in a folder of the user's: none is loaded for the check."""
    Path("mine").mkdir()
    Path("mine/own.yaml").write_text("task: own\n")
    Path("plan.toml").write_text(PLAN + f'[evaluate]\ntasks = ["{name}"]\ninclude_path = "mine"\n')
    check_tasks(load_plan("plan.toml"))


def test_names_of_a_baselines_tasks_are_looked_up(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """In its own folder of task files, too, which is relative to it."""
    command(capsys, "baseline", "model", "--tasks", PAIRS, "--out", "base.json")
    tasks = json.loads((folder / "base.json").read_text())["tasks"]
    changed(folder / "base.json", tasks=[tasks[0] | {"spec": "own"}])
    Path("plan.toml").write_text(PLAN + '[gate]\nbaseline = "base.json"\n')
    assert 'unknown task "own"' in refused(capsys, "check", "plan.toml")
    (folder / "mine").mkdir()
    (folder / "mine" / "own.yaml").write_text("task: own\n")
    changed(folder / "base.json", include_path="mine")
    check_tasks(load_plan("plan.toml"))


def test_a_pass_of_ones_own_need_not_be_there_for_the_gate(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Of the plan beside an output the gate reads its own table."""
    command(capsys, "baseline", "model", "--tasks", PAIRS, "--out", "base.json")
    plan = (PLAN + GATED).replace('use = "', 'use = "elsewhere:')
    (folder / "model" / "plan.toml").write_text(plan)
    command(capsys, "gate", "model", "--baseline", "base.json")
    result = json.loads((folder / "model" / "gate.json").read_text())
    assert next(one["margin"] for one in result["comparisons"] if one["verdict"]) == 0.9
    (folder / "model" / "plan.toml").write_text("gate = 1")
    assert "gate is no table" in refused(capsys, "gate", "model", "--baseline", "base.json")
