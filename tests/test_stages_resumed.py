"""Plans in stages that are killed, restarted, or meet what another plan left: the same bytes, or a refusal."""

from __future__ import annotations

import json
import shutil
import signal
from typing import TYPE_CHECKING, Any

import pytest

import compress
from compress.errors import CompressError, OutputError, PlanError
from compress.journal import Workspace
from compress.sweep import Sweep
from tests.conftest import files_of, some_text, tiny_directory
from tests.crash import COMMITS, Runner
from tests.test_resume import Interrupted, change_weight, flip
from tests.test_stages import EORA, NARROWER, SPARSE, WIDTH, left_in, run, write

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


STAGED = WIDTH + NARROWER + SPARSE


@pytest.fixture(scope="module")
def temporary(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("temporary")


@pytest.fixture(scope="module")
def runner(temporary: Path) -> Iterator[Runner]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TMPDIR", str(temporary))
        patch.setenv("TORCHINDUCTOR_CACHE_DIR", str(temporary.with_name("inductor")))  # made wherever Triton is
        made = Runner()
    yield made
    made.close()


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a plan of three stages, model and text, and in reference/ the output of an uninterrupted run."""
    folder = tmp_path_factory.mktemp("source")
    tiny_directory(folder / "model", "llama", blocks=2)
    write(folder, STAGED)
    run(folder)
    (folder / "out").rename(folder / "reference")
    return folder


@pytest.fixture
def staged(source: Path, tmp_path: Path) -> Path:
    shutil.copytree(source, tmp_path, dirs_exist_ok=True)
    return tmp_path


def assert_finished(folder: Path) -> None:
    assert files_of(folder / "out") == files_of(folder / "reference")
    assert left_in(folder) == ["model", "out", "plan.toml", "reference", "text.txt"]


def interrupt(folder: Path, monkeypatch: pytest.MonkeyPatch, stage: int, block: int = 1) -> Path:
    """Run until this block of a stage begins; returns the work directory."""
    original = Sweep.block

    def stop(self: Sweep, index: int, *arguments: Any) -> Any:
        if (len(self.lock.stages) - 1, index) == (stage, block):
            raise Interrupted
        return original(self, index, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(Sweep, "block", stop)
        with pytest.raises(Interrupted):
            run(folder)
    return folder / ".out.compress"


def watched(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """The (stage, block) that are worked on from now on."""
    blocks: list[tuple[int, int]] = []
    original = Sweep.block

    def note(self: Sweep, index: int, *arguments: Any) -> Any:
        blocks.append((len(self.lock.stages) - 1, index))
        return original(self, index, *arguments)

    monkeypatch.setattr(Sweep, "block", note)
    return blocks


def test_killed_between_and_inside_stages(runner: Runner, staged: Path, temporary: Path) -> None:
    total = runner(staged, points=COMMITS)
    assert total["status"] == 0
    assert_finished(staged)
    for number in range(5, total["events"], total["events"] // 6):
        shutil.rmtree(staged / "out")
        assert runner(staged, points=COMMITS, at=number)["status"] == -signal.SIGKILL
        if not (staged / "out").exists():
            assert runner(staged)["status"] == 0, number
        else:
            assert files_of(staged / "out") == files_of(staged / "reference")
            assert runner(staged)["status"] == 0, number
        assert_finished(staged)
    assert not left_in(temporary)


STEPS = [(stage, block) for stage in range(3) for block in range(2)]


@pytest.mark.parametrize(("stage", "block"), STEPS)
def test_what_was_done_is_not_done_again(staged: Path, monkeypatch: pytest.MonkeyPatch, stage: int, block: int) -> None:
    interrupt(staged, monkeypatch, stage, block)
    blocks = watched(monkeypatch)
    report = run(staged)
    assert blocks == STEPS[2 * stage + block :]
    assert report.resumed == 1
    assert_finished(staged)
    assert run(staged).resumed == 1  # the report of the finished output
    assert blocks == STEPS[2 * stage + block :]


@pytest.mark.parametrize("stage", [0, 2])
def test_restart_starts_over(staged: Path, monkeypatch: pytest.MonkeyPatch, stage: int) -> None:
    interrupt(staged, monkeypatch, stage)
    blocks = watched(monkeypatch)
    assert run(staged, restart=True).resumed == 0
    assert blocks == STEPS
    assert_finished(staged)


def test_an_output_is_replaced_only_on_demand(staged: Path) -> None:
    for passes in (WIDTH + NARROWER + SPARSE.replace("2:4", "1:4"), WIDTH, SPARSE):
        write(staged, passes)
        run(staged, overwrite=True)
        before = files_of(staged / "out")
        write(staged, STAGED)
        with pytest.raises(OutputError, match="holds the result of another plan"):
            run(staged)
        assert files_of(staged / "out") == before
    run(staged, overwrite=True)
    assert_finished(staged)


@pytest.mark.parametrize(
    ("stage", "other"),
    [(0, NARROWER + WIDTH + SPARSE), (1, WIDTH + SPARSE), (2, WIDTH + NARROWER), (0, WIDTH), (0, SPARSE), (2, SPARSE)],
    ids=["order", "fewer", "without the last", "one", "none", "none, late"],
)
def test_the_journal_of_another_plan_is_refused(
    staged: Path, monkeypatch: pytest.MonkeyPatch, stage: int, other: str
) -> None:
    """In both directions, at once, and nothing of what it has done is lost."""
    work = interrupt(staged, monkeypatch, stage)
    before = sorted(str(path.relative_to(work)) for path in work.rglob("*"))
    write(staged, other)
    blocks = watched(monkeypatch)
    with pytest.raises(OutputError, match="another plan") as failure:
        run(staged)
    assert "--restart" in str(failure.value)
    assert sorted(str(path.relative_to(work)) for path in work.rglob("*")) == before
    write(staged, STAGED)
    run(staged)
    assert blocks == STEPS[2 * stage + 1 :]
    assert_finished(staged)


def test_stages_do_not_take_the_journal_of_a_plan_without(staged: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(staged, SPARSE)
    interrupt(staged, monkeypatch, 0)
    write(staged, STAGED)
    blocks = watched(monkeypatch)
    with pytest.raises(OutputError, match="another plan"):
        run(staged)
    assert blocks == []
    run(staged, restart=True)
    assert_finished(staged)


def test_another_model_or_text_is_refused(staged: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    interrupt(staged, monkeypatch, 2)
    text = (staged / "text.txt").read_text()
    (staged / "text.txt").write_text(some_text(3000, seed=9))
    with pytest.raises(OutputError, match="another data"):
        run(staged)
    (staged / "text.txt").write_text(text)
    path = staged / "model" / "model.safetensors"
    original = path.read_bytes()
    change_weight(staged, "model.layers.0.mlp.down_proj.weight")
    with pytest.raises(OutputError, match="another model"):
        run(staged)
    path.write_bytes(original)
    run(staged)
    assert_finished(staged)


@pytest.mark.parametrize(("file", "at"), [("model.safetensors", -2), ("model.safetensors", 9), ("tokenizer.json", 50)])
@pytest.mark.parametrize("stage", [1, 2])
def test_a_damaged_model_between_stages_is_made_again(
    staged: Path, monkeypatch: pytest.MonkeyPatch, stage: int, file: str, at: int
) -> None:
    """Before anything of it is read: a header, or a tokenizer that the next stage calibrates with."""
    work = interrupt(staged, monkeypatch, stage)
    path = work / f"stage-{stage - 1}" / file
    flip(path, at % path.stat().st_size)
    blocks = watched(monkeypatch)
    run(staged)
    assert blocks == [STEPS[2 * stage - 2], STEPS[2 * stage - 1], *STEPS[2 * stage + 1 :]]
    assert_finished(staged)


@pytest.mark.parametrize("file", ["report.json", "lock.json", "config.json", "tokenizer_config.json"])
def test_a_model_that_is_damaged_as_soon_as_it_is_there(
    staged: Path, monkeypatch: pytest.MonkeyPatch, file: str
) -> None:
    """The journal knows it before its last rename: there is no moment at which it is taken as it is found."""
    publish = Workspace.publish

    def stop(self: Workspace) -> None:
        publish(self)
        raise Interrupted

    with monkeypatch.context() as patch:
        patch.setattr(Workspace, "publish", stop)
        with pytest.raises(Interrupted):
            run(staged)
    flip(staged / ".out.compress" / "stage-0" / file, 5)
    blocks = watched(monkeypatch)
    run(staged)
    assert blocks == STEPS
    assert_finished(staged)


@pytest.mark.parametrize("stage", [1, 2])
def test_a_second_run_meanwhile_is_refused(staged: Path, monkeypatch: pytest.MonkeyPatch, stage: int) -> None:
    work = interrupt(staged, monkeypatch, stage)
    other = Workspace(staged / "out")
    before = sorted(path.name for path in work.rglob("*"))
    try:
        with pytest.raises(OutputError, match=r"another run \(process \d+\) is writing"):
            run(staged, restart=True)
    finally:
        other.close()
    assert sorted(path.name for path in work.rglob("*")) == before
    run(staged)
    assert_finished(staged)


def test_a_plan_that_fails_at_once_leaves_nothing(staged: Path) -> None:
    (staged / "text.txt").write_text("too short")
    with pytest.raises(CompressError):
        run(staged)
    assert left_in(staged) == ["model", "plan.toml", "reference", "text.txt"]


def test_no_sketch_is_left(
    staged: Path, monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory
) -> None:
    place = tmp_path_factory.mktemp("sketches")
    monkeypatch.setattr("tempfile.tempdir", str(place))
    lock = compress.compiling.compile_plan(compress.load_plan(staged / "plan.toml"))
    assert not left_in(place)  # while the lock is held
    assert [one.left is None for one in lock.stages] == [False, False, True]
    write(staged, WIDTH + NARROWER + SPARSE + EORA.replace("2", "64"))
    with pytest.raises(PlanError, match="rank 64 is above"):
        run(staged)
    assert not left_in(place)


def test_what_is_emitted_says_of_what_it_was_made(source: Path) -> None:
    lock = json.loads((source / "reference" / "lock.json").read_text())
    assert [one["left"]["channels"] for one in lock["stages"]] == [24, 24]
    assert [one["use"] for one in lock["plan"]["pass"]] == ["width", "width", "sparsegpt"]
    assert all("compress-check" not in path.read_text(errors="replace") for path in (source / "reference").iterdir())
