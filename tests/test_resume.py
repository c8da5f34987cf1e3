"""Whatever kills a run, and whatever befalls its journal: the same command gives the same bytes, or says why not.

Runs are killed for real (SIGKILL). Importing transformers takes seconds and a tiny run a fifth of one, so one process
imports and forks a child for every run; it starts no thread itself.
"""

from __future__ import annotations

import hashlib
import json
import random
import shutil
import signal
from typing import TYPE_CHECKING, Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import compress
from compress import outcome
from compress.calibration.tokens import TokenSet
from compress.errors import CompressError, OutputError, RunError
from compress.flows import Activations
from compress.journal import Workspace
from compress.sweep import Sweep
from tests.conftest import files_of, some_text, tiny_directory
from tests.crash import COMMITS, EVERYTHING, Runner

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

PLAN = """
[model]
path = "model"
[calibration]
source = "text.txt"
samples = 90
length = 24
[run]
output = "out"
refresh = "subset"
[[pass]]
use = "sparsegpt"
sparsity = 0.3
[[pass]]
use = "magnitude"
sparsity = 0.5
scope = "global"
[[pass]]
use = "wanda"
pattern = "2:4"
"""


@pytest.fixture(scope="module")
def runner() -> Iterator[Runner]:
    made = Runner()
    yield made
    made.close()


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with plan, model and text, and in reference/ the output of an uninterrupted run."""
    folder = tmp_path_factory.mktemp("source")
    tiny_directory(folder / "model", "llama", blocks=2, dtype=torch.float16)
    (folder / "plan.toml").write_text(PLAN)
    compress.run(compress.load_plan(folder / "plan.toml"))
    (folder / "out").rename(folder / "reference")
    return folder


@pytest.fixture
def folder(source: Path, tmp_path: Path) -> Path:
    for name in ("model", "reference"):
        shutil.copytree(source / name, tmp_path / name)
    for name in ("plan.toml", "text.txt"):
        shutil.copy(source / name, tmp_path)
    return tmp_path


def assert_finished(folder: Path) -> None:
    """The output is that of the uninterrupted run, and nothing else is left."""
    assert files_of(folder / "out") == files_of(folder / "reference")
    assert sorted(p.name for p in folder.iterdir()) == ["model", "out", "plan.toml", "reference", "text.txt"]


def start_over(folder: Path) -> None:
    for path in (folder / "out", folder / ".out.compress"):
        shutil.rmtree(path, ignore_errors=True)


def kill_at_every(runner: Runner, folder: Path, points: list[str], step: int = 1, offset: int = 0) -> int:
    total = runner(folder, points=points)
    assert total["status"] == 0
    assert_finished(folder)
    kills = 0
    for number in range(offset, total["events"], step):
        start_over(folder)
        found = runner(folder, points=points, at=number)
        assert found["status"] == -signal.SIGKILL, (number, found)
        if (folder / "out").exists():
            assert files_of(folder / "out") == files_of(folder / "reference"), number
        assert runner(folder)["status"] == 0, number
        assert_finished(folder)
        kills += 1
    return kills


def test_killed_at_every_commit_and_every_file(runner: Runner, folder: Path) -> None:
    assert kill_at_every(runner, folder, COMMITS) >= 28


@pytest.mark.slow
def test_killed_at_every_write_sync_rename_and_deletion(runner: Runner, folder: Path) -> None:
    assert kill_at_every(runner, folder, EVERYTHING) > 200


def test_killed_at_some_writes_syncs_renames_and_deletions(runner: Runner, folder: Path) -> None:
    assert kill_at_every(runner, folder, EVERYTHING, step=43, offset=7) > 5


@pytest.mark.parametrize("kills", [6, pytest.param(150, marks=pytest.mark.slow)])
def test_killed_at_random_times(runner: Runner, folder: Path, kills: int) -> None:
    usual = runner(folder)["seconds"]
    draw = random.Random(kills)
    died = 0
    for _ in range(kills):
        start_over(folder)
        died += runner(folder, after=draw.uniform(0.02, 0.6 * usual))["status"] == -signal.SIGKILL
        assert runner(folder)["status"] == 0
        assert_finished(folder)
    assert died > 0  # how many depends on the load of the machine; one that died shows that they can


def test_killed_again_and_again(runner: Runner, folder: Path) -> None:
    """Every run gets a few events further than its journal."""
    deaths = 0
    while runner(folder, points=COMMITS, at=5)["status"] == -signal.SIGKILL:
        deaths += 1
        assert deaths < 40
    assert deaths > 3
    assert_finished(folder)


def test_killed_while_it_replaces_an_output(runner: Runner, folder: Path) -> None:
    """There is the old output, or none, or the new one; never a mixture. Then the command ends as ever."""
    text = (folder / "plan.toml").read_text()
    (folder / "plan.toml").write_text(text.replace("sparsity = 0.3", "sparsity = 0.2"))
    run(folder)
    (folder / "plan.toml").write_text(text)
    shutil.move(folder / "out", folder / "old")
    old, new = files_of(folder / "old"), files_of(folder / "reference")
    points = ["pathlib:Path.rename", "shutil:rmtree"]
    found = []
    for number in range(20):
        start_over(folder)
        shutil.copytree(folder / "old", folder / "out")
        status = runner(folder, points=points, at=number, options=["--overwrite"])["status"]
        left = files_of(folder / "out") if (folder / "out").exists() else None
        found.append("none" if left is None else "old" if left == old else "new")
        assert left in (None, old, new)
        if status == 0:
            break
        assert status == -signal.SIGKILL
        assert runner(folder, options=["--overwrite"])["status"] == 0, number
        assert files_of(folder / "out") == new
        assert not (folder / ".out.compress").exists()
    assert list(dict.fromkeys(found)) == ["old", "none", "new"]


# --- in this process: interrupted at a block --------------------------------------------------------------------------


class Interrupted(BaseException):
    pass


def run(folder: Path, **options: Any) -> Any:
    return compress.run(compress.load_plan(folder / "plan.toml"), **options)


def interrupt(folder: Path, monkeypatch: pytest.MonkeyPatch, sweep: int, block: int) -> Path:
    """Run until this block begins; returns the work directory."""
    original = Sweep.block

    def stop(self: Any, *arguments: Any) -> Any:
        if (self.number, arguments[0]) == (sweep, block):
            raise Interrupted
        return original(self, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(Sweep, "block", stop)
        with pytest.raises(Interrupted):
            run(folder)
    return folder / ".out.compress"


def watched(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """The (sweep, block) that are compressed from now on."""
    blocks: list[tuple[int, int]] = []
    original = Sweep.block

    def note(self: Sweep, index: int, *arguments: Any) -> Any:
        blocks.append((self.number, index))
        return original(self, index, *arguments)

    monkeypatch.setattr(Sweep, "block", note)
    return blocks


POINTS = [(0, 0), (0, 1), (1, 0), (1, 1)]
at_every_block = pytest.mark.parametrize(("sweep", "block"), POINTS, ids=[f"sweep{s}-block{b}" for s, b in POINTS])


@at_every_block
def test_an_exception_is_resumed(folder: Path, monkeypatch: pytest.MonkeyPatch, sweep: int, block: int) -> None:
    work = interrupt(folder, monkeypatch, sweep, block)
    assert not (folder / "out").exists()
    assert len(list(work.glob("block-*"))) == 2 * sweep + block
    blocks = watched(monkeypatch)
    report = run(folder)
    assert blocks == POINTS[2 * sweep + block :]
    assert report.resumed == 1
    assert_finished(folder)


def flip(path: Path, at: int) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


def lines(work: Path) -> list[bytes]:
    return (work / "journal.jsonl").read_bytes().splitlines(keepends=True)


@pytest.mark.parametrize(
    ("sweep", "block", "how"),
    [
        *((*point, "torn") for point in POINTS),
        *((1, 1, how) for how in ("half", "no newline", "garbage", "other line")),
    ],
)
def test_a_torn_last_line(folder: Path, monkeypatch: pytest.MonkeyPatch, sweep: int, block: int, how: str) -> None:
    work = interrupt(folder, monkeypatch, sweep, block)
    *head, last = lines(work)
    ends = {
        "torn": last[:-9],
        "half": last[: len(last) // 2],
        "no newline": last[:-1],
        "garbage": last + b"\xff\x00\xfe",
        "other line": last + b"0123456789abcdef {}\n",
    }
    (work / "journal.jsonl").write_bytes(b"".join(head) + ends[how])
    run(folder)
    assert_finished(folder)


@pytest.mark.parametrize("number", range(7))
def test_a_damaged_line_ends_the_journal_there(folder: Path, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    work = interrupt(folder, monkeypatch, 1, 1)
    found = lines(work)
    kinds = [json.loads(line.partition(b" ")[2])["kind"] for line in found]
    assert kinds == ["begin", "threads", "calibration", "block", "block", "survey", "block"]
    flip(work / "journal.jsonl", sum(len(line) for line in found[:number]) + len(found[number]) // 2)
    run(folder)  # after the fourth, the activations behind the first block are needed again, and were deleted
    assert_finished(folder)


DAMAGE = {
    "flipped": lambda path: flip(path, path.stat().st_size // 2),
    "header": lambda path: flip(path, 1),
    "short": lambda path: path.write_bytes(path.read_bytes()[:-4]),
    "empty": lambda path: path.write_bytes(b""),
    "missing": lambda path: path.unlink(),
}
each_damage = pytest.mark.parametrize("how", DAMAGE)


@each_damage
@pytest.mark.parametrize("point", POINTS[:3])
def test_only_the_block_of_a_damaged_file_is_done_again(
    folder: Path, monkeypatch: pytest.MonkeyPatch, point: tuple[int, int], how: str
) -> None:
    work = interrupt(folder, monkeypatch, 1, 1)
    DAMAGE[how](work / f"block-{point[0]}-{point[1]:05d}.safetensors")
    blocks = watched(monkeypatch)
    run(folder)
    assert blocks == [point, (1, 1)]
    assert_finished(folder)


@each_damage
def test_a_damaged_calibration_file(folder: Path, monkeypatch: pytest.MonkeyPatch, how: str) -> None:
    work = interrupt(folder, monkeypatch, 1, 1)
    DAMAGE[how](work / "calibration.safetensors")
    run(folder)
    assert_finished(folder)


@each_damage
@pytest.mark.parametrize(("sweep", "block"), [(0, 1), (1, 1)])
def test_damaged_activations(folder: Path, monkeypatch: pytest.MonkeyPatch, sweep: int, block: int, how: str) -> None:
    work = interrupt(folder, monkeypatch, sweep, block)
    (path,) = work.glob("activations-*")
    DAMAGE[how](path)
    blocks = watched(monkeypatch)
    run(folder)
    assert blocks == POINTS[2 * sweep + block :]  # none is compressed again for them
    assert_finished(folder)


@pytest.mark.parametrize("which", ["blocks", "activations"])
def test_a_block_that_comes_out_otherwise_has_its_sweep_start_over(
    folder: Path, monkeypatch: pytest.MonkeyPatch, which: str
) -> None:
    """As it might on another device: nothing that was built on the old one may stay."""
    work = interrupt(folder, monkeypatch, 1, 1)
    flip(work / "block-0-00001.safetensors", 99)
    found = lines(work)
    for number, line in enumerate(found):
        entry = json.loads(line.partition(b" ")[2])
        if (entry["kind"], entry.get("sweep"), entry.get("block")) == ("block", 0, 0 if which == "activations" else 1):
            (entry["activations"][0] if which == "activations" else entry)["sha256"] = "0" * 64
            payload = json.dumps(entry, sort_keys=True).encode()
            found[number] = hashlib.sha256(payload).hexdigest()[:16].encode() + b" " + payload + b"\n"
    (work / "journal.jsonl").write_bytes(b"".join(found))
    blocks = watched(monkeypatch)
    run(folder)
    assert blocks[-4:] == POINTS
    assert_finished(folder)


def test_a_kill_on_the_way_to_a_damaged_block(runner: Runner, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    work = interrupt(folder, monkeypatch, 1, 1)
    kept = folder.parent / f"{folder.name}-kept"
    shutil.copytree(work, kept)
    points = ["compress.redo:write_shard", "compress.flows:Activations._close", "pathlib:Path.unlink"]
    deaths = 0
    for at in range(30):
        start_over(folder)
        shutil.copytree(kept, work)
        flip(work / "block-0-00001.safetensors", 99)
        flip(next(work.glob("activations-*")), 9)
        died = runner(folder, points=points, at=at)["status"] == -signal.SIGKILL
        assert runner(folder)["status"] == 0, at
        assert_finished(folder)
        if not died:
            break
        deaths += 1
    shutil.rmtree(kept)
    assert deaths > 8


def test_calibration_tokens_that_cannot_be_made_again(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The source is a dataset on the hub, say, and has changed since."""
    work = interrupt(folder, monkeypatch, 1, 1)
    flip(work / "calibration.safetensors", 99)
    with monkeypatch.context() as patch:
        other = TokenSet(torch.ones(90, 24, dtype=torch.int64), torch.ones(90, 24, dtype=torch.bool))
        patch.setattr("compress.execution.make_tokens", lambda *_: other)
        for _ in range(2):
            with pytest.raises(RunError, match="no longer gives the same"):
                run(folder)
    assert len(list(work.glob("block-*"))) == 3
    run(folder)
    assert_finished(folder)


# --- a journal of something else --------------------------------------------------------------------------------------


def change_weight(folder: Path, name: str) -> None:
    """Another value, the same header."""
    path = folder / "model" / "model.safetensors"
    tensors = load_file(path)
    tensors[name].view(-1)[5] += 0.125
    save_file(tensors, path, metadata={"format": "pt"})


def refused(folder: Path, work: Path, message: str) -> None:
    """The run is refused by name, and the journal is as it was."""
    before = {path.name: path.read_bytes() for path in work.iterdir() if path.is_file() and path.name != "lock"}
    with pytest.raises(OutputError, match=message):
        run(folder)
    assert {p.name: p.read_bytes() for p in work.iterdir() if p.is_file() and p.name != "lock"} == before
    assert not (folder / "out").exists()


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("sparsity = 0.3", "sparsity = 0.4", r"another plan \(pass\[0\]\.sparsity is 0\.3 there, 0\.4 here\)"),
        ('refresh = "subset"', 'refresh = "block"', r"another plan \(run\.refresh"),
        ("samples = 90", "samples = 91", r"another plan \(calibration\.samples is 90 there, 91 here\)"),
        ('[[pass]]\nuse = "wanda"\npattern = "2:4"\n', "", r"another plan \(pass has 3 entries there, 2 here\)"),
    ],
)
def test_another_plan_is_refused_by_name(
    folder: Path, monkeypatch: pytest.MonkeyPatch, old: str, new: str, message: str
) -> None:
    work = interrupt(folder, monkeypatch, 0, 1)
    text = (folder / "plan.toml").read_text()
    assert old in text
    (folder / "plan.toml").write_text(text.replace(old, new))
    refused(folder, work, message)
    (folder / "plan.toml").write_text(text)
    run(folder)
    assert_finished(folder)


def test_another_plans_journal_is_left_alone_before_its_first_block(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The calibration set may have taken an hour (source = "self")."""
    work = interrupt(folder, monkeypatch, 0, 0)
    text = (folder / "plan.toml").read_text()
    (folder / "plan.toml").write_text(text.replace("sparsity = 0.3", "sparsity = 0.4"))
    refused(folder, work, "another plan")


def test_settings_that_change_no_byte_do_not_matter(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    interrupt(folder, monkeypatch, 1, 1)
    text = (folder / "plan.toml").read_text().replace("[run]", '[run]\nmemory = "40GiB"\nthreads = 2')
    (folder / "plan.toml").write_text(text + '[evaluate]\nperplexity = "text.txt"\nwindow = 32\nwindows = 3\n')
    assert run(folder).evaluation
    name = "model.safetensors"
    assert (folder / "out" / name).read_bytes() == (folder / "reference" / name).read_bytes()


@pytest.mark.parametrize(("sweep", "block"), POINTS[1:])
def test_another_model_is_refused(folder: Path, monkeypatch: pytest.MonkeyPatch, sweep: int, block: int) -> None:
    work = interrupt(folder, monkeypatch, sweep, block)
    path = folder / "model" / "model.safetensors"
    original = path.read_bytes()
    change_weight(folder, "model.layers.0.mlp.down_proj.weight")
    refused(folder, work, "another model")
    path.write_bytes(original)
    run(folder)
    assert_finished(folder)


@pytest.mark.parametrize("name", ["model.embed_tokens.weight", "model.layers.1.mlp.down_proj.weight"])
def test_another_embedding_or_later_block_is_refused(folder: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    work = interrupt(folder, monkeypatch, 0, 1)
    change_weight(folder, name)
    refused(folder, work, "another model")


def test_another_config_is_refused(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    work = interrupt(folder, monkeypatch, 0, 1)
    path = folder / "model" / "config.json"
    text = path.read_text()
    path.write_text(json.dumps(json.loads(text) | {"rms_norm_eps": 1e-3}))
    refused(folder, work, "another model")
    path.write_text(text)
    run(folder)
    assert_finished(folder)


def test_other_calibration_data_is_refused(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    work = interrupt(folder, monkeypatch, 0, 1)
    text = (folder / "text.txt").read_text()
    (folder / "text.txt").write_text(some_text(3000, seed=9))
    refused(folder, work, "another data")
    (folder / "text.txt").write_text(text)
    run(folder)
    assert_finished(folder)


def test_another_version_is_refused(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    work = interrupt(folder, monkeypatch, 0, 1)
    with monkeypatch.context() as patch:
        patch.setattr(outcome, "__version__", "9.9.9")
        refused(folder, work, r"another version \(compress 0\.1\.0.*now compress 9\.9\.9")
    run(folder)
    assert_finished(folder)


@pytest.mark.parametrize("change", ["nothing", "plan", "model"])
def test_restart_starts_over(folder: Path, monkeypatch: pytest.MonkeyPatch, change: str) -> None:
    text = (folder / "plan.toml").read_text()
    if change == "plan":
        (folder / "plan.toml").write_text(text.replace("sparsity = 0.3", "sparsity = 0.1"))
    path = folder / "model" / "model.safetensors"
    original = path.read_bytes()
    if change == "model":
        change_weight(folder, "model.layers.0.mlp.down_proj.weight")
    interrupt(folder, monkeypatch, 1, 1)
    (folder / "plan.toml").write_text(text)
    path.write_bytes(original)
    report = run(folder, restart=True)
    assert report.resumed == 0
    assert_finished(folder)


# --- the work directory -----------------------------------------------------------------------------------------------


def test_a_second_run_on_the_same_output_is_refused(folder: Path) -> None:
    other = Workspace(folder / "out")
    try:
        with pytest.raises(OutputError, match=r"another run \(process \d+\) is writing"):
            run(folder)
    finally:
        other.close()
        other.discard_without_blocks()
    run(folder)
    assert_finished(folder)


@pytest.mark.parametrize("batch", range(4))
def test_no_line_vouches_for_activations_that_could_not_be_written(
    folder: Path, monkeypatch: pytest.MonkeyPatch, batch: int
) -> None:
    """A disk that is full for one write only, in the writing thread."""
    original, calls = Activations._write, [0]

    def write(self: Activations, hidden: torch.Tensor) -> None:
        calls[0] += 1
        if calls[0] == batch + 1:
            raise OSError(28, "No space left on device", str(self.path))
        original(self, hidden)

    with monkeypatch.context() as patch:
        patch.setattr(Activations, "_write", write)
        with pytest.raises(RunError, match="No space left on device"):
            run(folder)
    blocks = [line for line in lines(folder / ".out.compress") if b'"kind": "block"' in line]
    assert blocks == []  # two batches in front of the first block, two behind it
    run(folder)
    assert_finished(folder)


def test_a_plan_that_fails_at_once_leaves_nothing(folder: Path) -> None:
    (folder / "text.txt").write_text("too short")
    with pytest.raises(CompressError):
        run(folder)
    assert not (folder / "out").exists()


def test_a_finished_output_is_replaced_only_on_demand(folder: Path) -> None:
    run(folder)
    text = (folder / "plan.toml").read_text()
    (folder / "plan.toml").write_text(text.replace("sparsity = 0.3", "sparsity = 0.2"))
    with pytest.raises(OutputError, match="another plan"):
        run(folder)
    assert files_of(folder / "out") == files_of(folder / "reference")
    run(folder, overwrite=True)
    assert files_of(folder / "out") != files_of(folder / "reference")
    (folder / "plan.toml").write_text(text)
    run(folder, overwrite=True)
    assert_finished(folder)


def test_a_kill_after_publishing_leaves_nothing_once_the_command_ran_again(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = shutil.rmtree

    def die(path: Path, **options: Any) -> None:
        if path.name == ".out.compress":
            raise Interrupted
        original(path, **options)

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", die)
        with pytest.raises(Interrupted):
            run(folder)
    assert (folder / "out" / "model.safetensors").exists()
    run(folder)
    assert_finished(folder)
