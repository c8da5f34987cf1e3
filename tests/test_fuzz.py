"""The fuzzer's targets on inputs that Hypothesis draws, judged by `fuzz.oracle`, which can fail."""

from __future__ import annotations

import pickle
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from compress.errors import PlanError
from fuzz.oracle import Broken, judged
from fuzz.targets import TARGETS

if TYPE_CHECKING:
    from collections.abc import Callable

    from fuzz.target import Target

# Each in about two seconds on an idle machine; python -m fuzz runs thousands.
EXAMPLES = {"rows": 150, "header": 30, "tokenizer": 60, "baseline": 60, "plan": 60}
_targets: dict[str, Target] = {}


@pytest.fixture
def target(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Target:
    """A target, whose seeds are made once."""
    name = request.param
    if name not in _targets:
        _targets[name] = TARGETS[name](tmp_path_factory.mktemp(name))
    return _targets[name]


@pytest.mark.parametrize("target", [name for name in TARGETS if name not in ("rows",)], indirect=True)
def test_the_seeds_are_valid(target: Target, monkeypatch: pytest.MonkeyPatch) -> None:
    """Or else every change to them would be refused for the same reason."""
    monkeypatch.chdir(target.folder)
    target.read()


@pytest.mark.parametrize("target", TARGETS, indirect=True)
def test_whatever_a_file_holds(target: Target) -> None:
    @settings(
        max_examples=EXAMPLES.get(target.name, 20),
        deadline=None,
        database=None,
        derandomize=True,
        suppress_health_check=list(HealthCheck),
    )
    @given(st.binary(min_size=8, max_size=64))
    def judge(data: bytes) -> None:
        target.run(data)

    judge()


# ------------------------------------------------------- the oracle can fail


def _reads_elsewhere(folder: Path) -> None:
    Path("/etc/hostname").read_bytes()


def _unpickles(folder: Path) -> None:
    pickle.loads(b"cos\ngetcwd\n.")


def _starts(folder: Path) -> None:
    subprocess.run(["true"], check=True)


def _runs(folder: Path) -> None:
    (folder / "evil.py").write_text("x = 1")
    exec(compile("x = 1", str(folder / "evil.py"), "exec"))


def _says_nothing(folder: Path) -> None:
    raise PlanError("wrong")


def _obeyed(folder: Path) -> None:
    class Raw(PlanError):
        def __str__(self) -> str:
            return "\x1b[2J"

    raise Raw("wrong", fix="mend")


@pytest.mark.parametrize("deed", [_reads_elsewhere, _unpickles, _starts, _runs, _says_nothing, _obeyed])
def test_the_oracle_sees(deed: Callable[[Path], None], tmp_path: Path) -> None:
    with pytest.raises(Broken), judged(tmp_path):
        deed(tmp_path)
