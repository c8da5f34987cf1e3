"""Every fault of the crash matrix against some plans; `benchmarks/crash_matrix.py` is the whole of it."""

from __future__ import annotations

import os
import random
from typing import TYPE_CHECKING

import pytest

from tests.crash import LOSSES, Loss, Runner, Shadow, broken_promises, is_whole, journal_lines
from tests.crash_faults import Case, may_mount
from tests.crash_plans import PLANS

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

# How many moments each fault has here, by default and in the slow tier.
MOMENTS = {
    "kills_at_lines": (3, 30),
    "kills_at_random": (2, 10),
    "power_cuts": (1, 4),
    "power_cuts_on_ext4": (1, 2),
    "full_disks": (1, 4),
    "read_only_disks": (1, 2),
    "signals": (2, 6),
    "torn_lines": (3, 12),
    "flipped_bits": (2, 12),
    "second_processes": (1, 2),
}
MOUNTING = ("power_cuts_on_ext4", "full_disks", "read_only_disks")


@pytest.fixture(scope="module")
def runner() -> Iterator[Runner]:
    made = Runner()
    yield made
    made.close()


@pytest.fixture(scope="module")
def cases(runner: Runner, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Case]:
    """The plans that have run so far."""
    return {}


def befall(case: Case, fault: str, count: int) -> None:
    """Have a fault befall a plan `count` times, or as often as it has moments for it, and all trials end well."""
    before = case.trials
    options = {"last": count} if fault.startswith("power_cuts") else {}
    getattr(case, fault)(count, **options)
    assert case.problems == []
    assert case.trials > before


@pytest.mark.parametrize("fault", MOMENTS)
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if name == "sweeps" else pytest.mark.slow) for name in PLANS]
)
def test_the_bytes_are_the_same(
    name: str,
    fault: str,
    runner: Runner,
    cases: dict[str, Case],
    tmp_path_factory: pytest.TempPathFactory,
    tmp_path: Path,
) -> None:
    if fault in MOUNTING and not may_mount(tmp_path / "mount"):
        pytest.skip("may not mount a file system")
    if name not in cases:
        cases[name] = Case(name, PLANS[name], tmp_path_factory.mktemp(name), runner)
    few, many = MOMENTS[fault]
    befall(cases[name], fault, few if name in ("sweeps", "reference") else many)


# ------------------------------------------------------------------ what a disk holds


@pytest.fixture
def shadow(tmp_path: Path) -> Shadow:
    """Of a directory in which the file `old` ("one") is durable."""
    root = tmp_path / "root"
    root.mkdir()
    (root / "old").write_text("one")
    try:
        os.setxattr(root, Shadow.ATTRIBUTE, b"root")
    except OSError:
        pytest.skip("the file system has no extended attributes")
    made = Shadow(tmp_path / "shadow", root)
    made.note_all()
    return made


def rebuilt(shadow: Shadow, loss: Loss, seed: int = 0) -> dict[str, bytes]:
    """The files after a power cut."""
    target = shadow.folder.parent / f"{loss}-{seed}"
    shadow.rebuild(target, loss, random.Random(seed))
    return {str(path.relative_to(target)): path.read_bytes() for path in target.rglob("*") if path.is_file()}


def synced(shadow: Shadow, path: Path) -> None:
    """Sync a file or a directory, as the run under test does."""
    handle = os.open(path, os.O_RDONLY)
    shadow.watched(os.fsync)(handle)
    os.close(handle)


def test_what_was_appended_needs_a_sync(shadow: Shadow) -> None:
    path = shadow.root / "old"
    path.write_text("onetwo")
    found = {loss: rebuilt(shadow, loss)["old"] for loss in LOSSES}
    assert found["dropped"] == found["empty"] == b"one"
    assert found["zeros"] == b"one\0\0\0"
    ends = {rebuilt(shadow, "torn", seed)["old"] for seed in range(1, 40)}
    assert ends == {b"one", b"onet", b"onetw", b"onetwo"}
    synced(shadow, path)
    assert {rebuilt(shadow, loss, 99)["old"] for loss in LOSSES} == {b"onetwo"}


def test_what_was_overwritten_is_lost_without_a_sync(shadow: Shadow) -> None:
    (shadow.root / "old").write_text("anew")
    assert rebuilt(shadow, "dropped")["old"] == b"one"
    assert rebuilt(shadow, "empty")["old"] == b""
    assert rebuilt(shadow, "zeros")["old"] == bytes(4)


def test_names_need_a_sync_of_their_directory(shadow: Shadow) -> None:
    folder, new = shadow.root / "folder", shadow.root / "folder" / "new"
    folder.mkdir()
    new.write_text("data")
    synced(shadow, new)
    assert rebuilt(shadow, "dropped") == {"old": b"one"}
    assert rebuilt(shadow, "empty") == {"old": b"one", "folder/new": b"data"}
    synced(shadow, shadow.root)
    assert rebuilt(shadow, "dropped", 1) == {"old": b"one"}  # the folder is there, and empty
    synced(shadow, folder)
    assert rebuilt(shadow, "dropped", 2) == {"old": b"one", "folder/new": b"data"}


def test_renames_and_deletions_need_a_sync_of_their_directory(shadow: Shadow) -> None:
    (shadow.root / "old").rename(shadow.root / "other")
    (shadow.root / "more").write_text("")
    assert rebuilt(shadow, "dropped") == {"old": b"one"}
    synced(shadow, shadow.root)
    assert rebuilt(shadow, "dropped", 1) == {"other": b"one", "more": b""}
    (shadow.root / "other").unlink()
    assert rebuilt(shadow, "dropped", 2) == {"other": b"one", "more": b""}
    assert rebuilt(shadow, "zeros") == {"more": b""}


def test_a_reused_inode_is_not_taken_for_the_old_one(shadow: Shadow) -> None:
    """A file system may give a new file the number of one that was just deleted."""
    (shadow.root / "old").unlink()
    (shadow.root / "new").write_text("")
    assert rebuilt(shadow, "empty") == {"new": b""}


def test_a_promise_that_is_broken_is_seen(tmp_path: Path, runner: Runner, cases: dict[str, Case]) -> None:
    case = Case("survey", PLANS["survey"], tmp_path, runner)
    runner(case.start_over(), points=["compress.journal:Workspace._commit"], at=12)
    work = case.folder / ".out.compress"
    assert len(journal_lines(work)) >= 5
    assert all(is_whole(line) for line in journal_lines(work))
    assert broken_promises(case.folder) == []
    path = work / "block-0-00000.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    assert broken_promises(case.folder) == [path.name]
    path.unlink()
    assert broken_promises(case.folder) == [path.name]
    journal = work / "journal.jsonl"
    count = len(journal_lines(work))
    journal.write_bytes(journal.read_bytes()[:-1])
    assert len(journal_lines(work)) == count - 1
