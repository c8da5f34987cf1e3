"""A journal is believed up to its first damaged line, and it is on the disk when it says so."""

from __future__ import annotations

from typing import TYPE_CHECKING

from compress.journal import Workspace
from tests.crash import journal_lines

if TYPE_CHECKING:
    from pathlib import Path

    import pytest


def journal_of_three(folder: Path) -> tuple[Path, bytes]:
    """A journal, and its last line."""
    workspace = Workspace(folder / "out")
    for entry in ({"kind": "begin", "identity": {}, "plan": {}}, {"kind": "threads", "threads": 1}, {"kind": "ranks"}):
        workspace.append(entry)
    workspace.close()
    return workspace.directory / "journal.jsonl", journal_lines(workspace.directory)[-1]


def reopened(folder: Path) -> list[str]:
    """The kinds of line that a run finds."""
    workspace = Workspace(folder / "out")
    try:
        return [entry["kind"] for entry in workspace._entries]
    finally:
        workspace.close()


def test_a_line_torn_at_any_byte_is_cut_off(tmp_path: Path) -> None:
    path, last = journal_of_three(tmp_path)
    whole = path.read_bytes()
    assert reopened(tmp_path) == ["begin", "threads", "ranks"]
    for size in range(len(last)):
        path.write_bytes(whole[: len(whole) - len(last) + size])
        assert reopened(tmp_path) == ["begin", "threads"], size
        assert path.read_bytes() == whole[: -len(last)]


def test_any_flipped_bit_of_a_line_is_seen(tmp_path: Path) -> None:
    path, last = journal_of_three(tmp_path)
    whole = path.read_bytes()
    for bit in range(8 * len(last)):
        data = bytearray(whole)
        data[len(whole) - len(last) + bit // 8] ^= 1 << bit % 8
        path.write_bytes(data)
        assert reopened(tmp_path) == ["begin", "threads"], bit


def test_the_work_directory_itself_is_synced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else a power cut may take it away with all that is in it."""
    synced: list[Path] = []
    monkeypatch.setattr("compress.journal.sync", synced.append)
    workspace = Workspace(tmp_path / "a" / "b" / "out")
    assert synced == [tmp_path / "a" / "b", tmp_path / "a", tmp_path]
    workspace.append({"kind": "begin"})
    assert synced[3:] == [workspace.directory]  # the journal's name
    workspace.append({"kind": "threads"})
    assert len(synced) == 4
    workspace.close()
    Workspace(tmp_path / "a" / "b" / "out").close()
    assert len(synced) == 4


def test_a_run_that_ends_while_the_next_one_opens(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its work directory goes away between the next one's steps, which begin anew."""
    original, made = Workspace._make_directory, 0

    def make(self: Workspace) -> None:
        nonlocal made
        original(self)
        made += 1
        if made == 1:
            self.directory.rmdir()

    monkeypatch.setattr(Workspace, "_make_directory", make)
    workspace = Workspace(tmp_path / "out")
    workspace.append({"kind": "begin"})
    workspace.close()
    assert made == 2
    assert reopened(tmp_path) == ["begin"]


def test_what_a_sweep_found_of_the_dense_model_outlives_it(tmp_path: Path) -> None:
    """Processes that follow read the Fisher information; only the first one makes it, before the sweep is looked at."""
    workspace = Workspace(tmp_path / "out")
    for sweep in (0, 1, 2):
        workspace.append({"kind": "fisher", "sweep": sweep})
        workspace.append({"kind": "block", "sweep": sweep, "block": 0})
    workspace.forget_sweep(1)
    workspace.close()
    again = Workspace(tmp_path / "out")
    assert [(e["kind"], e["sweep"]) for e in again._entries] == [("fisher", 0), ("block", 0), ("fisher", 1)]
    again.close()
