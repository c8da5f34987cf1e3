"""The workflow, the plan and the test in examples/ci, tried as they are written, as far as there is no network."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

import compress
from tests.conftest import ROOT

pytest.importorskip("lm_eval")

CI = ROOT / "examples" / "ci"


@pytest.fixture
def clone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """What the workflow needs of this repository, as the working directory."""
    shutil.copytree(ROOT / "examples", tmp_path / "examples", ignore=shutil.ignore_patterns("__pycache__"))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def shell(command: str, **more: str) -> subprocess.CompletedProcess[str]:
    """A command as the workflow runs it, with the commands of this environment."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = {**os.environ, "PATH": path, "OMP_NUM_THREADS": "1", **more}
    return subprocess.run(["bash", "-e", "-c", command], capture_output=True, text=True, check=False, env=environment)


def test_the_workflow_and_the_test_as_written(clone: Path) -> None:
    workflow = yaml.safe_load((clone / "examples" / "ci" / "gate.yml").read_text())
    assert workflow[True] == ["pull_request"]  # YAML 1.1 reads "on" as true
    steps = {step["name"]: step["run"] for step in workflow["jobs"]["gate"]["steps"] if "run" in step}
    assert list(steps) == ["Install", "Compress", "Gate"]
    for name in ("Compress", "Gate"):
        done = shell(steps[name], GITHUB_ACTIONS="true", GITHUB_STEP_SUMMARY=str(clone / "summary.md"))
        assert done.returncode == 0, done.stdout + done.stderr
        assert "gate: pass" in done.stdout
    assert "::notice title=compress gate::ci is as good as its baseline" in done.stdout
    assert "## compress gate: pass" in (clone / "summary.md").read_text()
    uploaded = workflow["jobs"]["gate"]["steps"][-1]["with"]["path"].split()
    assert all((clone / path).is_file() for path in uploaded)

    baselines = clone / "examples" / "ci" / "baselines"
    shutil.rmtree(baselines / "demo")
    (clone / "examples" / "ci" / "test_gate.py").write_text(
        (clone / "examples" / "ci" / "test_gate.py").read_text().replace('"baselines" / "demo"', '"baselines"')
    )
    (clone / "out" / "ci").rename(clone / "out" / "plan")  # outputs are named as their baselines
    done = shell("python -m pytest examples/ci --junitxml tests.xml -p no:cacheprovider", OUTPUTS="out")
    assert done.returncode == 0, done.stdout + done.stderr
    assert 'property name="minimal_pairs:agreement, acc"' in (clone / "tests.xml").read_text()


def test_the_committed_baseline_alarms_at_a_worse_plan(clone: Path) -> None:
    """One weight of four kept, instead of two."""
    plan = clone / "examples" / "ci" / "plan.toml"
    plan.write_text(plan.read_text().replace('"2:4"', '"1:4"'))
    report = compress.run(compress.load_plan(plan))
    assert report.gate is not None
    assert report.gate.verdict == "fail"


def test_the_workflow_says_why_it_fails(clone: Path) -> None:
    """The plan holds its gate, too, and ends its step with 1; a step without a condition would then be skipped."""
    plan = clone / "examples" / "ci" / "plan.toml"
    plan.write_text(plan.read_text().replace('"2:4"', '"1:4"'))
    workflow = yaml.safe_load((clone / "examples" / "ci" / "gate.yml").read_text())
    said, failed = "", False
    for step in workflow["jobs"]["gate"]["steps"]:
        if step.get("name") in ("Compress", "Gate") and (not failed or "!cancelled()" in step.get("if", "")):
            done = shell(step["run"], GITHUB_ACTIONS="true", GITHUB_STEP_SUMMARY=str(clone / "summary.md"))
            said, failed = said + done.stdout, failed or done.returncode != 0
    assert failed
    assert "::error title=compress gate%3A rolling_perplexity%3Aprose%2C word_perplexity::fail" in said
    assert "## compress gate: fail" in (clone / "summary.md").read_text()
