"""Plans: every mistake is one message with file, line, key and fix; good plans survive a round trip."""

from __future__ import annotations

import json
import tomllib
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jsonschema
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import compress
from compress.errors import PlanError
from compress.passes import Magnitude, SparseGPT, Wanda, Where
from compress.plan import Calibration, Evaluate, Export, Model, Plan, Run, load_plan, parse_plan
from compress.plan_text import Source
from compress.schema import json_schema
from compress.state import Pattern
from tests.test_cli import PLAN, command, refused

if TYPE_CHECKING:
    from collections.abc import Callable

WHERE = '  [[pass.where]]\n  match = "*.down_proj"\n'


def but(old: str, new: str) -> str:
    """The good plan with a change."""
    assert PLAN.count(old) == 1
    return PLAN.replace(old, new)


PERP = '[[pass]]\nuse = "perp"\ntrain = "norms"\n'
LQLORA = '[[pass]]\nuse = "lqlora"\nbudget = 4\nchoices_bits = 4\n'
# name: (plan, "line: key" as the message has it, what is wrong, the fix)
WRONG: dict[str, tuple[str, str, str, str]] = {
    "misspelt table": (
        but("[calibration]", "[callibration]"),
        "3: callibration",
        'unknown key "callibration"; did you mean "calibration"?',
        "model, calibration, run, pass, export, evaluate",
    ),
    "unknown table": (PLAN + "[zzz]\n", "14: zzz", 'unknown key "zzz"', "model, calibration"),
    "misspelt key": (but("samples", "smaples"), "5: calibration.smaples", 'did you mean "samples"?', "seed"),
    "unknown key": (but("samples", "xyzzy"), "5: calibration.xyzzy", 'unknown key "xyzzy"', "samples"),
    "misspelt pass": (
        but("wanda", "wonda"),
        "12: pass[0].use",
        'did you mean "wanda"?',
        "rtn, sparsegpt, wanda",
    ),
    "unknown pass": (but("wanda", "quantum"), "12: pass[0].use", 'unknown pass "quantum"', "my_module:MyPass"),
    "pass without use": (but('use = "wanda"\n', ""), "11: pass[0].use", '"use"', "magnitude"),
    "use is a number": (but('"wanda"', "3"), "12: pass[0].use", '"use"', "magnitude"),
    "module is absent": (but("wanda", "no_such_module:X"), "12: pass[0].use", "cannot import", "PYTHONPATH"),
    "class is absent": (
        but("wanda", "compress.passes.wanda:Wonda"),
        "12: pass[0].use",
        'did you mean "Wanda"?',
        "Wanda",
    ),
    "not a pass": (but("wanda", "pathlib:Path"), "12: pass[0].use", "is not a pass", "LinearPass"),
    "an abstract pass": (but("wanda", "compress.passes:PruningPass"), "12: pass[0].use", "is not a pass", "LinearPass"),
    "relative module": (but("wanda", ".x:Y"), "12: pass[0].use", "cannot import", "my_module:MyPass"),
    "key of another pass": (PLAN + "damping = 0.1\n", "14: pass[0].damping", 'unknown key "damping"', "sparsity"),
    "misspelt setting": (but("sparsity", "sparcity"), "13: pass[0].sparcity", 'did you mean "sparsity"?', "pattern"),
    "Python's name of a table": (PLAN.replace("[[pass]]", "[[passes]]"), "11: passes", 'did you mean "pass"?', "pass"),
    "Python's name of export": (PLAN + "[[exports]]\n", "14: exports", 'did you mean "export"?', "export"),
    "Python's name of a key": (PLAN + 'except_ = "*.q_proj"\n', "14: pass[0].except_", '"except"?', "except"),
    "text for a number": (but("samples = 2", 'samples = "two"'), "5: calibration.samples", "whole number", "rows"),
    "list for a number": (but("samples = 2", "samples = [2]"), "5: calibration.samples", "integer", "rows"),
    "number for text": (but('"model"', "5"), "2: model.path", "string", "a local directory"),
    "text for a table": (
        'calibration = "text.txt"\n' + but('[calibration]\nsource = "text.txt"\nsamples = 2\nlength = 16\n', ""),
        "1: calibration",
        "must be a table, not 'text.txt'",
        "write [calibration]",
    ),
    "one pass, not a list": (but("[[pass]]", "[pass]"), "11: pass", "must be a list of tables", "[[pass]]"),
    "pass is a list of text": (
        'pass = ["wanda"]\n' + but('[[pass]]\nuse = "wanda"\nsparsity = 0.5\n', ""),
        "1: pass[0]",
        "must be a table",
        "[[pass]]",
    ),
    "fraction of a sample": (but("samples = 2", "samples = 2.5"), "5: calibration.samples", "whole number", "rows"),
    "no sample": (but("samples = 2", "samples = 0"), "5: calibration.samples", "greater than or equal to 1", "rows"),
    "bad choice": (but("[run]", 'packing = "zip"\n[run]'), "7: calibration.packing", "'windows' or 'documents'", ""),
    "bad memory": (but("threads = 1", 'memory = "much"'), "10: run.memory", "'much'", '"20GiB"'),
    "memory is a truth value": (but("threads = 1", "memory = true"), "10: run.memory", "a number of bytes", '"20GiB"'),
    "no memory": (but("threads = 1", "memory = 0"), "10: run.memory", "greater than 0", '"20GiB"'),
    "size is a truth value": (PLAN + "[[export]]\nshard_size = true\n", "15: export[0].shard_size", "bytes", "at most"),
    "little memory": (but("threads = 1", 'memory = "1MiB"'), "10: run.memory", "the run needs", "allow more memory"),
    "unknown device": (but('"cpu"', '"gpu"'), "9: run.device", '"gpu" is no device', '"cuda"'),
    "odd device": (but('"cpu"', '"meta"'), "9: run.device", "not supported", '"cpu"'),
    "no output": (but('"out"', '""'), "8: run.output", "at least 1 character", "directory to create"),
    "NUL in a path": (but('"out"', '"o\\u0000t"'), "8: run.output", "NUL", "remove it"),
    "sparsity 1": (but("0.5", "1.0"), "13: pass[0].sparsity", "less than 1", "[0, 1)"),
    "sparsity below 0": (but("0.5", "-0.1"), "13: pass[0].sparsity", "greater than or equal to 0", "[0, 1)"),
    "percent": (but("0.5", "50"), "13: pass[0].sparsity", "less than 1", "[0, 1)"),
    "sparsity nan": (but("0.5", "nan"), "13: pass[0].sparsity", "finite", "[0, 1)"),
    "sparsity inf": (but("0.5", "inf"), "13: pass[0].sparsity", "finite", "[0, 1)"),
    "both": (PLAN + 'pattern = "2:4"\n', "11: pass[0]", "exclude each other", 'sparsity = 0.5 or pattern = "2:4"'),
    "neither": (but("sparsity = 0.5\n", ""), "11: pass[0]", "neither", 'sparsity = 0.5 or pattern = "2:4"'),
    "N > M": (but("sparsity = 0.5", 'pattern = "4:2"'), "13: pass[0].pattern", '"4:2" keeps 4 of every 2', '"2:4"'),
    "N = M": (but("sparsity = 0.5", 'pattern = "4:4"'), "13: pass[0].pattern", '"4:4" keeps 4 of every 4', '"2:4"'),
    "N = 0": (but("sparsity = 0.5", 'pattern = "0:4"'), "13: pass[0].pattern", "at least 1", '"2:4"'),
    "no pattern": (but("sparsity = 0.5", 'pattern = "2/4"'), "13: pass[0].pattern", "not an N:M pattern", '"2:4"'),
    "number pattern": (but("sparsity = 0.5", "pattern = 24"), "13: pass[0].pattern", "not an N:M pattern", '"2:4"'),
    "M and the width": (
        but("sparsity = 0.5", 'pattern = "2:5"'),
        "11: pass[0]",
        "model.layers.0.self_attn.q_proj: pattern 2:5 needs an input width that 5 divides, not 32",
        "choose M among 2, 4, 8, 16, 32",
    ),
    "M and one width": (  # 32 divides the hidden size, not the 48 of the MLP
        but("sparsity = 0.5", 'pattern = "16:32"'),
        "11: pass[0]",
        "model.layers.0.mlp.down_proj: pattern 16:32 needs an input width that 32 divides, not 48",
        "choose M among 2, 4, 8, 16, or except",
    ),
    "M of a where": (
        PLAN + WHERE + '  pattern = "2:5"\n',
        "14: pass[0].where[0]",
        "down_proj: pattern 2:5",
        "choose M among",
    ),
    "where without match": (
        PLAN + "[[pass.where]]\nsparsity = 0.1\n",
        "14: pass[0].where[0].match",
        "missing",
        "match",
    ),
    "where misspelt": (PLAN + WHERE + "  sparsty = 0.1\n", "16: pass[0].where[0].sparsty", '"sparsity"?', "sparsity"),
    "where out of range": (PLAN + WHERE + "  sparsity = 1.5\n", "16: pass[0].where[0].sparsity", "less than 1", ""),
    "where both": (
        PLAN + WHERE + '  sparsity = 0.1\n  pattern = "2:4"\n',
        "14: pass[0].where[0]",
        "exclude each other",
        "exactly one",
    ),
    "where N = M": (PLAN + WHERE + '  pattern = "4:4"\n', "16: pass[0].where[0].pattern", '"4:4" keeps', '"2:4"'),
    "where nothing": (
        PLAN + '[[pass.where]]\nmatch = "*.fc9"\nsparsity = 0.1\n',
        "15: pass[0].where[0].match",
        '"*.fc9" matches no linear',
        "*.down_proj",
    ),
    "where what is excepted": (
        PLAN + 'except = "*.down_proj"\n' + WHERE + "  sparsity = 0.1\n",
        "16: pass[0].where[0].match",
        '"*.down_proj" matches no linear',
        "*.up_proj",
    ),
    "second where": (
        PLAN + WHERE + "  sparsity = 0.1\n" + WHERE.replace("down", "dwn") + "  sparsity = 0.1\n",
        "18: pass[0].where[1].match",
        'did you mean "*.down_proj"?',
        "*.down_proj",
    ),
    "except nothing": (PLAN + 'except = ["*.q_prj"]\n', "14: pass[0].except", 'did you mean "*.q_proj"?', "*.q_proj"),
    "match nothing": (PLAN + 'match = ["*.Q_PROJ"]\n', "14: pass[0].match", '"*.Q_PROJ" matches no', "*.q_proj"),
    "match the head": (PLAN + 'match = "lm_head"\n', "14: pass[0].match", "output head", "leave the head dense"),
    "except all": (PLAN + 'except = "*"\n', "11: pass[0]", "excepts every linear", "remove an except"),
    "no calibration": (
        but('[calibration]\nsource = "text.txt"\nsamples = 2\nlength = 16\n', ""),
        "7: pass[0]",
        "wanda needs calibration data",
        "[calibration]",
    ),
    "too long": (but("length = 16", "length = 65"), "6: calibration.length", "context of 64", "length = 64 or less"),
    "window too long": (
        PLAN + '[evaluate]\nperplexity = "text.txt"\nwindow = 65\n',
        "16: evaluate.window",
        "context of 64",
        "window = 64 or less",
    ),
    "stride": (PLAN + "[evaluate]\nwindow = 8\nstride = 9\n", "14: evaluate", "stride 9 skips", "stride <= window"),
    "text is absent": (but("text.txt", "txet.txt"), "4: calibration.source", 'did you mean "text.txt"?', "relative to"),
    "evaluation text is absent": (
        PLAN + '[evaluate]\nperplexity = ["text.txt", "nowhere/wiki.txt"]\n',
        "15: evaluate.perplexity",
        'no such file "nowhere/wiki.txt"',
        "relative to",
    ),
    "text in no home": (but("text.txt", "~nobody-here/a.txt"), "4: calibration.source", "home of nobody", "the path"),
    "output in no home": (but('"out"', '"~nobody-here/out"'), "8: run.output", "home of nobody", "the path"),
    "evaluation text in no home": (
        PLAN + '[evaluate]\nperplexity = ["~nobody-here/a.txt"]\n',
        "15: evaluate.perplexity[0]",
        "home of nobody",
        "the path",
    ),
    "calibration text of no kind": (
        but("text.txt", "model/model.safetensors"),
        "4: calibration.source",
        '".safetensors" is not a kind of text file',
        ".jsonl",
    ),
    "no dataset": (
        but("text.txt", "wikitxt"),
        "4: calibration.source",
        'did you mean "wikitext"?',
        "organisation/name",
    ),
    "column of a plain text": (
        but("samples = 2", 'column = "body"\nsamples = 2'),
        "4: calibration.source",
        'a .txt file has no column "body"',
        "remove column",
    ),
    "column of the model's own text": (
        but('"text.txt"', '"self"\ncolumn = "body"'),
        "5: calibration.column",
        '"self") has no column',
        "remove column",
    ),
    "evaluation text of no kind": (
        PLAN + '[evaluate]\nperplexity = ["text.txt", "model/model.safetensors"]\n',
        "15: evaluate.perplexity",
        '"model/model.safetensors": ".safetensors" is not a kind of text file',
        ".parquet",
    ),
    "unknown evaluation dataset": (
        PLAN + '[evaluate]\nperplexity = "wikitxt"\n',
        "15: evaluate.perplexity",
        '"wikitxt": neither a file nor a dataset',
        "organisation/name",
    ),
    "unknown format": (PLAN + '[[export]]\nformat = "gguf"\n', "15: export[0].format", "'huggingface'", ""),
    "two formats": (PLAN + "[[export]]\n[[export]]\n", "14: export", "one format", "[[export]]"),
    "one export": (
        PLAN + '[export]\nformat = "gptq"\n',
        "14: export",
        "list of tables, not a table",
        "write [[export]]",
    ),
    "a format": (
        but("[model]", 'export = ["gptq"]\n[model]'),
        "1: export[0]",
        "a table, not 'gptq'",
        "write [[export]]",
    ),
    "list of evaluate": (PLAN + "[[evaluate]]\n", "14: evaluate", "must be a table, not a list", "write [evaluate]"),
    "one where": (
        PLAN + '[pass.where]\nmatch = "*"\n',
        "14: pass[0].where",
        "list of tables, not a table",
        "[[pass.where]]",
    ),
    "a where": (PLAN + 'where = "*"\n', "14: pass[0].where", "list of tables, not '*'", "write [[pass.where]]"),
    "no list of words": (PLAN + PERP, "16: pass[1].train", "must be a list, not 'norms'", 'write train = ["norms"]'),
    "no list of numbers": (PLAN + LQLORA, "17: pass[1].choices_bits", "a list, not 4", "write choices_bits = [4]"),
    "no list in a where": (
        PLAN + '[[pass]]\nuse = "perp"\n[[pass.where]]\nmatch = "*"\ntrain = "norms"\n',
        "18: pass[1].where[0].train",
        "must be a list, not 'norms'",
        'write train = ["norms"]',
    ),
    "no list of patterns": (PLAN + "match = 3\n", "14: pass[0].match", "must be a list, not 3", "glob patterns"),
    "no model": (but('"model"', '"modle"'), "2: model.path", 'did you mean "model"?', "a hub id"),
    "model is a file": (but('"model"', '"text.txt"'), "2: model.path", '"text.txt" is a file', "config.json"),
    "no table": (but('[model]\npath = "model"\n', ""), "model", '"model" is missing', "[model]"),
    "no key": (but('path = "model"', 'revision = "main"'), "1: model.path", '"path" is missing', "path = ..."),
    "no pass": (but('[[pass]]\nuse = "wanda"\nsparsity = 0.5\n', ""), "pass", "there is no pass", "[[pass]]"),
    "empty": ("", "model", '"model" is missing', "[model]"),
    "syntax": (PLAN + "x = = 2\n", "14", "not valid TOML", "correct the syntax"),
    "unclosed": (PLAN + 'x = "\n', "14", "not valid TOML", "correct the syntax"),
    "key twice": (PLAN + "sparsity = 0.4\n", "14", "not valid TOML", "correct the syntax"),
    "deep": ("a = " + "[" * 50_000, "", "not valid TOML", "correct the syntax"),
    "long number": ("a = " + "1" * 5000, "", "not valid TOML", "correct the syntax"),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_plan_is_one_message(case: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text, place, problem, fix = WRONG[case]
    (folder / "plan.toml").write_text(text)
    before = sorted(folder.rglob("*"))
    message = refused(capsys, "plan.toml")
    first, *_, last = message.strip().splitlines()
    assert first.startswith(f"error: plan.toml:{place}:" if place[:1].isdigit() else f"error: plan.toml: {place}"), (
        first
    )
    assert problem in message
    assert last.startswith("fix: ")
    assert fix in last
    assert sorted(folder.rglob("*")) == before
    assert len(message.splitlines()) == 2
    again = refused(capsys, "check", "plan.toml")
    assert again == message or "MiB" in message  # what is resident changes


@pytest.mark.parametrize(
    "value",
    ['samples = "2"', "samples = true", 'seed = "0"', "special_tokens = 1", 'special_tokens = "yes"', "length = 16.0"],
)
def test_a_value_of_another_type_is_refused(value: str) -> None:
    with pytest.raises(PlanError):
        parse_plan(but("samples = 2", value) if "samples" in value else but("length = 16", value))


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("plan.toml", None, "no such plan"),
        ("plna.toml", None, "no such plan"),
        ("no/such/plan.toml", None, "no such plan"),
        (".", None, "Is a directory"),
        ("model", None, "Is a directory"),
        ("plan.toml", b"[model]\npath = '\xff\xfe'\n", "utf-8"),
        ("plan.toml", PLAN.encode("utf-16"), "utf-8"),
        ("plan.toml", b"\x00\x01\x02\x03", "not valid TOML"),
        ("plan.toml", b"\x7fELF" + bytes(range(256)), "utf-8"),
        ("text.txt/plan.toml", None, "Not a directory"),
        ("x" * 300, None, "too long"),
    ],
)
def test_a_plan_that_cannot_be_read(
    name: str, content: bytes | None, says: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if content is not None:
        Path(name).write_bytes(content)
    before = sorted(folder.rglob("*"))
    message = refused(capsys, name)
    assert says in message
    assert name in message
    assert sorted(folder.rglob("*")) == before


def test_a_byte_order_mark_and_windows_line_ends_are_fine(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("plan.toml").write_bytes(b"\xef\xbb\xbf" + PLAN.replace("\n", "\r\n").encode())
    assert command(capsys, "check", "plan.toml").code == 0
    Path("plan.toml").write_bytes(b"\xef\xbb\xbf" + but("samples", "smaples").replace("\n", "\r\n").encode())
    assert "plan.toml:5: calibration.smaples" in refused(capsys, "check", "plan.toml")


def test_paths_are_relative_to_the_plan(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    Path("plan.toml").write_text(PLAN)
    monkeypatch.chdir("/")
    assert command(capsys, "check", folder / "plan.toml").code == 0


# ------------------------------------------------------------------ lines

HARD = '''\
# """ a comment with a multi-line quote, \'\'\' and [brackets
model.path = "a # no comment"   # """
model.revision = """
[run]
samples = 5
"""

[calibration] # [x]
source = "it's \\"quoted\\" \\\\"
column = \'\'\'
[[pass]]
'quoted' = 1\'\'\'
"samples" = 3

[run]
output = 'o"""'
device = "cpu"
[[pass]]
use = "wanda"
except = [
  "*.q_proj",  # ]
  "[[pass]]",
  """
  key = 1
  """,
]
sparsity = 0.5

  [[pass.where]]
  match = ["a = b", "*.x"]
  sparsity = 0.25
  [[pass.where]]
  match = "b"
  pattern = "2:4"
[[ pass ]]
use = "magnitude"
where = [ { match = "c", sparsity = 0.1 },
          { match = "d", sparsity = 0.2 } ]
sparsity = 0.5
'''
PLACES: dict[tuple[str | int, ...], str] = {
    ("model", "path"): "model.path",
    ("model", "revision"): "model.revision",
    ("calibration",): "[calibration]",
    ("calibration", "source"): "source =",
    ("calibration", "column"): "column =",
    ("calibration", "samples"): '"samples" = 3',
    ("run", "output"): "output =",
    ("run", "device"): "device =",
    ("pass", 0, "use"): 'use = "wanda"',
    ("pass", 0, "except"): "except = [",
    ("pass", 0, "except", 1): "except = [",
    ("pass", 0, "sparsity"): "sparsity = 0.5\n\n",
    ("pass", 0, "where", 0, "match"): 'match = ["a',
    ("pass", 0, "where", 0, "sparsity"): "sparsity = 0.25",
    ("pass", 0, "where", 1, "match"): 'match = "b"',
    ("pass", 0, "where", 1, "pattern"): 'pattern = "2:4"',
    ("pass", 1): "[[ pass ]]",
    ("pass", 1, "use"): 'use = "magnitude"',
    ("pass", 1, "where", 1, "sparsity"): "where = [ {",
    ("pass", 1, "sparsity"): "sparsity = 0.5\n",
    ("model", "absent"): "model.path",
    ("pass", 0, "absent"): "[[pass]]\nuse",
    ("pass",): "[[pass]]\nuse",
}


def line_of(text: str, start: str, location: tuple[str | int, ...]) -> int:
    at = text.rindex(start) if location == ("pass", 1, "sparsity") else text.index(start)
    return text.count("\n", 0, at) + 1


def test_lines_in_a_hard_plan() -> None:
    tomllib.loads(HARD)
    for location, start in PLACES.items():
        assert Source(None, HARD).line(location) == line_of(HARD, start, location), location


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_lines_stay_right_wherever_lines_are_added(data: st.DataObject) -> None:
    """Blank lines and comments between statements move every number by what was added before."""
    lines = HARD.splitlines(keepends=True)
    gaps = [0, 1, 2, 6, 7, 8, 12, 13, 14, 15, 16, 17, 18, 25, 26, 27, 28, 29, 30, 31, 32, 33, 34, 36, 37]
    for gap in sorted(data.draw(st.lists(st.sampled_from(gaps), max_size=8)), reverse=True):
        extra = ["\n", '# use """\n', "  \t\n", "# [[pass]]\n", "#\u2028\x0b\x0c'''\n", "# a = [\n"]
        # A comment may not hold control characters, but a reader may meet them before the parser says so.
        lines.insert(gap, data.draw(st.sampled_from(extra)))
    text = "".join(lines)
    for location, start in PLACES.items():
        if location not in {("pass", 0, "sparsity"), ("pass", 0, "absent"), ("pass",)}:
            assert Source(None, text).line(location) == line_of(text, start, location), (location, text)


@settings(max_examples=40, deadline=None)
@given(st.permutations(["[model]", "[calibration]", "[run]", "[[pass]]", "[evaluate]"]), st.integers(0, 4))
def test_lines_stay_right_in_any_order_of_tables(order: list[str], broken: int) -> None:
    bodies = {
        "[model]": 'path = "m"\n',
        "[calibration]": "source = 'x.txt'\nsamples = 2\n",
        "[run]": 'output = """\no"""\n',
        "[[pass]]": 'use = "wanda"\nexcept = [\n  "a",\n]\nsparsity = 0.5\n',
        "[evaluate]": "window = 8\n",
    }
    text = "".join(
        f"\n{table}\n{bodies[table]}{'oops = 1' if position == broken else ''}\n"
        for position, table in enumerate(order)
    )
    with pytest.raises(PlanError) as error:
        parse_plan(text, Path("p.toml"))
    assert error.value.where
    assert error.value.where.startswith(f"p.toml:{text[: text.index('oops')].count(chr(10)) + 1}: ")


# ------------------------------------------------------------- round trips

MODEL, RUN = Model(path="m"), Run(output="o")
PLANS: list[Plan] = [
    Plan(model=MODEL, run=RUN, passes=(Magnitude(sparsity=0.5),)),
    Plan(model=Model(path='q"\\\n☃', revision="abc", trust_remote_code=True), run=RUN, passes=(Wanda(pattern="2:4"),)),
    Plan(
        model=MODEL,
        run=Run(output="o", memory="1.5GiB", threads=2, refresh="subset"),
        calibration=Calibration(source="self", samples=3, length=5, seed=7, packing="documents"),
        passes=(
            SparseGPT(
                sparsity=0.25,
                except_="*.q_proj",
                match=("*.a", "b*"),
                where=(Where(match="*.a", sparsity=0.75), Where(match=("b", "c"), pattern="1:4")),
            ),
            Magnitude(sparsity=0.0, scope="global"),
        ),
        exports=(Export(shard_size="10MB"),),
        evaluate=Evaluate(perplexity="wikitext", window=8, stride=4, divergence=False),
    ),
    Plan(model=MODEL, run=RUN, passes=(Wanda(sparsity=0.5, where=(Where(match="x", pattern=Pattern(2, 4)),)),)),
]


@pytest.mark.parametrize("plan", PLANS)
def test_a_plan_built_in_python_is_a_file(plan: Plan) -> None:
    text = plan.to_toml()
    again = parse_plan(text)
    assert again.canonical() == plan.canonical()
    assert again.tables() == plan.tables()
    assert again.to_toml() == text
    assert again.run == plan.run
    assert [one.settings() for one in again.passes] == [one.settings() for one in plan.passes]
    for name in ("a", "b", "c", "x.a", "q"):
        assert [one.for_linear(name) for one in again.passes] == [one.for_linear(name) for one in plan.passes]
    jsonschema.validate(tomllib.loads(text), json_schema())


def test_a_plan_built_in_python_runs(folder: Path) -> None:
    plan = Plan(
        model=Model(path="model"),
        calibration=Calibration(source="text.txt", samples=2, length=16),
        run=Run(output="here", device="cpu", threads=1),
        passes=[Wanda(sparsity=0.5)],
    )
    report = compress.run(plan)
    assert report.output.linear_sparsity == 0.5
    assert load_plan(folder / "here" / "plan.toml").canonical() == plan.canonical()
    with pytest.raises(compress.PlanError, match="another plan"):
        compress.run(plan.model_copy(update={"passes": (Wanda(sparsity=0.25),)}))


def test_a_plan_is_frozen() -> None:
    with pytest.raises(ValueError, match="frozen"):
        PLANS[0].run.output = "elsewhere"  # type: ignore[misc]


# ------------------------------------------------------------------ schema

GOOD = [
    PLAN,
    but("wanda", "magnitude"),
    but("wanda", "sparsegpt"),
    but("sparsity = 0.5", 'pattern = "2:4"'),
    but("wanda", "tests.test_cli:Slow"),
    PLAN + 'except = "*.q_proj"\n',
    PLAN + 'match = ["*.q_proj", "*.k_proj"]\n',
    PLAN + WHERE + "sparsity = 0.1\n",
    PLAN + WHERE + 'pattern = "1:4"\n',
    PLAN + "[[export]]\nshard_size = 1000\n",
    PLAN + '[[export]]\nformat = "huggingface"\nshard_size = "1.5GB"\n',
    PLAN + '[evaluate]\nperplexity = "wikitext"\n',
    PLAN + '[evaluate]\nperplexity = ["wikitext", "a.txt"]\nwindow = 8\n',
    but("threads = 1", 'memory = "20GiB"'),
    but("threads = 1", "memory = 20000000000"),
    but("threads = 1", 'refresh = "subset"'),
    but('path = "model"', 'path = "a/b"\nrevision = "main"\ntrust_remote_code = true'),
    but("wanda", "sparsegpt") + "damping = 0.1\nleast_squares = true\n",
]
# Of the mistakes above, those that a schema can see: not what depends on the model, nor on two keys at once.
SEEN = [
    "misspelt table",
    "unknown table",
    "misspelt key",
    "unknown key",
    "misspelt pass",
    "pass without use",
    "use is a number",
    "relative module",
    "key of another pass",
    "misspelt setting",
    "Python's name of a table",
    "Python's name of export",
    "Python's name of a key",
    "text for a number",
    "list for a number",
    "number for text",
    "text for a table",
    "one pass, not a list",
    "pass is a list of text",
    "fraction of a sample",
    "no sample",
    "bad choice",
    "bad memory",
    "memory is a truth value",
    "size is a truth value",
    "no output",
    "sparsity 1",
    "sparsity below 0",
    "percent",
    "no pattern",
    "number pattern",
    "where without match",
    "where misspelt",
    "where out of range",
    "unknown format",
    "two formats",
    "no table",
    "no key",
    "no pass",
    "empty",
]


@pytest.mark.parametrize("text", GOOD)
def test_the_schema_and_the_parser_accept_good_plans(text: str) -> None:
    parse_plan(text)
    jsonschema.validate(tomllib.loads(text), json_schema())


@pytest.mark.parametrize("case", SEEN)
def test_the_schema_and_the_parser_refuse_bad_plans(case: str) -> None:
    text = WRONG[case][0]
    with pytest.raises(PlanError):
        parse_plan(text)
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(tomllib.loads(text), json_schema())


def test_the_schema_names_every_key(capsys: pytest.CaptureFixture[str]) -> None:
    schema = json.loads(command(capsys, "schema").out)
    assert schema == json_schema()
    assert schema["properties"].keys() == {"model", "calibration", "run", "pass", "export", "evaluate", "gate", "track"}

    def walk(value: Any, see: Callable[[dict[str, Any]], None]) -> None:
        for item in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
            walk(item, see)
        if isinstance(value, dict):
            see(value)

    references: set[str] = set()
    walk(schema, lambda table: references.add(table["$ref"]) if isinstance(table.get("$ref"), str) else None)
    assert {f"#/$defs/{name}" for name in schema["$defs"]} >= references
