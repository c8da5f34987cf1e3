"""What the lock refuses of quantizers: orders, groups, grids that a format or its readers do not hold."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from compress.compiling import compile_plan
from compress.plan import load_plan
from compress.rules import RULES
from tests.conftest import tiny_directory
from tests.test_cli import PLAN, command, refused

HEAD = PLAN[: PLAN.index("[[pass]]")]
FIRST = HEAD.count("\n") + 1  # the line of the first [[pass]]
RTN = 'use = "rtn"\ngroup_size = 16'
GPTQ = 'use = "gptq"\ngroup_size = 16'
JOINT = 'use = "sparsegpt"\nsparsity = 0.5\nbits = 4\ngroup_size = 16'
SPARSEGPT = 'use = "sparsegpt"\nsparsity = 0.5'
WANDA = 'use = "wanda"\npattern = "2:4"'
MAGNITUDE = 'use = "magnitude"\nsparsity = 0.5'


def write(*passes: str, form: str | None = None) -> None:
    """A plan of these passes: each is the text of a table."""
    export = f'[[export]]\nformat = "{form}"\n' if form else ""
    Path("plan.toml").write_text(HEAD + export + "".join(f"[[pass]]\n{one}\n" for one in passes))


def message(capsys: pytest.CaptureFixture[str]) -> str:
    """What the command says, its lines as one; nothing was written."""
    found = refused(capsys, "plan.toml")
    assert not Path("out").exists()
    assert not Path(".out.compress").exists()
    return " ".join(found.split())


def assert_accepted() -> None:
    compile_plan(load_plan("plan.toml"))


@pytest.fixture(params=["gptq", "compressed-tensors"])
def form(request: pytest.FixtureRequest) -> str:
    return str(request.param)


# ---------------------------------------------------------------- order


@pytest.mark.parametrize(
    ("first", "second", "use", "made", "rule", "fix"),
    [
        (RTN, SPARSEGPT, "sparsegpt", "rtn", 3, "prune first"),
        (GPTQ, SPARSEGPT, "sparsegpt", "gptq", 3, "prune first"),
        (GPTQ, JOINT, "sparsegpt", "gptq", 3, "leave one of the two out: a linear has one grid"),
        (JOINT, SPARSEGPT, "sparsegpt", "sparsegpt", 3, "prune first"),
        (JOINT, GPTQ, "gptq", "sparsegpt", 5, "leave one of the two out: a linear has one grid"),
        (RTN, RTN, "rtn", "rtn", 5, "leave one of the two out: a linear has one grid"),
        (RTN, GPTQ, "gptq", "rtn", 5, "leave one of the two out: a linear has one grid"),
    ],
)
def test_what_moves_weights_after_a_grid_is_refused_by_its_rule(
    first: str, second: str, use: str, made: str, rule: int, fix: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write(first, second)
    found = message(capsys)
    line = FIRST + first.count("\n") + 2
    assert f"plan.toml:{line}: pass[1]: {use} would break the grid that pass[0] {made} makes for model.layers" in found
    assert f"rule {rule}: {RULES[rule][0]}" in found
    assert f"fix: {fix}" in found


@pytest.mark.parametrize(
    "passes",
    [
        (SPARSEGPT, GPTQ),
        (WANDA, MAGNITUDE, RTN),
        (WANDA, JOINT),
        (RTN, WANDA),
        (JOINT, MAGNITUDE),
        (RTN + '\nmatch = "*.q_proj"', SPARSEGPT + '\nexcept = "*.q_proj"'),  # never on the same linear
        (RTN + '\nmatch = "*.mlp.*"', GPTQ + '\nmatch = "*.self_attn.*"'),
    ],
)
def test_orders_that_are_fine(passes: tuple[str, ...], folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(*passes)
    assert_accepted()


def test_bits_that_only_a_where_asks_for_count(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    where = '\n[[pass.where]]\nmatch = "*.1.mlp.down_proj"\nbits = 4\ngroup_size = 16'
    write(SPARSEGPT + where, SPARSEGPT)
    found = message(capsys)
    assert "sparsegpt would break the grid that pass[0] sparsegpt makes for model.layers.1.mlp.down_proj" in found
    write(SPARSEGPT + where)
    grids = {linear.name: linear.grid for linear in compile_plan(load_plan("plan.toml")).linears}
    assert [name for name, grid in grids.items() if grid] == ["model.layers.1.mlp.down_proj"]


# ---------------------------------------------------------------- groups


@pytest.mark.parametrize("one", [RTN, JOINT])
def test_a_group_that_does_not_divide_a_width_lists_those_that_do(
    one: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write(one.replace("group_size = 16", "group_size = 32"))  # of 32, but not of 48
    found = message(capsys)
    assert f"plan.toml:{FIRST}" in found
    assert "model.layers.0.mlp.down_proj: group_size 32 does not divide the input width 48" in found
    assert "fix: choose among 48, 24, 16, 12, 8; or -1, one scale per row" in found
    for size in (48, 24, 16, 12, 8, -1):  # and these are true
        write(one.replace("group_size = 16", f'group_size = {size}\nmatch = "*.down_proj"'))
        assert_accepted()


def test_a_group_of_a_where_is_blamed_on_the_where(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(RTN + '\n[[pass.where]]\nmatch = "*.down_proj"\ngroup_size = 32')
    assert f"plan.toml:{FIRST + 3}: pass[0].where[0]" in message(capsys)


def test_without_a_group_size_the_default_must_divide_too(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write('use = "rtn"')
    assert "group_size 128 does not divide the input width 32" in message(capsys)


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ("bits = 5", "no grid has 5 bits"),
        ("bits = 16", "no grid has 16 bits"),
        ("group_size = 0", "group_size is 0"),
        ("group_size = -2", "greater than or equal to -1"),
        ('scale_dtype = "int8"', "scale_dtype"),
        ('clip = "max"', "clip"),
        ("bit = 4", 'did you mean "bits"?'),
        ("sparsity = 0.5", 'unknown key "sparsity"'),
    ],
)
def test_settings_that_do_not_exist(settings: str, says: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(f'use = "rtn"\n{settings}')
    found = message(capsys)
    assert says in found
    assert f"plan.toml:{FIRST + 2}" in found


# ---------------------------------------------------------------- formats


def test_a_grid_that_fills_no_whole_words_is_refused_by_gptq_only(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    one = RTN + "\nbits = 3"
    for name, problem in (("mlp.down_proj", "48 input features"), ("self_attn.k_proj", "16 output features")):
        write(one + f'\nmatch = "*.{name}"', form="gptq")  # 144 and 48 bits
        found = message(capsys)
        assert f"plan.toml:{FIRST + 2}: pass[0]" in found
        assert f"the format gptq cannot hold it: model.layers.0.{name}: {problem} of 3 bits do not fill" in found
        assert "an [[export]] format that holds it: huggingface, compressed-tensors" in found
    for other in ("huggingface", "compressed-tensors"):
        write(one, form=other)
        assert_accepted()


def test_a_group_that_readers_of_gptq_do_not_take(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(RTN.replace("16", "8"), form="gptq")
    found = message(capsys)
    assert "its readers take group sizes -1, 16, 32, 64, 128, 256, 512, 1024, not 8" in found
    assert "format that holds it: huggingface, compressed-tensors" in found
    write(RTN.replace("16", "8"), form="compressed-tensors")
    assert_accepted()


def test_the_pass_that_makes_the_grid_is_blamed_for_it(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(WANDA, RTN.replace("16", "8"), MAGNITUDE, form="gptq")
    assert f"plan.toml:{FIRST + 2 + WANDA.count(chr(10)) + 2}: pass[1]" in message(capsys)


def test_transposed_linears_are_refused_by_compressed_tensors(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    tiny_directory(tmp_path / "model", "gpt2", blocks=1)
    monkeypatch.chdir(tmp_path)
    write(RTN, form="compressed-tensors")
    found = message(capsys)
    assert f"plan.toml:{FIRST + 2}: pass[0]" in found
    assert "transformer.h.0.attn.c_attn: its readers do not take transposed linears (Conv1D)" in found
    assert "format that holds it: huggingface, gptq" in found
    write(RTN, form="gptq")
    assert_accepted()


def test_symmetric_and_asymmetric_grids_in_one_gptq_checkpoint(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    mixed = RTN + '\n[[pass.where]]\nmatch = "*.down_proj"\nsymmetric = false'
    write(mixed, form="gptq")
    found = message(capsys)
    assert f"plan.toml:{HEAD.count(chr(10)) + 2}: export[0].format" in found
    assert "the format gptq cannot hold it: one checkpoint of it has symmetric grids or asymmetric ones" in found
    assert "format that holds it: huggingface, compressed-tensors" in found
    for other in ("huggingface", "compressed-tensors"):
        write(mixed, form=other)
        assert_accepted()
    for symmetric in ("true", "false"):
        write(f"{RTN}\nsymmetric = {symmetric}", form="gptq")
        assert_accepted()


@pytest.mark.parametrize(
    ("stored", "scale", "fits"),
    [
        ("float16", "bfloat16", False),
        ("float16", "float32", False),
        ("float16", "float16", True),
        ("bfloat16", "float16", False),
        ("bfloat16", "float32", False),
        ("bfloat16", "bfloat16", True),
        ("bfloat16", "auto", True),
        ("float32", "float16", True),
        ("float32", "bfloat16", True),
    ],
)
def test_scales_must_be_values_of_the_checkpoints_dtype(
    stored: str,
    scale: str,
    fits: bool,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    tiny_directory(tmp_path / "model", "llama", blocks=1, dtype=getattr(torch, stored))
    monkeypatch.chdir(tmp_path)
    for form in ("huggingface", "gptq", "compressed-tensors"):
        write(f'{RTN}\nscale_dtype = "{scale}"', form=form)
        if fits:
            assert_accepted()
            continue
        found = message(capsys)
        assert f"plan.toml:{FIRST + 2 + 3}: pass[0].scale_dtype" in found
        assert f"readers cast {scale} scales to the model's {'BF16' if stored == 'bfloat16' else 'F16'}" in found
        assert "which does not hold them" in found
        assert 'leave scale_dtype out: "auto"' in found


def test_an_unknown_format_is_refused(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(RTN, form="gguf")
    found = message(capsys)
    assert f"plan.toml:{HEAD.count(chr(10)) + 2}: export[0].format" in found
    assert "gptq" in found
    assert "compressed-tensors" in found


# ---------------------------------------------------------------- what the lock says of grids


def test_the_lock_names_the_grid_of_every_linear(folder: Path, form: str) -> None:
    write(
        RTN + '\nexcept = "*.up_proj"\n[[pass.where]]\nmatch = "*.v_proj"\nbits = 8',
        WANDA + '\nmatch = "*.down_proj"',
        form=form,
    )
    lock = compile_plan(load_plan("plan.toml"))
    grids = {linear["name"]: linear["grid"] for linear in lock.to_json()["linears"]}
    for name, grid in grids.items():
        leaf = name.rpartition(".")[2]
        bits = 8 if leaf == "v_proj" else 4
        wanted = {"bits": bits, "group_size": 16, "symmetric": True}
        assert grid == (None if leaf == "up_proj" else wanted), name
    assert {linear.name.rpartition(".")[2] for linear in lock.linears if linear.masked} == {"down_proj"}
    assert lock.to_json()["format"] == form
    json.dumps(lock.to_json())
    assert compile_plan(load_plan("plan.toml")).digest() == lock.digest()
    write(RTN, form=form)
    assert compile_plan(load_plan("plan.toml")).digest() != lock.digest()


@pytest.mark.parametrize(
    ("passes", "form", "says"),
    [
        ((RTN + '\n[[pass.where]]\nmatch = "*.v_proj"\nbits = 8',), "gptq", "linears have different grids"),
        ((RTN + '\n[[pass.where]]\nmatch = "*.v_proj"\nbits = 8',), "compressed-tensors", "vLLM fuses them"),
        ((RTN + "\nbits = 2",), "compressed-tensors", "vLLM reads 4 and 8 bits of this format, not 2"),
    ],
)
def test_what_some_readers_refuse_is_warned_about(
    passes: tuple[str, ...], form: str, says: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write(*passes, form=form)
    assert any(says in warning for warning in compile_plan(load_plan("plan.toml")).warnings)
    assert says in " ".join(command(capsys, "check", "plan.toml").out.split())
    write(*passes, form="huggingface")
    assert not any(says in warning for warning in compile_plan(load_plan("plan.toml")).warnings)
    write(RTN, form=form)
    assert not any(says in warning for warning in compile_plan(load_plan("plan.toml")).warnings)
