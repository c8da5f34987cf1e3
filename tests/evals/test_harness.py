"""Tasks through lm-eval: its own command's numbers, its own task files, every kind of directory, the cache."""

from __future__ import annotations

import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

pytest.importorskip("lm_eval")

import lm_eval
from lm_eval.tasks import TaskManager

import compress
from compress.errors import PlanError
from compress.evals.divergence import token_lines
from compress.evals.gate import compare
from compress.evals.harness import cache_folder, model_hash, run_tasks, tokenizer_hash
from compress.evals.outcomes import Outcomes
from compress.evals.specs import FORMS, FORMS_FOLDER, read_specs
from compress.passes import RTN, EoRA, Magnitude
from compress.plan import Evaluate, Gate
from tests.conftest import LETTERS, ROOT, some_text, tiny_directory

PAIRS = [{"sentence_good": f"the {a}at is", "sentence_bad": f"the {a}at are"} for a in LETTERS[:20]]
WORDS = [{"context": f"he saw the {a} and the", "continuation": a * 2} for a in LETTERS[:12]]
CHOICES = [{"query": f"Which is {a}?", "choices": [a, "no", "b" * i], "gold": i % 3} for i, a in enumerate("abcdef", 1)]
ENDINGS = [{"ctx": f"a {a} b", "endings": ["c d", f"{a}", "e"], "label": i % 3} for i, a in enumerate("fghijk")]
TASKS = (
    "minimal_pairs:pairs.jsonl",
    "last_word:words.jsonl",
    "multiple_choice:choices.jsonl",
    "endings:endings.jsonl",
    "rolling_perplexity:held-out.txt",
)


def write_rows(path: Path, rows: list[Any]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model, and a file of samples for each form."""
    folder = tmp_path_factory.mktemp("harness")
    tiny_directory(folder / "model", "llama", blocks=2)
    for name, rows in (("pairs", PAIRS), ("words", WORDS), ("choices", CHOICES), ("endings", ENDINGS)):
        write_rows(folder / f"{name}.jsonl", rows)
    (folder / "held-out.txt").write_text(some_text(300, seed=3))
    return folder


def run(directory: Path, *tasks: str, folder: Path, cache: bool = False, **settings: Any) -> Outcomes:
    return run_tasks(directory, Evaluate(tasks=tasks, **settings), folder=folder, cache=cache)


def own_command(directory: Path, form: str, file: Path, out: Path, *options: str, include: Path = FORMS_FOLDER) -> Any:
    """The results of lm-eval's own command."""
    arguments = ["run", "--model", "hf", "--model_args", f"pretrained={directory},softmax_dtype=float32"]
    arguments += ["--include_path", str(include), "--tasks", form, "--metadata", json.dumps({"file": str(file)})]
    arguments += ["--batch_size", "16", "--device", "cpu", "--output_path", str(out), *options]
    done = subprocess.run(
        [sys.executable, "-m", "lm_eval", *arguments],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
    )
    assert done.returncode == 0, done.stderr[-2000:]
    (written,) = out.rglob("results_*.json")
    found = json.loads(written.read_text())["results"][form]
    return {k.removesuffix(",none"): v for k, v in found.items() if k.endswith(",none") and "_stderr" not in k}


# ------------------------------------------------------------------ the numbers


def test_the_numbers_are_those_of_lm_evals_own_command(home: Path, tmp_path: Path) -> None:
    found = run(home / "model", TASKS[4], folder=home, limit=12)
    theirs = own_command(home / "model", "rolling_perplexity", home / "held-out.txt", tmp_path, "--limit", "12")
    assert found.tasks[0].metrics == theirs


@pytest.mark.slow
@pytest.mark.parametrize("model", ["reference", "stories260K", "babyllama-tok105"])
@pytest.mark.parametrize(
    ("form", "file"),
    [
        ("minimal_pairs", "tasks/blimp/passive_1.jsonl"),
        ("last_word", "tasks/lambada_openai.jsonl"),
        ("multiple_choice", "tasks/arc_easy.jsonl"),
        ("multiple_choice", "tasks/piqa.jsonl"),
        ("endings", "tasks/hellaswag.jsonl"),
        ("rolling_perplexity", "text/wikitext2-raw-test.txt"),
    ],
)
def test_on_real_models_too(model: str, form: str, file: str, assets: Path, tmp_path: Path) -> None:
    directory = assets / "models" / model
    inputs = (directory, form, assets / file, tmp_path / "out", "--limit", "40")
    if (model, Path(file).stem) == ("babyllama-tok105", "piqa"):  # its tokens are characters: answers are too long
        with pytest.raises(PlanError, match="more than the model's context of 256"):
            run(directory, f"{form}:{assets / file}", folder=tmp_path, limit=40)
        with pytest.raises(AssertionError, match="continuation_enc"):
            own_command(*inputs)
        return
    found = run(directory, f"{form}:{assets / file}", folder=tmp_path, limit=40)
    assert found.tasks[0].metrics == own_command(*inputs)


def log_probability(directory: Path, context: str, continuation: str) -> float:
    """Σ log p of the continuation's tokens, from the whole model; BOS before an empty context."""
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(directory)
    before = tokenizer.encode(context) if context else [tokenizer.bos_token_id]
    if context:
        ids = tokenizer.encode(context + continuation)
    else:
        ids = before + tokenizer.encode(continuation, add_special_tokens=False)
    with torch.no_grad():
        log_p = model(torch.tensor([ids[:-1]])).logits[0].log_softmax(-1)
    return sum(float(log_p[place - 1, ids[place]]) for place in range(len(before), len(ids)))


def test_log_likelihoods_are_those_of_the_plain_model(home: Path) -> None:
    """The prompts of the forms, written out: BLiMP's leading space, LAMBADA's, "Answer:" after a question."""
    found = run(home / "model", *TASKS[:4], folder=home)
    first = {name: samples[0].loglikelihoods for name, samples in found.samples.items()}
    asked = {
        "minimal_pairs:pairs": [("", f" {PAIRS[0][key]}") for key in ("sentence_good", "sentence_bad")],
        "last_word:words": [(WORDS[0]["context"], f" {WORDS[0]['continuation']}")],
        "multiple_choice:choices": [("Which is a?\nAnswer:", f" {choice}") for choice in CHOICES[0]["choices"]],
        "endings:endings": [(ENDINGS[0]["ctx"], f" {ending}") for ending in ENDINGS[0]["endings"]],
    }
    for name, pairs in asked.items():
        expected = [log_probability(home / "model", *pair) for pair in pairs]
        assert first[name] == pytest.approx(expected, abs=1e-4), name


STOCK = Path(lm_eval.__file__).parent / "tasks"
TEMPLATES = {
    "minimal_pairs": (STOCK / "blimp" / "_template_yaml", "validation_split"),
    "last_word": (STOCK / "lambada" / "lambada_openai.yaml", "test_split"),
    "multiple_choice": (STOCK / "piqa" / "piqa.yaml", "validation_split"),
    "endings": (STOCK / "hellaswag" / "hellaswag.yaml", "validation_split"),
}


def stock_row(form: str, row: dict[str, Any]) -> dict[str, Any]:
    """A sample in the columns of lm-eval's own task."""
    if form == "last_word":
        return {"text": f"{row['context']} {row['continuation']}"}
    if form == "multiple_choice":
        first, second, *_ = row["choices"]
        return {"goal": row["query"].removeprefix("Question: "), "sol1": first, "sol2": second, "label": row["gold"]}
    if form == "endings":
        label, context = row["ctx"].split(": ")
        return {
            "activity_label": label,
            "ctx_a": context,
            "ctx_b": "",
            "endings": row["endings"],
            "label": row["label"],
        }
    return row


@pytest.mark.parametrize("form", TEMPLATES)
def test_the_forms_ask_what_lm_evals_own_tasks_ask(form: str, home: Path, tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = {"minimal_pairs": PAIRS, "last_word": WORDS}.get(form) or [
        {"query": f"Question: is {a}?", "choices": [a, a * 3], "gold": i % 2} for i, a in enumerate("abcd")
    ]
    if form == "endings":
        rows = [{"ctx": f"L{a}: some {a}", "endings": [a, a * 3], "label": i % 2} for i, a in enumerate("abcd")]
    write_rows(tmp_path / "mine.jsonl", rows)
    write_rows(tmp_path / "stock.jsonl", [stock_row(form, row) for row in rows])
    template, split = TEMPLATES[form]
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "stock.yaml").write_text(
        f"include: {template}\ntask: stock\ntag: null\ndataset_path: json\ndataset_name: null\n{split}: train\n"
        f"test_split: {'train' if split == 'test_split' else 'null'}\ntraining_split: null\n"
        f"dataset_kwargs:\n  data_files: {tmp_path / 'stock.jsonl'}\n"
    )
    found = run(home / "model", f"{form}:mine.jsonl", "stock", folder=tmp_path, include_path="tasks")
    mine, stock = found.tasks
    assert mine.metrics == stock.metrics
    scores = [[sample.loglikelihoods for sample in found.samples[task.name]] for task in (mine, stock)]
    assert scores[0] == scores[1]


def test_rolling_counts_words_and_bytes(home: Path) -> None:
    found = run(home / "model", TASKS[4], folder=home)
    paragraphs = (home / "held-out.txt").read_text().split("\n\n")
    samples = found.samples["rolling_perplexity:held-out"]
    assert [one.metrics["word_perplexity"][1] for one in samples] == [len(text.split()) for text in paragraphs]
    assert [one.metrics["bits_per_byte"][1] for one in samples] == [len(text.encode()) for text in paragraphs]
    total, size = sum(one.loglikelihoods[0] for one in samples), sum(len(text.encode()) for text in paragraphs)
    assert found.tasks[0].metrics["bits_per_byte"] == pytest.approx(-total / size / math.log(2))


# ------------------------------------------------------------------ directories


@pytest.mark.parametrize("format", ["huggingface", "gptq", "compressed-tensors", "packed"])
def test_every_kind_of_output_runs(format: str, home: Path, tmp_path: Path) -> None:
    """Codes and a branch in each format: the log-likelihoods of `compress.load` with decoded weights."""
    passes = (RTN(bits=4, group_size=16), EoRA(rank=4))
    plan = compress.Plan(
        model=compress.Model(path=str(home / "model")),
        calibration=compress.Calibration(source=str(home / "text.txt"), samples=4, length=32),
        run=compress.Run(output=str(tmp_path / format), device="cpu"),
        passes=passes,
        exports=(compress.Export(format=format),),  # type: ignore[arg-type]
    )
    compress.run(plan)
    found = run(tmp_path / format, TASKS[1], folder=home)
    model, tokenizer = compress.load(tmp_path / format), AutoTokenizer.from_pretrained(tmp_path / format)
    row = WORDS[0]
    before, ids = tokenizer.encode(row["context"]), tokenizer.encode(f"{row['context']} {row['continuation']}")
    with torch.no_grad():
        log_p = model(torch.tensor([ids[:-1]])).logits[0].log_softmax(-1)
    expected = sum(float(log_p[place - 1, ids[place]]) for place in range(len(before), len(ids)))
    assert found.samples["last_word:words"][0].loglikelihoods[0] == pytest.approx(expected, abs=1e-4)


def test_the_hash_of_a_directory(home: Path, tmp_path: Path) -> None:
    copied = shutil.copytree(home / "model", tmp_path / "copy")
    assert model_hash(copied) == model_hash(home / "model")
    (copied / "README.md").write_text("not the model")
    assert model_hash(copied) == model_hash(home / "model")
    settings = copied / "generation_config.json"  # which tasks that generate go by
    settings.write_text(settings.read_text().replace("{", '{"repetition_penalty": 2.0,', 1))
    assert model_hash(copied) != model_hash(home / "model")
    shutil.copy(home / "model" / settings.name, settings)
    assert model_hash(copied) == model_hash(home / "model")
    (copied / "adapter").mkdir()
    shutil.copy(copied / "model.safetensors", copied / "adapter" / "adapter_model.safetensors")
    assert model_hash(copied) != model_hash(home / "model")


def test_the_hash_of_a_tokenizer(home: Path) -> None:
    first, second = (AutoTokenizer.from_pretrained(home / "model") for _ in range(2))
    second("a b", padding=True, truncation=True, max_length=4)
    assert tokenizer_hash(first) == tokenizer_hash(second)
    second.add_tokens(["<new>"])
    assert tokenizer_hash(first) != tokenizer_hash(second)


def write_choices_task(path: Path, metric: str) -> None:
    """A task file over the rows beside it."""
    path.write_text(
        f"""task: {path.stem}
dataset_path: json
dataset_kwargs: {{data_files: {path.parent / "rows.jsonl"}}}
test_split: train
output_type: multiple_choice
doc_to_text: "{{{{query}}}}"
doc_to_choice: choices
doc_to_target: gold
metric_list: [{{metric: {metric}}}]
"""
    )


def test_a_label_beyond_the_choices(home: Path, tmp_path: Path) -> None:
    """As of a file that counts from 1: no answer is right, in lm-eval too, and the baseline can be read again."""
    write_rows(tmp_path / "rows.jsonl", [CHOICES[0], *(row | {"gold": 3} for row in CHOICES[1:])])
    write_choices_task(tmp_path / "ones.yaml", "acc")
    found = run(home / "model", "ones.yaml", folder=tmp_path)
    right = found.samples["ones"][0].answer == CHOICES[0]["gold"]
    assert found.tasks[0].metrics == {"acc": right / len(CHOICES)}
    found.save(tmp_path / "base.json")
    result = compare(found, Outcomes.load(tmp_path / "base.json"), Gate(), name="base.json")
    assert [(one.metric, one.verdict) for one in result.comparisons] == [("acc", "pass")]


def test_what_goes_wrong_in_a_task_is_no_mistake_of_compress(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """lm-eval's F1 is for two classes. What goes wrong in the model passes as it is."""
    write_rows(tmp_path / "rows.jsonl", CHOICES)
    write_choices_task(tmp_path / "three.yaml", "f1")
    with pytest.raises(PlanError, match=r"three.yaml: lm-eval cannot evaluate this task \(ValueError: Target is"):
        run(home / "model", "three.yaml", folder=tmp_path)

    def broken(*_: Any, **__: Any) -> None:
        raise ValueError("of the model")

    monkeypatch.setattr("compress.evals.lm.HFLM._loglikelihood_tokens", broken)
    with pytest.raises(ValueError, match="of the model"):
        run(home / "model", "three.yaml", folder=tmp_path)


def test_answers_under_two_filters(home: Path, tmp_path: Path) -> None:
    """Each document is one sample, whatever the number of filters that look at its answer."""
    write_rows(tmp_path / "rows.jsonl", WORDS)
    (tmp_path / "said.yaml").write_text(
        f"""task: said
dataset_path: json
dataset_kwargs: {{data_files: {tmp_path / "rows.jsonl"}}}
test_split: train
output_type: generate_until
doc_to_text: "{{{{context}}}}"
doc_to_target: "{{{{continuation}}}}"
generation_kwargs: {{until: ["."], max_gen_toks: 3, do_sample: false}}
metric_list: [{{metric: exact_match}}]
filter_list:
  - {{name: strict, filter: [{{function: regex, regex_pattern: "^never$"}}, {{function: take_first}}]}}
  - {{name: loose, filter: [{{function: take_first}}]}}
"""
    )
    found = run(home / "model", "said.yaml", folder=tmp_path)
    assert found.tasks[0].samples == len(WORDS)
    assert set(found.tasks[0].metrics) == {"exact_match,strict", "exact_match,loose"}
    assert len(found.samples["said"]) == 2 * len(WORDS)


# ------------------------------------------------------------------ the cache


def test_results_are_kept_until_something_changes(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COMPRESS_CACHE", str(tmp_path / "cache"))
    folder = shutil.copytree(home, tmp_path / "home")
    said: list[str] = []

    def again(tasks: str = TASKS[0], **settings: Any) -> bool:
        """Whether the result came from the cache; it must be what a fresh evaluation gives."""
        said.clear()
        evaluate = Evaluate(tasks=(tasks,), **settings)
        found = run_tasks(folder / "model", evaluate, folder=folder, say=said.append)
        fresh = run_tasks(folder / "model", evaluate, folder=folder, cache=False)
        assert found.samples == fresh.samples
        assert found.tasks == fresh.tasks
        return "from the cache" in said[0]

    assert not again()
    assert again()
    assert not again(batch_size=8)
    assert not again(limit=5)
    write_rows(folder / "pairs.jsonl", PAIRS[::-1])
    assert not again()
    assert again()
    model = AutoModelForCausalLM.from_pretrained(folder / "model")
    model.lm_head.weight.data += 0.5 * torch.randn_like(model.lm_head.weight)
    model.save_pretrained(folder / "model")
    assert not again()
    for entry in cache_folder().glob("*.parquet"):
        entry.write_bytes(b"damaged")
    assert not again()


def test_other_examples_in_the_prompts_are_another_result(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COMPRESS_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "tasks"
    folder.mkdir()
    rows = [{"question": f"{a} is", "answer": a} for a in "abcdefgh"]
    write_rows(folder / "asked.jsonl", rows[:4])
    (folder / "with_examples.yaml").write_text(
        f"""
task: with_examples
dataset_path: json
dataset_kwargs:
  data_files: {{test: {folder}/asked.jsonl, train: {folder}/shown.jsonl}}
training_split: train
test_split: test
fewshot_split: train
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: ["a", "b", "c", "d"]
doc_to_target: answer
num_fewshot: 2
metric_list: [{{metric: acc}}]
""",
        encoding="utf-8",
    )
    found = []
    for shown in (rows[4:], rows[:3:-1], rows[2:6]):
        write_rows(folder / "shown.jsonl", shown)
        evaluate = Evaluate(tasks=("with_examples",), include_path=str(folder))
        result = run_tasks(home / "model", evaluate, folder=tmp_path)
        assert result.samples == run_tasks(home / "model", evaluate, folder=tmp_path, cache=False).samples
        found.append(result.samples)
    assert found[0] != found[2]


def test_functions_of_a_task_are_known_by_what_they_do(home: Path, tmp_path: Path) -> None:
    """Not by their place in memory, which is another in each process; what they call counts for the cache."""
    write_rows(tmp_path / "pairs.jsonl", PAIRS)
    (tmp_path / "functions.yaml").write_text(
        f"""
task: functions
dataset_path: json
dataset_kwargs: {{data_files: {tmp_path}/pairs.jsonl}}
test_split: train
output_type: multiple_choice
doc_to_text: !function prompts.prompt
doc_to_choice: "{{{{[sentence_good, sentence_bad]}}}}"
doc_to_target: 0
metric_list: [{{metric: acc}}]
""",
        encoding="utf-8",
    )
    made = []
    for word in ("a", "b"):
        (tmp_path / "prompts.py").write_text(f"WORD = '{word}'\n\n\ndef prompt(doc):\n    return WORD\n")
        command = [sys.executable, "-m", "compress", "baseline", str(home / "model"), "--tasks", "functions"]
        command += ["--include-path", str(tmp_path), "--out", str(tmp_path / f"{word}.json")]
        subprocess.run(command, cwd=ROOT, capture_output=True, check=True)
        made.append(Outcomes.load(tmp_path / f"{word}.json"))
    assert made[0].tasks[0].hash == made[1].tasks[0].hash
    assert made[0].samples != made[1].samples


# ------------------------------------------------------------------ divergence


def test_divergence_is_that_of_the_plain_models(home: Path, tmp_path: Path) -> None:
    plan = compress.Plan(
        model=compress.Model(path=str(home / "model")),
        run=compress.Run(output=str(tmp_path / "pruned"), device="cpu"),
        passes=(Magnitude(sparsity=0.5),),
    )
    compress.run(plan)
    settings = Evaluate(tasks=(TASKS[1],))
    line = token_lines(tmp_path / "pruned", home / "model", settings, folder=home)["last_word:words"]
    tokenizer = AutoTokenizer.from_pretrained(home / "model")
    models = [AutoModelForCausalLM.from_pretrained(path).eval() for path in (tmp_path / "pruned", home / "model")]
    kl: dict[int, list[float]] = {}
    agree = []
    for row in WORDS:
        before, ids = tokenizer.encode(row["context"]), tokenizer.encode(f"{row['context']} {row['continuation']}")
        with torch.no_grad():
            q, p = (model(torch.tensor([ids[:-1]])).logits[0].log_softmax(-1) for model in models)
        for place in range(len(before), len(ids)):
            kl.setdefault(place, []).append(float((p[place - 1].exp() * (p[place - 1] - q[place - 1])).sum()))
            agree.append(float(p[place - 1].argmax() == q[place - 1].argmax()))
    every = [value for values in kl.values() for value in values]
    assert line.divergence.kl_mean == pytest.approx(math.fsum(every) / len(every), rel=1e-3)
    assert line.divergence.top1_agreement == pytest.approx(sum(agree) / len(agree))
    assert {one.first: one.tokens for one in line.positions} == {place: len(values) for place, values in kl.items()}
    for one in line.positions:
        assert one.kl_mean == pytest.approx(sum(kl[one.first]) / len(kl[one.first]), rel=1e-3)


def test_a_model_does_not_differ_from_itself(home: Path) -> None:
    for line in token_lines(home / "model", home / "model", Evaluate(tasks=TASKS), folder=home).values():
        assert line.divergence.kl_max == 0
        assert line.divergence.top1_agreement == 1


# ------------------------------------------------------------------ bad input


def test_a_tokenizer_of_a_larger_model_is_refused(home: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(home, tmp_path / "home")
    tokenizer = folder / "model" / "tokenizer.json"
    tokenizer.write_text(tokenizer.read_text().replace('"a": ', '"a": 9'))
    for task in (TASKS[0], TASKS[4]):
        with pytest.raises(PlanError, match=r"the tokenizer makes token 9\d+, but the model has 64") as raised:
            run(folder / "model", task, folder=folder)
        assert raised.value.where == task


@pytest.mark.parametrize(
    ("task", "says", "fix"),
    [
        ("minimal_pair:pairs.jsonl", 'unknown form of task "minimal_pair"; did you mean "minimal_pairs"?', "endings"),
        ("minimal_pairs", '"minimal_pairs" needs a file of samples', "minimal_pairs:FILE"),
        ("minimal_pairs:pair.jsonl", 'no such file; did you mean "pairs.jsonl"?', "correct the path"),
        ("hellaswga", 'unknown task "hellaswga"; did you mean "hellaswag"?', "lm-eval ls tasks"),
        ("gone.yaml", "no such task file", "correct the path"),
        ("minimal_pairs:words.jsonl", 'lacks the field "sentence_good"', "sentence_good, sentence_bad"),
        ("minimal_pairs:empty.jsonl", "holds no document", "at least one"),
        ("minimal_pairs:model", "holds no file of samples", "give files in"),
        ("multiple_choice:range.jsonl", '"gold" is 7', "from 0, of the right one among 3 choices"),
        ("multiple_choice:texts.jsonl", '"choices" must be a list of texts', "answers to choose from"),
        ("last_word:broken.jsonl", "not JSON", "one JSON object per line"),
        ("last_word:long.jsonl", "last_word:long.jsonl: an answer has", "leave this sample out"),
    ],
)
def test_tasks_that_cannot_be(task: str, says: str, fix: str, home: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(home, tmp_path / "home")
    (folder / "empty.jsonl").write_text("")
    (folder / "broken.jsonl").write_text("{")
    write_rows(folder / "range.jsonl", [CHOICES[0] | {"gold": 7}])
    write_rows(folder / "texts.jsonl", [CHOICES[0] | {"choices": "abc"}])
    write_rows(folder / "long.jsonl", [{"context": "a", "continuation": "b" * 300}])
    with pytest.raises(PlanError, match=r"^") as caught:
        run(folder / "model", task, folder=folder)
    assert says in str(caught.value)
    assert fix in str(caught.value.fix)


def test_the_place_of_a_sample_that_lacks_a_field(home: Path, tmp_path: Path) -> None:
    write_rows(tmp_path / "pairs.jsonl", [*PAIRS[:2], {"sentence_good": "a", "sentence_badd": "b"}])
    with pytest.raises(PlanError, match=r'pairs.jsonl:3: lacks the field "sentence_bad"; did you mean "sentence_badd"'):
        run(home / "model", "minimal_pairs:pairs.jsonl", folder=tmp_path)


@pytest.mark.parametrize("missing", ["output_type", "doc_to_target", "doc_to_choice", "test_split", "dataset_path"])
def test_a_task_file_that_lacks_a_field(missing: str, home: Path, tmp_path: Path) -> None:
    lines = {
        "task": "mine",
        "output_type": "multiple_choice",
        "doc_to_text": '""',
        "doc_to_choice": '"{{[sentence_good, sentence_bad]}}"',
        "doc_to_target": "0",
        "dataset_path": "json",
        "test_split": "train",
    }
    (tmp_path / "mine.yaml").write_text("".join(f"{k}: {v}\n" for k, v in lines.items() if k != missing))
    with pytest.raises(PlanError, match=f'mine.yaml: the task lacks .*"{missing}"'):
        run(home / "model", "mine.yaml", folder=tmp_path)


def test_a_task_file_that_is_none(home: Path, tmp_path: Path) -> None:
    for content in ("a: [", "- a", "include: gone.yaml"):
        (tmp_path / "mine.yaml").write_text(content)
        with pytest.raises(PlanError, match=r"mine.yaml: not a task file"):
            run(home / "model", "mine.yaml", folder=tmp_path)


def test_two_tasks_of_one_name(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    for path in (tmp_path / "p.jsonl", tmp_path / "a" / "p.jsonl"):
        write_rows(path, PAIRS)
    with pytest.raises(PlanError, match="two tasks are named minimal_pairs:p"):
        read_specs(("minimal_pairs:p.jsonl", "minimal_pairs:a/p.jsonl"), tmp_path, "tasks")
    assert [one.name for one in read_specs(("minimal_pairs:a",), tmp_path, "tasks")] == ["minimal_pairs:p"]


def test_a_task_of_the_hub_without_a_network(home: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path))
    with pytest.raises(PlanError, match="lm-eval cannot load this task") as caught:
        run(home / "model", "arc_easy", folder=home)
    assert "FORM:FILE" in str(caught.value.fix)


def test_lm_eval_knows_every_form() -> None:
    assert set(TaskManager(include_path=str(FORMS_FOLDER), include_defaults=False).all_tasks) == set(FORMS)
