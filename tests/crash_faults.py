"""The faults of the crash matrix: each befalls a plan in many places, and it must end with the same bytes.

`benchmarks/crash_matrix.py` has all of them befall all plans; tests take a few.
"""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
from collections import Counter
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from tests.crash import (
    COMMIT,
    COMMITS,
    EVERYTHING,
    LOSSES,
    WORK,
    Runner,
    Shadow,
    broken_promises,
    copy_tree,
    digests,
    flip_bit,
    journal_lines,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator
    from pathlib import Path

    from tests.crash_plans import CrashPlan

PAGE = 4096  # bytes, by which a tmpfs grows
DEVICE = 64 << 20  # bytes of a small disk
LAST = 4  # events behind the one that makes the output appear
ATTEMPTS = 3  # of the same command: one may be refused, with what to do


class Wrong(AssertionError):
    """A fault was not survived as it must be."""


class Case:
    """A plan under test: its uninterrupted result, and what came of the trials so far.

    Attributes:
        counts: (fault, result) → trials; the results are "identical", "refused" (clearly, and identical once what the
            message says was done), "wrong".
        problems: of each wrong one, what happened.
    """

    def __init__(self, name: str, plan: CrashPlan, folder: Path, runner: Runner, seed: int = 0) -> None:
        """Run the plan uninterrupted in `folder`, a new directory."""
        self.name, self.plan, self.base, self.runner = name, plan, folder, runner
        self.draw = random.Random(f"{name} {seed}")
        self.counts: Counter[tuple[str, str]] = Counter()
        self.problems: list[str] = []
        self.trials = 0
        folder.mkdir(parents=True, exist_ok=True)
        plan.prepare(folder)
        self.folder = folder / "trial"
        self.start_over()
        found = runner(self.folder)
        assert found["status"] == 0, found["message"]
        self.seconds = found["seconds"]
        self.reference = digests(self.folder / "out")

    # ------------------------------------------------------------------ a trial

    def start_over(self) -> Path:
        """An empty place for a run."""
        shutil.rmtree(self.folder, ignore_errors=True)
        return self.fill(self.folder)

    def fill(self, folder: Path) -> Path:
        """Put the plan there."""
        folder.mkdir(exist_ok=True)
        (folder / "plan.toml").write_text(self.plan.text())
        return folder

    def total(self, points: list[str], **command: Any) -> int:
        """How many events an uninterrupted run has."""
        found = self.runner(self.start_over(), points=points, **command)
        self._expect(found["status"] == 0, found)
        return int(found["events"])

    def some(self, total: int, count: int) -> list[int]:
        """So many of `total` events, spread over all of them."""
        if count >= total:
            return list(range(total))
        return sorted({int((place + self.draw.random()) * total / count) for place in range(count)})

    def _expect(self, holds: bool, found: Any) -> None:
        if not holds:
            raise Wrong(str(found)[-2000:])

    def finish(self, folder: Path | None = None) -> str:
        """Give the same command until it is done; the result of a trial."""
        folder, refused = folder or self.folder, 0
        for _ in range(ATTEMPTS):
            if (folder / "out").exists():  # whole or not at all
                self._expect(digests(folder / "out") == self.reference, "the output is not whole")
            found = self.runner(folder)
            if found["status"] == 0:
                break
            self._expect(found["status"] in (2, 3) and "fix:" in found["message"], found)
            refused += 1
        self._expect(found["status"] == 0, found)
        now = digests(folder / "out")
        different = sorted(name for name in {*now, *self.reference} if now.get(name) != self.reference.get(name))
        self._expect(not different, f"not the same: {different}")
        left = sorted(path.name for path in folder.iterdir())
        self._expect(left == ["out", "plan.toml"], f"left behind: {left}")
        return "refused" if refused else "identical"

    def _stop(self, at: int, points: list[str]) -> Path:
        """Kill a run at an event; returns where a copy of what it leaves is."""
        found, kept = self.runner(self.start_over(), points=points, at=at), self.base / "stopped"
        self._expect(found["status"] == -signal.SIGKILL, found)
        shutil.rmtree(kept, ignore_errors=True)
        copy_tree(self.folder, kept)
        return kept

    def _back(self) -> None:
        """Be where `_stop` was."""
        shutil.rmtree(self.folder)
        copy_tree(self.base / "stopped", self.folder)

    def trial(self, fault: str, attempt: Callable[[], str], told: object) -> None:
        """Carry out one and note what came of it; `told`: where the fault was."""
        self.trials += 1
        try:
            result = attempt()
        except Wrong as problem:
            result = "wrong"
            self.problems.append(f"{self.name}; {fault}; {told}: {problem}")
        self.counts[fault, result] += 1

    # ------------------------------------------------------------------- faults

    def kills_at_lines(self, count: int) -> None:
        """Kill before and after the commit of every line of the journal, or at `count` of these moments."""
        for at in self.some(self.total([COMMIT]), count):

            def attempt(at: int = at) -> str:
                found = self.runner(self.start_over(), points=[COMMIT], at=at)
                self._expect(found["status"] == -signal.SIGKILL, found)
                return self.finish()

            self.trial("kill at a journal line", attempt, at)

    def kills_at_random(self, count: int) -> None:
        """Kill at `count` random times."""
        for _ in range(count):
            after = self.draw.uniform(0.0, self.seconds)

            def attempt(after: float = after) -> str:
                found = self.runner(self.start_over(), after=after)
                self._expect(found["status"] in (0, -signal.SIGKILL), found)
                return self.finish()

            self.trial("kill at a random time", attempt, round(after, 3))

    def power_cuts(self, count: int, last: int = LAST) -> None:
        """Cut the power at `count` moments and at the last ones; go on from every state in which the disk may be."""
        shadow, total = self.base / "shadow", self.total(EVERYTHING)
        for at in sorted({*self.some(total, count), *range(total - last, total)}):
            shutil.rmtree(shadow, ignore_errors=True)
            folder = self.start_over()
            found = self.runner(folder, points=EVERYTHING, at=at, shadow=shadow, root=folder)
            committed = len(journal_lines(folder / WORK)) - 1  # the last one may be on its way

            def attempt(loss: Any, committed: int = committed) -> str:
                cut = self.base / "cut"
                shutil.rmtree(cut, ignore_errors=True)
                Shadow(shadow, self.folder).rebuild(cut, loss, self.draw)
                return self._go_on(cut, committed)

            for loss in LOSSES if found["status"] == -signal.SIGKILL else ():
                self.trial(f"power cut, {loss}", lambda loss=loss: attempt(loss), at)

    def power_cuts_on_ext4(self, count: int, last: int = LAST) -> None:
        """Cut the power of a disk with ext4: go on from what had reached the device, once ext4 has recovered it."""
        total, image = self.total(EVERYTHING), self.base / "disk.image"
        for at in sorted({*self.some(total, count), *range(total - last, total)}):

            def attempt(at: int = at) -> str:
                self.start_over()
                cut, restored = self.base / "cut.image", self.base / "restored"
                shutil.rmtree(restored, ignore_errors=True)
                with image.open("wb") as file:
                    file.truncate(DEVICE)
                subprocess.run(["mkfs.ext4", "-q", "-F", image], check=True)
                with mounted(self.folder, image):
                    self.fill(self.folder)
                    os.sync()
                    found = self.runner(self.folder, points=EVERYTHING, at=at)
                    shutil.copyfile(image, cut)  # what the kernel still holds back is not in it
                    committed = len(journal_lines(self.folder / WORK)) - 1
                self._expect(found["status"] == -signal.SIGKILL, found)
                with mounted(self.folder, cut):
                    shutil.rmtree(self.folder / "lost+found")
                    copy_tree(self.folder, restored)
                return self._go_on(restored, committed)

            self.trial("power cut, ext4", attempt, at)

    def _go_on(self, cut: Path, committed: int) -> str:
        """After a power cut: nothing that was committed is missing, and the run ends as ever."""
        kept = len(journal_lines(cut / WORK))
        there = (cut / "out").exists() or kept >= committed
        self._expect(there, f"{kept} lines are left of {committed} that were committed")
        self._expect(not (broken := broken_promises(cut)), f"in the journal, but not on the disk: {broken}")
        return self.finish(cut)

    def full_disks(self, count: int) -> None:
        """Fill the disk at `count` moments, but for none or a few pages."""
        self.start_over()
        with mounted(self.folder):
            self.fill(self.folder)
            total = self.runner(self.folder, points=EVERYTHING)["events"]
        for at in self.some(total, count):
            spare = self.draw.choice((0, 0, 1, 4, 16)) * PAGE

            def attempt(at: int = at, spare: int = spare) -> str:
                self.start_over()
                with mounted(self.folder):
                    command = {"points": EVERYTHING, "at": at, "action": "full", "place": self.folder, "spare": spare}
                    found = self.runner(self.fill(self.folder), **command)
                    message, early = found["message"], found["status"] == 2  # before the run asks what is free
                    full = early or found["status"] == 3
                    full = full and ("are free" if early else "No space left") in message and "fix:" in message
                    self._expect(full or found["status"] == 0, found)  # what was left was enough
                    again = self.runner(self.folder) if full else found  # still full
                    self._expect(again["status"] in (0, 2, 3) and "Traceback" not in again["message"], again)
                    (self.folder / "filler").unlink()
                    return "refused" if full and self.finish() else self.finish()

            self.trial("full disk", attempt, (at, spare))

    def read_only_disks(self, count: int) -> None:
        """Have the disk become read-only at `count` moments, and before the first and before a resumed run."""
        total = self.total(EVERYTHING)
        for at in ["start", "resumed", *self.some(total, count)]:

            def attempt(at: Any = at) -> str:
                folder = self.start_over()
                if at == "resumed":
                    self.runner(folder, points=[COMMIT], at=7)
                at = "start" if at == "resumed" else at
                found = self.runner(folder, points=EVERYTHING, at=at, action="read-only", place=folder)
                clear = found["status"] in (2, 3) and "Read-only" in found["message"] and "fix:" in found["message"]
                self._expect(clear or found["status"] == 0, found)
                return "refused" if clear and self.finish() else self.finish()

            self.trial("read-only disk", attempt, at)

    def signals(self, count: int) -> None:
        """SIGTERM and SIGINT, each at half of `count` moments, one part by events and one by time."""
        total = self.total(EVERYTHING)
        moments: Iterable[dict[str, Any]] = [
            *({"at": at, "points": EVERYTHING} for at in self.some(total, count // 2)),
            *({"after": self.draw.uniform(0.0, self.seconds)} for _ in range(count - count // 2)),
        ]
        for number, moment in enumerate(moments):
            action = ("term", "int")[number % 2]

            def attempt(moment: dict[str, Any] = moment, action: str = action) -> str:
                found = self.runner(self.start_over(), action=action, **moment)
                early = found["status"] in (-signal.SIGTERM, -signal.SIGINT) and "after" in moment  # or late
                told = found["status"] == 130 and "interrupted" in found["message"]
                self._expect(told or early or found["status"] == 0, found)
                return self.finish()

            self.trial("SIGTERM" if action == "term" else "SIGINT", attempt, moment.get("at", moment.get("after")))

    def torn_lines(self, count: int) -> None:
        """Tear the last line of a journal at `count` bytes, put garbage behind it, leave out its end."""
        lines = self.total([COMMIT]) // 2
        for at in self.some(lines - 1, min(3, max(1, count // 5))):
            kept = self._stop(2 * at + 1, [COMMIT])  # after the line is written
            journals = [path for path in kept.rglob("journal.jsonl") if path.stat().st_size]
            journal = max(journals, key=lambda path: path.stat().st_mtime_ns).relative_to(kept)
            *head, last = (kept / journal).read_bytes().splitlines(keepends=True)
            ends = [last[:size] for size in self.some(len(last), max(1, count // 3 - 3))]
            ends += [last[:-1], last + b"\xff\x00\xfe", last + b"0123456789abcdef {}\n"]
            for end in ends:

                def attempt(journal: Path = journal, text: bytes = b"".join(head) + end) -> str:
                    self._back()
                    (self.folder / journal).write_bytes(text)
                    return self.finish()

                self.trial("torn journal line", attempt, (at, len(end)))

    def flipped_bits(self, count: int) -> None:
        """Flip one bit of a file of the work directory, `count` times, each kind of file about as often.

        Every third time, the run that mends it is killed on its way.
        """
        moments = self.some(self.total(COMMITS) - 1, max(2, count // 3))
        seen: Counter[str] = Counter()
        for at in moments:
            kept = self._stop(at, COMMITS)
            files = [path.relative_to(kept) for path in kept.rglob("*") if path.is_file() and path.stat().st_size]
            files = [path for path in files if path.parts[0] == WORK and path.name != "lock"]
            for _ in range(3):
                if not files:
                    break
                file = min(files, key=lambda path: (seen[kind_of(path)], self.draw.random()))
                files.remove(file)
                seen[kind_of(file)] += 1

                def attempt(file: Path = file) -> str:
                    self._back()
                    flip_bit(self.folder / file, self.draw)
                    if self.trials % 3 == 0:
                        self.runner(self.folder, after=self.draw.uniform(0.0, self.seconds))
                    return self.finish()

                self.trial(f"flipped bit, {kind_of(file)}", attempt, (at, str(file)))

    def second_processes(self, count: int) -> None:
        """Give the command once more while it runs, at `count` moments."""
        for at in self.some(self.total(EVERYTHING), count):

            def attempt(at: int = at) -> str:
                folder = self.start_over()
                found = self.runner(folder, points=EVERYTHING, at=at, action="stop", meanwhile=True)
                other = found["meanwhile"]
                locked = other["status"] == 2 and "another run (process" in other["message"]
                self._expect(locked or (other["status"] == 0 and (folder / "out").exists()), other)
                self._expect(found["status"] == 0, found)
                self.finish()
                return "refused" if locked else "identical"

            self.trial("second process", attempt, at)


def kind_of(path: Path) -> str:
    """What a file of a work directory is, in words."""
    if any(part.startswith("stage-") for part in path.parts[1:-1]):
        return "model of a stage"
    if "output" in path.parts[1:-1]:
        return "staged output"
    return path.name.partition("-")[0].partition(".")[0]


@contextmanager
def mounted(folder: Path, image: Path | None = None) -> Iterator[None]:
    """A small disk at a folder, in memory or in an image. Needs the right to mount."""
    what = ["-o", "loop", image] if image else ["-t", "tmpfs", "-o", f"size={DEVICE}", "none"]
    subprocess.run(["mount", *what, folder], check=True)
    try:
        yield
    finally:
        subprocess.run(["umount", folder], check=True)


def may_mount(folder: Path) -> bool:
    """Whether this process may mount a file system."""
    folder.mkdir(exist_ok=True)
    made = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "none", folder], capture_output=True)
    if made.returncode == 0:
        subprocess.run(["umount", "-l", folder], check=True)
    return made.returncode == 0
