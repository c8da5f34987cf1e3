"""Named sets of scales: what is written, that a swap changes scales and nothing else, and what a kill leaves."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import compress
from compress import barrier
from compress.cli import main
from compress.errors import ModelError, PlanError, RunError
from compress.evals.perplexity import evaluate
from compress.export.reader import open_model
from compress.passes import PEQA, RTN, Magnitude
from compress.swap_scales import ScaledOutput
from compress.training_store import TrainingStore
from tests.conftest import same_bits, some_text, tiny_directory

if TYPE_CHECKING:
    from torch import Tensor

QUANTIZER = RTN(bits=4, group_size=16, scale_dtype="float16")
FORMATS = ("gptq", "compressed-tensors", "packed")
SCALES = {"gptq": "scales", "compressed-tensors": "weight_scale", "packed": "scale"}


def peqa(name: str | None, folder: Path, **settings: Any) -> PEQA:
    """Two looks; the set `b` learns from a text of its own."""
    quick = {"steps": 4, "evaluate_every": 2, "batch_size": 4, "learning_rate": 0.03}
    source = {"source": str(folder / "other.txt")} if name == "b" else {}
    return PEQA(name=name, **quick | source | settings)


def run(folder: Path, *passes: Any, form: str, output: str = "out", **export: Any) -> compress.report.Report:
    plan = compress.Plan(
        model=compress.Model(path=str(folder / "model")),
        calibration=compress.Calibration(source=str(folder / "text.txt"), samples=12, length=32),
        run=compress.Run(output=str(folder / output)),
        passes=passes,
        exports=[compress.Export(format=form, **export)],
    )
    found = compress.check(plan)
    report = compress.run(plan)
    written = [path for path in (folder / output).rglob("*.safetensors*") if path.is_file()]
    assert found["output_bytes"] == report.output.bytes == sum(path.stat().st_size for path in written)
    return report


def everything(directory: Path) -> dict[str, bytes]:
    """Every file of a directory, by its path."""
    return {str(path.relative_to(directory)): path.read_bytes() for path in directory.rglob("*") if path.is_file()}


def tensors(directory: Path) -> dict[str, Tensor]:
    """All tensors of the model's own files, by the safetensors package."""
    return {name: tensor for path in directory.glob("*.safetensors") for name, tensor in load_file(path).items()}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with an output of two sets in each format, of a pruned model; not to be changed."""
    folder = tmp_path_factory.mktemp("sets")
    tiny_directory(folder / "model", "llama", blocks=2)
    (folder / "other.txt").write_text(some_text(3000, seed=7))
    for form in FORMATS:
        run(folder, Magnitude(sparsity=0.3), QUANTIZER, peqa("a", folder), peqa("b", folder), form=form, output=form)
    return folder


@pytest.fixture(params=FORMATS)
def output(request: pytest.FixtureRequest, made: Path, tmp_path: Path) -> Path:
    """A copy of the output in one format."""
    return Path(shutil.copytree(made / request.param, tmp_path / request.param))


# -------------------------------------------------------------- what is written


def test_each_set_has_every_scale(output: Path) -> None:
    """Keys, shapes, dtypes; the model's own files hold the last one; the sets differ."""
    lock = json.loads((output / "lock.json").read_text())
    sets = {name: load_file(output / "scales" / f"{name}.safetensors") for name in ("a", "b")}
    assert lock["scale_sets"] == [
        {"name": name, "bytes": (output / "scales" / f"{name}.safetensors").stat().st_size} for name in ("a", "b")
    ]
    linears = {linear["name"]: linear for linear in lock["linears"]}
    stored = tensors(output)
    for found in sets.values():
        assert set(found) == {f"{name}.scale" for name in linears}
    for name, linear in linears.items():
        rows, columns = linear["shape"]
        one = sets["b"][f"{name}.scale"]
        assert one.shape == (rows, columns // 16)
        assert one.dtype == torch.float16
        assert not torch.equal(one, sets["a"][f"{name}.scale"])
        mine = stored[f"{name}.{SCALES[output.name]}"]
        assert same_bits(mine.T.contiguous() if output.name == "gptq" else mine, one)


def test_sets_do_not_build_on_each_other(made: Path, tmp_path: Path) -> None:
    """The second set is what it would be alone: it began with the quantizer's scales."""
    shutil.copytree(made / "model", tmp_path / "model")
    for name in ("text.txt", "other.txt"):
        shutil.copy(made / name, tmp_path / name)
    alone = peqa("b", made)
    run(tmp_path, Magnitude(sparsity=0.3), QUANTIZER, alone, form="gptq")
    assert (tmp_path / "out/scales/b.safetensors").read_bytes() == (made / "gptq/scales/b.safetensors").read_bytes()


def test_linears_that_a_set_leaves_alone_keep_the_quantizer_s_scales(folder: Path) -> None:
    """Also those that another set trains."""
    first, second = (
        peqa(name, folder, match=match, holdout=0.0) for name, match in (("first", "*.q_proj"), ("second", "*.up_proj"))
    )
    run(folder, QUANTIZER, form="gptq", output="plain")
    run(folder, QUANTIZER, first, second, form="gptq")
    plain = {n: t.T for n, t in tensors(folder / "plain").items() if n.endswith(".scales")}
    for one, trained in (("first", "q_proj"), ("second", "up_proj")):
        for name, scale in load_file(folder / f"out/scales/{one}.safetensors").items():
            same = torch.equal(scale, plain[f"{name}s"])
            assert same != name.endswith(f"{trained}.scale"), (one, name)


def test_sets_after_a_training_without_a_name(folder: Path) -> None:
    """They begin with what it left."""
    run(folder, QUANTIZER, peqa(None, folder), form="gptq", output="plain")
    run(folder, QUANTIZER, peqa(None, folder), peqa("a", folder), peqa("c", folder, learning_rate=1e-12), form="gptq")
    assert (folder / "out/model.safetensors").read_bytes() == (folder / "plain/model.safetensors").read_bytes()


class _Stopped(Exception):
    pass


@pytest.mark.parametrize("point", ["training b", "commit a"])
def test_a_resumed_run_has_the_same_bytes(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, point: str
) -> None:
    """Stopped in the training of a set, or between the blocks of its result."""
    for name in ("model", "text.txt", "other.txt"):
        (shutil.copytree if (made / name).is_dir() else shutil.copy)(made / name, tmp_path / name)
    passes = (Magnitude(sparsity=0.3), QUANTIZER, peqa("a", made), peqa("b", made))
    what, which = point.split()
    owner: Any = TrainingStore if what == "training" else barrier.Barrier
    method = "save" if what == "training" else "_commit_block"
    original, left = getattr(owner, method), [2 if which == "a" else 4]  # two looks, two blocks

    def stop(self: Any, *arguments: Any) -> Any:
        left[0] -= 1
        if left[0] == 0:
            raise _Stopped
        return original(self, *arguments)

    with monkeypatch.context() as patched:
        patched.setattr(owner, method, stop)
        with pytest.raises(_Stopped):
            run(tmp_path, *passes, form="gptq", output="gptq")
    assert not (tmp_path / "gptq").exists()
    assert run(tmp_path, *passes, form="gptq", output="gptq").resumed == 1
    for part in (".", "scales"):
        ours, theirs = (
            {p.name: p.read_bytes() for p in (f / "gptq" / part).glob("*.safetensors")} for f in (tmp_path, made)
        )
        assert ours == theirs


def test_another_text_is_another_run(made: Path, tmp_path: Path) -> None:
    """A finished output is known by the texts of its sets, too."""
    for name in ("model", "text.txt", "other.txt", "gptq"):
        (shutil.copytree if (made / name).is_dir() else shutil.copy)(made / name, tmp_path / name)
    plan = compress.load_plan(tmp_path / "gptq/plan.toml")
    source = str(tmp_path / "other.txt")
    passes = (*plan.passes[:3], plan.passes[3].with_settings({"source": source}))
    moved = plan.model_copy(update={"run": compress.Run(output=str(tmp_path / "out")), "passes": passes})
    compress.run(moved)
    compress.run(moved)
    (tmp_path / "other.txt").write_text(some_text(3000, seed=8))
    with pytest.raises(PlanError, match="holds the result of another plan"):
        compress.run(moved)


def test_a_damaged_set_is_not_published(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from compress import execution

    def damaged(lock: Any, kept: Any, directory: Path) -> None:
        original(lock, kept, directory)
        path = directory / "scales" / "a.safetensors"
        data = bytearray(path.read_bytes())
        data[-1] ^= 1
        path.write_bytes(bytes(data))

    original = execution.write_sets
    monkeypatch.setattr(execution, "write_sets", damaged)
    with pytest.raises(RunError, match="of the set a differs from what was trained"):
        run(folder, QUANTIZER, peqa("a", folder), form="gptq")
    assert not (folder / "out").exists()


# ------------------------------------------------------------------- the swap


def test_there_and_back_is_identical(output: Path) -> None:
    """Each swap changes scales only, and what is read afterwards is codes times the set's scales."""
    at_b, last = everything(output), tensors(output)
    assert ScaledOutput(output).active() == ("b",)
    found = ScaledOutput(output).swap("a")
    assert (found.name, found.before, found.linears, found.files) == ("a", ("b",), 14, ("model.safetensors",))
    assert ScaledOutput(output).active() == ("a",)
    at_a, first = everything(output), tensors(output)
    assert {name for name in at_b if at_a[name] != at_b[name]} == {"model.safetensors"}
    assert at_a.keys() == at_b.keys()
    changed = {name for name in last if not same_bits(first[name], last[name])}
    assert changed == {name for name in last if name.endswith(f".{SCALES[output.name]}")}
    wanted, weights = load_file(output / "scales/a.safetensors"), open_model(output)[1]
    ScaledOutput(output).swap("b")
    assert everything(output) == at_b
    before = open_model(output)[1]
    for name, scale in wanted.items():
        weight = f"{name.removesuffix('.scale')}.weight"
        ScaledOutput(output).swap("b")
        old = load_file(output / "scales/b.safetensors")[name].repeat_interleave(16, 1).double()
        steps = (before.read(weight).double() / old).round()
        ScaledOutput(output).swap("a")
        assert torch.equal(weights.read(weight), (steps * scale.repeat_interleave(16, 1)).float()), name


def test_a_swapped_output_is_the_run_that_ended_with_the_set(made: Path, output: Path, tmp_path: Path) -> None:
    for name in ("model", "text.txt"):
        (shutil.copytree if (made / name).is_dir() else shutil.copy)(made / name, tmp_path / name)
    run(tmp_path, Magnitude(sparsity=0.3), QUANTIZER, peqa("a", made), form=output.name)
    ScaledOutput(output).swap("a")
    assert (output / "model.safetensors").read_bytes() == (tmp_path / "out/model.safetensors").read_bytes()
    settings = compress.Evaluate(perplexity=(str(made / "text.txt"),), window=32, windows=4)
    (ours,), (theirs,) = evaluate(output, settings), evaluate(tmp_path / "out", settings)
    assert ours.compressed == theirs.compressed


@pytest.fixture(scope="module")
def sharded(made: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same sets, with the weights in several files."""
    folder = tmp_path_factory.mktemp("sharded")
    for name in ("model", "text.txt"):
        (shutil.copytree if (made / name).is_dir() else shutil.copy)(made / name, folder / name)
    run(folder, QUANTIZER, peqa("a", made), peqa("b", made), form="compressed-tensors", shard_size=9000)
    return folder / "out"


def test_several_files(sharded: Path, tmp_path: Path) -> None:
    output = Path(shutil.copytree(sharded, tmp_path / "out"))
    before = everything(output)
    found = ScaledOutput(output).swap("a")
    assert len(found.files) > 1
    assert ScaledOutput(output).active() == ("a",)
    ScaledOutput(output).swap("b")
    assert everything(output) == before


@pytest.mark.parametrize("point", ["copy", "rename"])
@pytest.mark.parametrize("number", [0, 1])
def test_a_stop_leaves_old_or_new_files(
    sharded: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, point: str, number: int
) -> None:
    """Before the first rename nothing has changed; after it each file is old or new, and a swap mends it."""
    output = Path(shutil.copytree(sharded, tmp_path / "out"))
    old = everything(output)
    ScaledOutput(output).swap("a")
    new = everything(output)
    ScaledOutput(output).swap("b")
    name = "copyfile" if point == "copy" else "replace"
    owner: Any = shutil if point == "copy" else Path
    original, left = getattr(owner, name), [number]

    def stop(*arguments: Any) -> Any:
        left[0] -= 1
        if left[0] < 0:
            raise _Stopped
        return original(*arguments)

    with monkeypatch.context() as patched:
        patched.setattr(owner, name, stop)
        with pytest.raises(_Stopped):
            ScaledOutput(output).swap("a")
    now = everything(output)
    assert all(data in (old[file], new[file]) for file, data in now.items())
    assert now.keys() == old.keys()
    assert (now != old) == (point == "rename" and number == 1)
    if now != old:
        assert ScaledOutput(output).active() == ()
    ScaledOutput(output).swap("a")
    assert everything(output) == new


def test_a_copy_that_a_kill_left_does_no_harm(output: Path) -> None:
    (output / ".model.safetensors.swap").write_bytes(b"half")
    ScaledOutput(output).swap("a")
    assert ScaledOutput(output).active() == ("a",)
    assert not (output / ".model.safetensors.swap").exists()


# ----------------------------------------------------------------- the command


def said(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str]:
    code = main(list(arguments))
    printed = capsys.readouterr()
    return code, printed.out + printed.err


def test_the_command(output: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert said(capsys, "swap-scales", str(output)) == (0, "a\nb  active\n")
    code, text = said(capsys, "swap-scales", str(output), "a")
    assert code == 0
    size = sum(t.nbytes for t in load_file(output / "scales/a.safetensors").values())
    assert (
        text
        == f"{output} now has the scales a, no longer b: {size:,} bytes of scales of 14 linears, in model.safetensors\n"
    )
    assert said(capsys, "swap-scales", str(output)) == (0, "a  active\nb\n")
    code, text = said(capsys, "swap-scales", str(output), "a")
    assert (code, "already" in text, "nothing was written" in text) == (0, True, True)
    code, text = said(capsys, "--help")
    assert "swap-scales" in text
    code, text = said(capsys, "swap-scale", str(output), "a")
    assert (code, 'did you mean "swap-scales"?' in text) == (2, True)


def test_an_unknown_set(made: Path, output: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (output / "scales/stories.safetensors").write_bytes((output / "scales/a.safetensors").read_bytes())
    code, text = said(capsys, "swap-scales", str(output), "storys")
    assert code == 2
    assert 'no set of scales "storys"; did you mean "stories"?' in text
    assert "the sets are a, b, stories" in text
    assert "no set of scales" in said(capsys, "swap-scales", str(output), "../scales/a")[1]


def test_what_has_no_sets(made: Path, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, text = said(capsys, "swap-scales", str(folder / "none"), "a")
    assert (code, "no such directory" in text) == (2, True)
    code, text = said(capsys, "swap-scales", str(folder / "model"), "a")
    assert (code, "holds no sets of scales" in text) == (2, True)


def test_plain_weights_are_refused(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Codes are not there; `check` says so beforehand."""
    report = run(folder, QUANTIZER, peqa("a", folder), form="huggingface")
    assert any("swap-scales needs codes" in warning for warning in report.warnings)
    assert (folder / "out/scales/a.safetensors").is_file()
    code, text = said(capsys, "swap-scales", str(folder / "out"), "a")
    assert code == 2
    assert 'format = "gptq", "compressed-tensors" or "packed"' in text


def replaced(output: Path, change: Any) -> None:
    """Change the tensors of the set a."""
    path = output / "scales/a.safetensors"
    found = load_file(path)
    change(found)
    save_file(found, path)


def test_sets_that_do_not_fit_are_refused(output: Path) -> None:
    before = tensors(output)
    good = (output / "scales/a.safetensors").read_bytes()
    name = sorted(load_file(output / "scales/a.safetensors"))[0]
    changes: list[tuple[str, Any]] = [
        ("is in only one of the set and the model", lambda one: one.pop(name)),
        ("another shape or dtype", lambda one: one.update({name: one[name].float()})),
        ("another shape or dtype", lambda one: one.update({name: one[name][1:].contiguous()})),
        ("not positive numbers", lambda one: one.update({name: -one[name]})),
        ("not positive numbers", lambda one: one.update({name: one[name] * torch.inf})),
        ("not positive numbers", lambda one: one.update({name: one[name].flatten()})),
    ]
    for message, change in changes:
        (output / "scales/a.safetensors").write_bytes(good)
        replaced(output, change)
        with pytest.raises(ModelError, match=message) as caught:
            ScaledOutput(output).swap("a")
        assert "a.safetensors" in str(caught.value)
    (output / "scales/a.safetensors").write_bytes(good[:-3])
    with pytest.raises(ModelError, match="truncated"):
        ScaledOutput(output).swap("a")
    assert all(same_bits(tensor, before[key]) for key, tensor in tensors(output).items())


def test_a_lock_of_another_model_is_refused(output: Path) -> None:
    lock = json.loads((output / "lock.json").read_text())
    lock["linears"][0]["tensor"] = "model.layers.9.weight"
    (output / "lock.json").write_text(json.dumps(lock))
    with pytest.raises(ModelError, match="do not belong together"):
        ScaledOutput(output)


def test_two_swaps_exclude_each_other(output: Path) -> None:
    handle = os.open(output / "scales", os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        with pytest.raises(PlanError, match="another swap"):
            ScaledOutput(output).swap("a")
    finally:
        os.close(handle)
    ScaledOutput(output).swap("a")


def test_transformers_reads_the_swapped_one(made: Path, tmp_path: Path) -> None:
    """Its logits are those of the plain model with the weights as our reader decodes them, and not those before."""
    pytest.importorskip("compressed_tensors", reason="install the extra: pip install '.[readers]'")
    from transformers import AutoModelForCausalLM

    output = Path(shutil.copytree(made / "compressed-tensors", tmp_path / "out"))
    ids = torch.arange(3, 27).unsqueeze(0)
    logits = {}
    for name in ("b", "a"):
        ScaledOutput(output).swap(name)
        theirs = AutoModelForCausalLM.from_pretrained(output, dtype=torch.float32).eval()
        config, ours = open_model(output)
        plain = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
        plain.load_state_dict({key: ours.read(key).float() for key in ours.tensors}, strict=False)
        plain.tie_weights()
        with torch.no_grad():
            logits[name] = theirs(ids).logits
            assert torch.allclose(logits[name], plain(ids).logits, rtol=1e-3, atol=1e-3)
    assert float((logits["a"] - logits["b"]).abs().max()) > 0.01
