"""Targets that are no part of the weights: the plan, tokenizers, calibration data, baselines, reports."""

from __future__ import annotations

import io
import json
import re
import tempfile
import tomllib
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow
import tomli_w
from pyarrow import parquet
from rich.console import Console

from compress.calibration.sources import texts
from compress.calibration.tokenizer import load_tokenizer
from compress.calibration.tokens import build, eval_stream
from compress.card import write_card
from compress.checking import check_plan
from compress.evals.gate import compare
from compress.evals.outcomes import Outcomes, Sample, Task
from compress.plan import Calibration, Gate, load_plan, parse_plan
from compress.report import load_report, print_summary, write_report
from fuzz.choices import HOSTILE, Choices, change_bytes, change_json, json_text
from fuzz.oracle import Broken
from fuzz.target import PLAN, Target
from tests.conftest import some_text

if TYPE_CHECKING:
    from collections.abc import Iterator


class PlanFile(Target):
    """The plan: trusted in what it asks for, but a mistake in it must be told in words."""

    name = "plan"
    keys = (
        "sparsity", "pattern", "bits", "rank", "where", "match", "except", "only", "damping", "budget", "steps",
        "train", "refresh", "memory", "stride", "gate", "track", "export", "format", "shard_size", "layers",
        "heads", "tasks",
    )  # fmt: skip
    uses = (
        "magnitude", "wanda", "sparsegpt", "rtn", "gptq", "awq", "eora", "perp", "peqa", "width", "depth", "loraprune",
        "lqlora",
    )  # fmt: skip

    def prepare(self) -> None:
        self.tables = tomllib.loads(PLAN)

    def change(self, choices: Choices) -> dict[Path, bytes]:
        path = self.folder / "plan.toml"
        kind = choices.below(4)
        if kind == 1:
            return {path: change_bytes(PLAN.encode(), choices)}
        tables = tomllib.loads(PLAN)
        if kind >= 2:
            for one in tables["pass"]:
                one["use"] = choices.pick(self.uses)
        changed = change_json(tables, choices, self.keys)
        try:
            return {path: tomli_w.dumps(changed).encode()}
        except (AttributeError, TypeError, ValueError, UnicodeEncodeError):  # TOML has no null, nor halves of pairs
            return {path: change_bytes(PLAN.encode(), choices)}

    def read(self) -> object:
        text = (self.folder / "plan.toml").read_bytes()
        if b":" in text.replace(b"2:4", b""):  # use = "module:Class" runs that module: the plan is code there
            return parse_plan(text.decode(errors="replace").replace(":", "_"), self.folder / "plan.toml")
        plan = load_plan(Path("plan.toml"))
        if (plan.model.path, plan.run.output) != (self.tables["model"]["path"], self.tables["run"]["output"]):
            return plan  # both may be anywhere: the plan is trusted in that
        return check_plan(plan)


class Tokenizer(Target):
    """The files of a tokenizer, through what calibration and evaluation do with them."""

    name = "tokenizer"
    keys = (
        "type", "pattern", "content", "Regex", "String", "normalizers", "pretokenizers", "prepend", "vocab", "merges",
        "id", "special", "behavior", "invert", "add_prefix_space", "unk_token", "unk_id", "fuse_unk", "byte_fallback",
        "dropout", "max_input_chars_per_word", "continuing_subword_prefix", "end_of_word_suffix", "replacement",
        "tokenizer_class", "auto_map", "chat_template", "vocab_file", "tokenizer_file", "merges_file", "added_tokens",
        "added_tokens_decoder", "model_max_length", "padding_side", "extra_special_tokens", "fast_tokenizer_files",
        "additional_special_tokens", "bos_token", "eos_token", "pad_token", "init_inputs", "name_or_path", "strategy",
        "Fixed", "length", "direction", "stride", "max_length", "truncation", "padding", "gguf_file", "backend",
    )  # fmt: skip
    parts = (
        {"type": "Replace", "pattern": {"Regex": "(a+)+$"}, "content": "b"},
        {"type": "Replace", "pattern": {"String": "a"}, "content": "aa" * 20},
        {"type": "Sequence", "normalizers": [{"type": "Replace", "pattern": {"String": "a"}, "content": "a" * 50}] * 3},
        {"type": "Split", "pattern": {"Regex": "(.*)*x"}, "behavior": "Isolated", "invert": False},
        {"type": "Metaspace", "replacement": "_", "prepend_scheme": "always", "split": True},
        {"type": "NFKC"}, {"type": "Prepend", "prepend": "x"}, {"type": "Digits", "individual_digits": True},
    )  # fmt: skip
    templates = (
        "{{ messages[0].content }}", "{% for m in messages %}{{ m.content * 1000000000 }}{% endfor %}",
        "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}", "{{ 9 ** 9 ** 9 }}",
        "{{ messages.__class__.__base__.__subclasses__() }}", "{% include '/etc/passwd' %}",
        "{{ raise_exception('x') }}", "{% import 'os' as os %}",
        "{{ cycler.__init__.__globals__.os.system('touch owned') }}",
        "{{ strftime_now('%Y') }}", "{{ messages | tojson }}", "{% set x = namespace(a=1) %}{{ x }}",
        "{{ undefined.a }}", "{", "{% for %}",
    )  # fmt: skip

    def prepare(self) -> None:
        self.text = some_text(400)
        (self.model / "chat_template.jinja").write_text("{% for m in messages %}{{ m.content }}{% endfor %}")
        self.files = ("tokenizer.json", "tokenizer_config.json")
        self.quick = (0, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14)  # templates that do not wait for a limit

    def change(self, choices: Choices) -> dict[Path, bytes]:
        kind = choices.below(8)
        if kind == 1:
            path = self.model / "chat_template.jinja"
            return {path: self.templates[choices.pick(self.quick)].encode() + choices.take(choices.below(4))}
        if kind == 2:
            path = self.model / choices.pick(
                ("special_tokens_map.json", "added_tokens.json", "vocab.json", "config.json")
            )
            return {path: json_text(change_json({"unk_token": "<unk>", "a": 1}, choices, self.keys)).encode()}
        path = self.model / choices.pick(self.files)
        if kind in (3, 4) and path.name == "tokenizer.json":
            whole = json.loads(path.read_text())
            part = choices.pick(("normalizer", "pre_tokenizer", "post_processor", "model"))
            new = choices.pick(self.parts) if choices.below(2) else whole[part]
            whole[part] = change_json(new, choices, self.keys) if choices.below(4) else new
            return {path: json_text(whole).encode()}
        return {path: self.json(path, choices)}

    def read(self) -> object:
        tokenizer = load_tokenizer(Path("model"))
        found: list[Any] = [eval_stream(self.text, tokenizer)]
        settings = Calibration(source="text", samples=2, length=16)
        found.append(build(settings, tokenizer, [self.text] * 4, "plan.toml"))
        chat = [{"role": "user", "content": "aaaaaaaaaaaaaaaaaaaab"}]
        rows = settings.model_copy(update={"packing": "documents"})
        found.append(build(rows, tokenizer, [chat] * 3, "plan.toml"))
        return found


class Rows(Target):
    """Calibration data: .jsonl, .json, .txt and .parquet."""

    name = "rows"
    keys = ("text", "messages", "role", "content")

    def prepare(self) -> None:
        self.documents = ["some text of a document", "", "another\n\none \N{PILE OF POO}", "a" * 100]
        self.chats = [[{"role": "user", "content": "hello"}, {"role": "assistant", "content": "hi"}]] * 3
        self.tables = [
            pyarrow.table({"text": self.documents, "number": [1, 2, 3, None]}),
            pyarrow.table({"messages": self.chats}),
            pyarrow.table({"text": pyarrow.array(self.documents).dictionary_encode()}),
            pyarrow.table({"text": pyarrow.array([b"\xff", b"a", None, b""], pyarrow.binary())}),
            pyarrow.table({"text": [[1, 2], None, [], [3]]}),
            pyarrow.table({"text": pyarrow.array([1, 2, 3, 4], pyarrow.timestamp("ns"))}),
        ]

    def change(self, choices: Choices) -> dict[Path, bytes]:
        kind = choices.pick(("jsonl", "json", "txt", "parquet", "parquet"))
        self.source = self.folder / f"rows.{kind}"
        if kind == "txt":
            return {self.source: change_bytes("\n\n".join(self.documents).encode(), choices)}
        if kind == "parquet":
            stored = io.BytesIO()
            options: dict[str, Any] = {"compression": choices.pick(("snappy", "zstd", "gzip", "none", "brotli", "lz4"))}
            options |= {"data_page_version": choices.pick(("1.0", "2.0")), "use_dictionary": bool(choices.below(2))}
            parquet.write_table(choices.pick(self.tables), stored, row_group_size=choices.pick((4, 1)), **options)
            return {self.source: change_bytes(stored.getvalue(), choices)}
        rows = [{"text": one} for one in self.documents] if choices.below(2) else [{"messages": c} for c in self.chats]
        changed = change_json(rows, choices, self.keys)
        if kind == "json" or not isinstance(changed, list):
            text = json_text(changed)
        else:
            text = "\n".join(map(json_text, changed))
        return {self.source: change_bytes(text.encode(), choices) if choices.below(4) == 1 else text.encode()}

    def read(self) -> object:
        documents = texts(str(self.source), default_split="train")
        return list(documents), list(documents.shuffled(0)), documents.whole_text()


class Baseline(Target):
    """What ``compress gate`` compares with: JSON, and the samples in parquet."""

    name = "baseline"
    keys = ("schema_version", "samples_file", "samples_sha256", "groups", "include_path", "limit", "num_fewshot")

    def prepare(self) -> None:
        metrics = {"acc": (1.0,)}
        samples = [
            Sample("none", number, f"{number:016x}", f"{number:016x}", (-1.0, -2.0 - number), (True, False), 0, metrics)
            for number in range(12)
        ]
        task = Task(
            name="t", spec="t", hash="h", prompts="p", version="1", num_fewshot=0, output_type="multiple_choice",
            samples=len(samples), metrics={"acc,none": 1.0}, aggregation={"acc": "mean"},
            higher_is_better={"acc": True},
        )  # fmt: skip
        self.good = Outcomes(
            compress_version="0", model="m", model_hash="h", tokenizer_hash="h", harness="0", versions={}, device="cpu",
            dtype="auto", batch_size=1, limit=None, num_fewshot=None, add_bos_token=None, tasks=(task,),
        ).with_samples({"t": samples})  # fmt: skip
        self.path = self.folder / "baseline.json"
        self.good.save(self.path)
        self.samples = self.folder / "baseline.parquet"

    def change(self, choices: Choices) -> dict[Path, bytes]:
        import hashlib

        if choices.below(2):
            return {self.path: self.json(self.path, choices)}
        if choices.below(2):
            stored = change_bytes(self.samples.read_bytes(), choices)
        else:  # valid parquet of other values
            table = parquet.read_table(self.samples)
            rows = change_json([row | {"doc": 0, "prompt": 0} for row in table.to_pylist()], choices)
            key = choices.pick(table.column_names)
            try:
                values = [row.get(key) for row in rows]
                column = pyarrow.array((values + [None] * len(table))[: len(table)], table.schema.field(key).type)
                table = table.set_column(table.column_names.index(key), key, column)
            except (pyarrow.ArrowException, AttributeError, TypeError, ValueError, OverflowError):
                table = table.slice(choices.below(12))
            written = io.BytesIO()
            parquet.write_table(table, written)
            stored = written.getvalue()
        whole = json.loads(self.path.read_text()) | {"samples_sha256": hashlib.sha256(stored).hexdigest()}
        return {self.samples: stored, self.path: json.dumps(whole).encode()}

    def read(self) -> object:
        found = Outcomes.load(Path("baseline.json"))
        return compare(self.good, found, Gate(resamples=999), name="baseline.json")


class ReportFile(Target):
    """report.json as it is read back, and what is made of it: the terminal's tables, the page, the model card."""

    name = "report"

    def prepare(self) -> None:
        import compress

        compress.run(parse_plan(PLAN, self.folder / "plan.toml"))
        self.path = self.folder / "out" / "report.json"

    def change(self, choices: Choices) -> dict[Path, bytes]:
        if choices.below(2):
            return {self.path: self.json(self.path, choices)}
        whole = json.loads(self.path.read_text())
        places = list(_texts(whole))
        for _ in range(1 + choices.below(6)):
            parent, key = choices.pick(places)
            parent[key] = choices.pick([one for one in HOSTILE if isinstance(one, str) and one != "\ud800"])
        return {self.path: json.dumps(whole).encode()}

    def read(self) -> object:
        report = load_report(Path("out"))
        stored = io.StringIO()
        print_summary(report, Console(file=stored, width=80))
        with tempfile.TemporaryDirectory(prefix="compress-check-") as place:
            write_report(report, place)
            write_card(report, place, report.model.path, "mit")
            page, card = (Path(place, name).read_text(encoding="utf-8") for name in ("report.html", "README.md"))
        if "<script>alert" in page or "<img src=x" in page:
            raise Broken("markup of the report is in its page")
        if re.search(r"(?<!\\)<(script|img)", re.sub(r"`[^`\n]*`", "", card)):  # code spans hold no markup
            raise Broken("markup of the report is in its card")
        if "\x1b" in stored.getvalue():
            raise Broken("a name moves the terminal's cursor")
        return page, card


def _texts(value: Any) -> Iterator[tuple[Any, Any]]:
    """Every place of a document that holds a string: (parent, key)."""
    for key, item in value.items() if isinstance(value, dict) else enumerate(value):
        if isinstance(item, str):
            yield value, key
        elif isinstance(item, (dict, list)):
            yield from _texts(item)
