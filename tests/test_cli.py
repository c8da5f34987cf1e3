"""The command as a user meets it: words, options, exit codes, outputs that exist, full disks, signals."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import jsonschema
import pytest

from compress.cli import main
from compress.passes import Wanda
from tests.conftest import REFERENCE, ROOT, files_of

if TYPE_CHECKING:
    from collections.abc import Iterator

    from compress.passes import LinearState, Moments, Note

PLAN = """\
[model]
path = "model"
[calibration]
source = "text.txt"
samples = 2
length = 16
[run]
output = "out"
device = "cpu"
threads = 1
[[pass]]
use = "wanda"
sparsity = 0.5
"""
LAYER = "model.layers.0.mlp.down_proj"


class Slow(Wanda):
    """Wanda that never ends in the second block when the environment says so: something to interrupt."""

    def apply(self, linear: LinearState, moments: Moments) -> Note:
        if ".layers.1." in linear.name:
            time.sleep(float(os.environ.get("COMPRESS_TEST_SLEEP", "0")))
        return super().apply(linear, moments)


class Result(NamedTuple):
    code: int
    out: str
    err: str


def command(capsys: pytest.CaptureFixture[str], *arguments: object) -> Result:
    """Run the command in this process; whatever happens, a user never sees a traceback."""
    capsys.readouterr()
    code = main([str(argument) for argument in arguments])
    captured = capsys.readouterr()
    assert "Traceback" not in captured.err + captured.out
    if code in (2, 3):
        assert captured.err.startswith("error: ")
        assert "\nfix: " in captured.err
    return Result(code, captured.out, captured.err)


def refused(capsys: pytest.CaptureFixture[str], *arguments: object, code: int = 2) -> str:
    """The message of a command that must fail."""
    result = command(capsys, *arguments)
    assert result.code == code, result
    return result.err


@pytest.fixture
def folder(folder: Path) -> Path:
    """The working directory, with a model and a plan."""
    (folder / "plan.toml").write_text(PLAN)
    return folder


@pytest.fixture(scope="module")
def expected(tiny_source: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The files of an uninterrupted run."""
    source = tmp_path_factory.mktemp("expected")
    shutil.copytree(tiny_source, source, dirs_exist_ok=True)
    (source / "plan.toml").write_text(PLAN)
    with contextlib.chdir(source):
        assert main(["plan.toml"]) == 0
    return files_of(source / "out")


def left_behind(folder: Path) -> list[str]:
    """What is in the folder that was not there before."""
    return sorted({path.name for path in folder.iterdir()} - {"model", "text.txt", "plan.toml"})


# ------------------------------------------------------------------ words


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ([], "PLAN requires an argument"),
        (["check"], "PLAN requires an argument"),
        (["chekc", "plan.toml"], "plan.toml"),
        (["plan.toml", "extra"], "extra"),
        (["plan.toml", "--overwite"], "--overwrite"),
        (["explain", "plan.toml"], "LAYER"),
        (["eval", "model"], "--text"),
        (["eval", "nowhere", "--text", "text.txt"], "nowhere: no such directory"),
        (["eval", "model", "--text", "text.txt", "--window", "many"], "window"),
        (["eval", "model", "--text", "text.txt", "--window", "8", "--stride", "9"], "stride"),
        (["report", "model"], "report.json"),
        (["explain", "plan.toml", "model.layers.0.mlp.down_porj"], f'did you mean "{LAYER}"?'),
        (["plna.toml"], 'no such plan; did you mean "plan.toml"?'),
        (["evl"], 'no such plan or command; did you mean "eval"?'),
    ],
)
def test_a_wrong_command_line_is_one_message(
    arguments: list[str], says: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert says in refused(capsys, *arguments)
    assert left_behind(folder) == []


def test_only_a_word_that_is_no_command_is_guessed(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "requires an argument\nfix" in refused(capsys, "eval")
    assert "['plan.toml']; did you mean \"check\"?" in refused(capsys, "chekc", "plan.toml")


@pytest.mark.parametrize("option", ["--help", "-h", "--version"])
def test_help_and_version(option: str, capsys: pytest.CaptureFixture[str]) -> None:
    result = command(capsys, option)
    assert result.code == 0
    assert ("resumes it" if "h" in option else "0.1.0") in result.out


@pytest.mark.parametrize("budgeted", ['use = "lqlora"\nbudget = 8\nchoices_group = [16]', 'use = "eora"\nbudget = 50'])
def test_check_says_where_a_budget_decides(budgeted: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with (folder / "plan.toml").open("a") as plan:
        plan.write(f"\n[[pass]]\n{budgeted}\nrank = 2\n")
    shown = command(capsys, "check", "plan.toml")
    found = json.loads(command(capsys, "check", "plan.toml", "--json").out)
    assert f"{found['output_bytes']:,} bytes, at most" in shown.out


def test_check_prints_what_the_run_then_writes(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shown = command(capsys, "check", "plan.toml")
    found = json.loads(command(capsys, "check", "plan.toml", "--json").out)
    assert f"{found['output_bytes']:,} bytes, exactly" in shown.out
    assert found["passes"][0] | {"use": "wanda", "linears": 14, "overridden": 0} == found["passes"][0]
    assert max(map(len, shown.out.splitlines())) <= max(80, len(str(folder)) + 80)
    assert left_behind(folder) == []
    assert command(capsys, "plan.toml").code == 0
    for file in found["files"]:
        assert (folder / "out" / file["name"]).stat().st_size == file["bytes"]
    written = json.loads((folder / "out" / "lock.json").read_text())
    assert set(written.pop("made_of")) == {"model", "data"}
    assert written == found["lock"]


def test_check_shows_what_is_turned_off(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What is false by default is left out, what the plan makes false is not."""
    rtn = '[[pass]]\nuse = "rtn"\ngroup_size = -1\n'
    (folder / "plan.toml").write_text(PLAN.partition("[[pass]]")[0] + rtn + "symmetric = false\n")
    shown = command(capsys, "check", "plan.toml").out
    assert "symmetric=false" in shown
    assert "rescale" not in shown
    (folder / "plan.toml").write_text(PLAN.partition("[[pass]]")[0] + rtn)
    assert "symmetric=true" in command(capsys, "check", "plan.toml").out


def test_explain_tells_where_each_setting_comes_from(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = PLAN + 'except = "*.k_proj"\n\n[[pass.where]]\nmatch = "*.down_proj"\nsparsity = 0.25  # gentler\n'
    (folder / "plan.toml").write_text(text)
    found = json.loads(command(capsys, "explain", "plan.toml", LAYER, "--json").out)
    origin = {one["key"]: (one["value"], one["from"]) for one in found["passes"][0]["settings"]}
    assert origin["sparsity"] == (0.25, "plan.toml:18")
    assert origin["scope"] == ("row", "default")
    found = json.loads(command(capsys, "explain", "plan.toml", "model.layers.1.mlp.up_proj", "--json").out)
    origin = {one["key"]: (one["value"], one["from"]) for one in found["passes"][0]["settings"]}
    assert origin["sparsity"] == (0.5, "plan.toml:13")
    assert found["inputs_shared_with"] == ["model.layers.1.mlp.gate_proj", "model.layers.1.mlp.up_proj"]
    skipped = command(capsys, "explain", "plan.toml", "model.layers.1.self_attn.k_proj")
    assert "pass[0] wanda  skipped: an except pattern matches" in skipped.out


def test_explain_never_cuts_a_line_number(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    deep = folder / ("a_rather_long_folder_name_" * 4)
    deep.mkdir()
    (deep / "plan.toml").write_text(PLAN.replace('"model"', '"../model"').replace("text.txt", "../text.txt"))
    result = command(capsys, "explain", deep / "plan.toml", LAYER)
    assert f"{deep}/plan.toml:13" in result.out


def test_names_with_brackets_are_shown_as_they_are(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Rich takes [bold] and [/x] for markup; a folder may be called so."""
    (folder / "model").rename(folder / "m[bold]")
    (folder / "plan.toml").write_text(PLAN.replace('"model"', '"m[bold]"').replace('"out"', '"o[bold]"'))
    assert "m[bold]: llama" in command(capsys, "check", "plan.toml").out
    result = command(capsys, "plan.toml")
    assert result.code == 0
    assert "report o[bold]/report.html" in result.out
    assert "o[bold]" in command(capsys, "report", "o[bold]").out


def test_report_prints_it_again(folder: Path, expected: dict[str, bytes], capsys: pytest.CaptureFixture[str]) -> None:
    assert command(capsys, "plan.toml").code == 0
    assert "pruned in linears" in command(capsys, "report", "out").out
    assert json.loads(command(capsys, "report", "out", "--json").out)["linears"]
    assert files_of(folder / "out") == expected


def test_the_working_directory_changes_no_byte(
    folder: Path, expected: dict[str, bytes], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir("/")
    assert command(capsys, folder / "plan.toml").code == 0
    assert files_of(folder / "out") == expected


def test_schema_is_a_schema(capsys: pytest.CaptureFixture[str]) -> None:
    schema = json.loads(command(capsys, "schema").out)
    jsonschema.Draft202012Validator.check_schema(schema)


# ----------------------------------------------------- an output that exists


def test_a_finished_plan_is_done_at_once(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert command(capsys, "plan.toml").code == 0
    before = {path.name: path.stat().st_mtime_ns for path in (folder / "out").iterdir()}
    again = command(capsys, "plan.toml")
    assert again.code == 0
    assert "already holds the result of this plan" in again.out
    assert {path.name: path.stat().st_mtime_ns for path in (folder / "out").iterdir()} == before
    assert left_behind(folder) == ["out"]


def test_another_plans_result_is_replaced_only_on_demand(
    folder: Path, expected: dict[str, bytes], capsys: pytest.CaptureFixture[str]
) -> None:
    assert command(capsys, "plan.toml").code == 0
    (folder / "plan.toml").write_text(PLAN.replace("0.5", "0.25"))
    message = refused(capsys, "plan.toml")
    assert "out: holds the result of another plan" in message
    assert "--overwrite" in message
    assert files_of(folder / "out") == expected
    assert command(capsys, "plan.toml", "--overwrite").code == 0
    assert files_of(folder / "out")["plan.toml"] == (folder / "plan.toml").read_bytes()
    assert files_of(folder / "out").keys() == expected.keys()
    assert left_behind(folder) == ["out"]


@pytest.mark.parametrize("overwrite", [[], ["--overwrite"]])
@pytest.mark.parametrize("kind", ["directory", "file", "model itself", "working directory"])
def test_what_is_not_ours_stays_untouched(
    kind: str, overwrite: list[str], folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = {"model itself": "model", "working directory": "."}.get(kind, "out")
    if kind == "directory":
        (folder / "out").mkdir()
        (folder / "out" / "thesis.txt").write_text("years of work")
    elif kind == "file":
        (folder / "out").write_text("years of work")
    (folder / "plan.toml").write_text(PLAN.replace('"out"', f'"{output}"'))
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    message = refused(capsys, "plan.toml", *overwrite)
    wanted = {
        "model itself": "the output is the model directory",
        "working directory": "the output holds the model directory",
    }
    assert wanted.get(kind, "exists and is not an output of compress") in message
    assert "--overwrite" not in message
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize("content", ["{}", '{"name": "another tool"}', "not JSON", "[]"])
def test_a_lock_json_of_another_tool_makes_no_output_of_ours(
    content: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "out").mkdir()
    (folder / "out" / "lock.json").write_text(content)
    (folder / "out" / "thesis.txt").write_text("years of work")
    refused(capsys, "plan.toml")
    refused(capsys, "plan.toml", "--overwrite")
    assert (folder / "out" / "thesis.txt").read_text() == "years of work"


def test_an_empty_directory_is_a_fine_output(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "out").mkdir()
    assert command(capsys, "plan.toml").code == 0


def test_a_link_to_an_empty_directory_is_used_or_refused_before_the_work(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A link to a larger disk: not hours of work, then "Not a directory"."""
    (folder / "disk").mkdir()
    (folder / "out").symlink_to("disk")
    result = command(capsys, "plan.toml")
    assert result.code == 0 or (result.code == 2 and "block" not in result.out)
    if result.code == 0:
        assert (folder / "out" / "model.safetensors").is_file()


# ------------------------------------------------------------------ disks


def test_an_output_that_cannot_be_created(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "file").write_text("in the way")
    (folder / "plan.toml").write_text(PLAN.replace('"out"', '"file/out"'))
    assert "cannot write beside the output" in refused(capsys, "plan.toml")
    (folder / "plan.toml").write_text(PLAN.replace('"out"', f'"{"x" * 300}"'))
    assert "longer than the name of any file" in refused(capsys, "plan.toml")


def test_a_read_only_disk(folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def read_only(self: Path, *_: object, **__: object) -> None:
        raise OSError(errno.EROFS, "Read-only file system", str(self))

    monkeypatch.setattr(Path, "mkdir", read_only)
    message = refused(capsys, "plan.toml")
    assert "out: cannot write beside the output: Read-only file system" in message
    assert left_behind(folder) == []


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_read_only_directory(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder.chmod(0o500)
    try:
        assert "Permission denied" in refused(capsys, "plan.toml")
    finally:
        folder.chmod(0o700)


class Failing:
    """Stands for `os.fsync`; fails with a full disk at its n-th call."""

    def __init__(self, at: int) -> None:
        self.at, self.calls, self.real = at, 0, os.fsync

    def __call__(self, handle: int) -> None:
        self.calls += 1
        if self.calls == self.at:
            raise OSError(errno.ENOSPC, "No space left on device")
        self.real(handle)


def test_a_full_disk_at_any_time_is_resumed(
    folder: Path, expected: dict[str, bytes], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    counter = Failing(0)
    monkeypatch.setattr(os, "fsync", counter)
    assert command(capsys, "plan.toml").code == 0
    total = counter.calls
    assert total > 10
    for at in {1, 2, 3, *range(4, total, 4)}:
        shutil.rmtree(folder / "out")
        monkeypatch.setattr(os, "fsync", Failing(at))
        message = refused(capsys, "plan.toml", code=3)
        assert "No space left on device" in message
        assert "the same command" in message
        assert not (folder / "out").exists()
        assert command(capsys, "plan.toml").code == 0, at
        assert files_of(folder / "out") == expected, at
        assert left_behind(folder) == ["out"]
    shutil.rmtree(folder / "out")
    monkeypatch.setattr(os, "fsync", Failing(total))  # the very last sync comes after the rename: nothing is lost
    assert command(capsys, "plan.toml").code == 0
    assert files_of(folder / "out") == expected
    assert left_behind(folder) == ["out"]


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 2 MB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "none", disk], capture_output=True)
    if mounted.returncode:
        pytest.skip("may not mount a file system")
    yield disk
    subprocess.run(["umount", "-l", disk], check=True)


def test_a_disk_that_is_full_in_earnest(
    small_disk: Path,
    folder: Path,
    expected: dict[str, bytes],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    text = PLAN.replace('"out"', '"disk/out"')
    (folder / "plan.toml").write_text(text.replace('"model"', f'"{REFERENCE}"'))
    message = refused(capsys, "plan.toml")
    assert "plan.toml:8: run.output: the run needs" in message
    assert "are free" in message
    assert list(small_disk.iterdir()) == []

    (folder / "plan.toml").write_text(text)
    monkeypatch.setattr("compress.pipeline.check_disk", lambda _: None)  # somebody else fills the disk meanwhile
    for free in (40, 60):  # KiB
        filler = small_disk / "filler"
        with filler.open("wb") as file:
            file.write(b"x" * (shutil.disk_usage(small_disk).free - (free << 10)))
        result = command(capsys, "plan.toml")
        assert result.code == 3, free
        assert "No space left on device" in result.err
        assert not (small_disk / "out").exists()
        filler.unlink()
    assert command(capsys, "plan.toml").code == 0
    written = files_of(small_disk / "out")
    assert {name: data for name, data in written.items() if name != "plan.toml"} == {
        name: data for name, data in expected.items() if name != "plan.toml"
    }


def test_a_start_that_fails_holds_no_lock(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Within one process, which Python users have."""

    def full(*_: object) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "write", full)
        assert "No space left on device" in refused(capsys, "plan.toml", code=3)
    assert left_behind(folder) == []
    assert command(capsys, "plan.toml").code == 0


def test_a_resumed_run_needs_only_the_rest_of_the_disk(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the journal holds already is not asked for again."""
    needed = json.loads(command(capsys, "check", "plan.toml", "--json").out)["disk_bytes"]
    monkeypatch.setattr("compress.execution.export", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    assert command(capsys, "plan.toml").code == 130
    monkeypatch.undo()
    monkeypatch.chdir(folder)
    held = sum(path.stat().st_size for path in (folder / ".out.compress").rglob("*") if path.is_file())
    real = shutil.disk_usage

    class Usage(NamedTuple):
        free: int

    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(needed - held // 2) if path else real(path))
    assert command(capsys, "plan.toml").code == 0


# -------------------------------------------------- two runs, and signals


def test_the_second_of_two_runs_names_the_first(
    folder: Path, expected: dict[str, bytes], capsys: pytest.CaptureFixture[str]
) -> None:
    work = folder / ".out.compress"
    work.mkdir()
    script = (
        "import fcntl, os, sys, time\n"
        "file = open(sys.argv[1], 'w'); fcntl.flock(file, fcntl.LOCK_EX)\n"
        "print(os.getpid(), file=file, flush=True); print('held', flush=True); time.sleep(60)"
    )
    with subprocess.Popen([sys.executable, "-S", "-c", script, work / "lock"], stdout=subprocess.PIPE) as holder:
        try:
            assert holder.stdout
            assert holder.stdout.readline() == b"held\n"
            message = refused(capsys, "plan.toml")
            assert f"out: another run (process {holder.pid}) is writing this output" in message
            assert work.is_dir()
            refused(capsys, "plan.toml", "--restart")
        finally:
            holder.kill()
    assert command(capsys, "plan.toml").code == 0  # a killed run holds nothing
    assert files_of(folder / "out") == expected


def test_a_signal_interrupts_and_the_same_command_resumes(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    text = PLAN.replace('"wanda"', '"tests.test_cli:Slow"')
    plans = {number: f"{name}.toml" for number, name in ((signal.SIGINT, "int"), (signal.SIGTERM, "term"))}
    for plan in (*plans.values(), "plain.toml"):
        (folder / plan).write_text(text.replace('"out"', f'"{plan}.out"'))
    environment = os.environ | {"PYTHONPATH": str(ROOT), "COMPRESS_TEST_SLEEP": "60", "PYTHONUNBUFFERED": "1"}
    runs = {
        number: subprocess.Popen(
            [sys.executable, "-m", "compress", plan],
            cwd=folder,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            # A shell may start its background jobs with SIGINT ignored.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )
        for number, plan in plans.items()
    }
    try:
        for number, run in runs.items():
            assert run.stdout
            assert any("block 1/2" in line for line in run.stdout)
            run.send_signal(number)
        for run in runs.values():
            _, err = run.communicate(timeout=120)
            assert run.returncode == 130, err
            assert err.startswith("interrupted; ")
            assert "the same command resumes it" in " ".join(err.split())
            assert "Traceback" not in err
    finally:
        for run in runs.values():
            run.kill()
            run.wait()
    assert not any((folder / f"{plan}.out").exists() for plan in plans.values())

    monkeypatch.syspath_prepend(ROOT)
    assert command(capsys, "plain.toml").code == 0
    wanted = files_of(folder / "plain.toml.out")
    for plan in plans.values():
        resumed = command(capsys, plan)
        assert resumed.code == 0
        assert "resuming the run" in resumed.out
        got = files_of(folder / f"{plan}.out")
        assert {n: d for n, d in got.items() if n not in ("plan.toml", "README.md")} == {
            n: d for n, d in wanted.items() if n not in ("plan.toml", "README.md")
        }


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize(
    ("moment", "translated"),
    [("make_tokens", False), ("export", False), ("verify", True)],
    ids=["calibration", "export", "an error made of it"],
)
def test_a_signal_at_other_moments(
    moment: str,
    translated: bool,
    number: int,
    folder: Path,
    expected: dict[str, bytes],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Also where a library makes an error of it, as torch does if it is asked for a shape just then."""

    def interrupted(*_: Any, **__: Any) -> None:
        try:
            os.kill(os.getpid(), number)
            time.sleep(1)
        except KeyboardInterrupt:
            if not translated:
                raise
        raise ValueError("could not determine the shape of object type 'torch.storage.UntypedStorage'")

    # A shell may have started this process, as its background job, with SIGINT ignored.
    handler = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with monkeypatch.context() as patch:
            patch.setattr(f"compress.execution.{moment}", interrupted)
            result = command(capsys, "plan.toml")
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGINT, handler)
    assert result.code == 130
    assert "interrupted; " in result.err
    assert not (folder / "out").exists()
    assert command(capsys, "plan.toml").code == 0
    assert files_of(folder / "out") == expected


@pytest.mark.parametrize("arguments", ["schema", "check plan.toml --json", "--help"])
def test_a_closed_pipe_is_no_error(arguments: str, folder: Path) -> None:
    """``compress schema | head -1``."""
    found = into_closed_pipe(arguments, folder)
    assert (found.code, found.err) == (0, "")


@pytest.mark.parametrize("redirection", ["", "2>&1"])
def test_a_run_goes_on_when_nobody_reads_it(redirection: str, folder: Path, expected: dict[str, bytes]) -> None:
    """``compress plan.toml | head -1``: its result is the directory."""
    assert into_closed_pipe(f"plan.toml {redirection}", folder).code == 0
    assert files_of(folder / "out") == expected


def test_an_error_that_nobody_reads_keeps_its_exit_code(folder: Path) -> None:
    assert into_closed_pipe("plna.toml 2>&1", folder).code == 2


@pytest.mark.parametrize("encoding", ["ascii", "cp1252", "utf-8"])
def test_any_encoding_can_be_written_to(encoding: str, folder: Path, expected: dict[str, bytes]) -> None:
    """A run prints ×, which ASCII lacks; names of files may hold anything; JSON stays JSON."""
    name = "tëxt-模.txt"
    (folder / "text.txt").rename(folder / name)
    (folder / "plan.toml").write_text(PLAN.replace("text.txt", name), encoding="utf-8")
    environment = os.environ | {"PYTHONIOENCODING": encoding}
    run, check, wrong = (
        subprocess.run([sys.executable, "-m", "compress", *words], cwd=folder, env=environment, capture_output=True)
        for words in (["plan.toml"], ["check", "plan.toml", "--json"], [name])
    )
    assert (run.returncode, check.returncode, wrong.returncode) == (0, 0, 2), run.stderr
    assert files_of(folder / "out")["model.safetensors"] == expected["model.safetensors"]
    assert json.loads(check.stdout.decode(encoding))["lock"]["plan"]["calibration"]["source"] == name
    assert name.encode(encoding, "backslashreplace") in wrong.stderr


def into_closed_pipe(arguments: str, folder: Path) -> Result:
    """Run the command with a reader of its output that is gone."""
    shell = f"({sys.executable} -m compress {arguments}; echo $? >code) | true"
    found = subprocess.run(["bash", "-c", shell], cwd=folder, capture_output=True, text=True)
    return Result(int((folder / "code").read_text()), found.stdout, found.stderr)
