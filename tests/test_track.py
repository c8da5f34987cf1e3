"""A local store of MLflow, read back with MLflow's own client; what is refused before a run."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from tests.test_cli import PLAN, command, refused

TRACKED = '\n[evaluate]\nperplexity = "text.txt"\nwindow = 16\nwindows = 4\n[track]\nto = "mlflow"\nstore = "runs"\n'


def test_mlflow_has_what_the_report_says(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    mlflow = pytest.importorskip("mlflow")
    pytest.importorskip("sqlalchemy")
    from compress.report import load_report

    Path("plan.toml").write_text(PLAN + TRACKED + 'project = "nightly"\n')
    result = command(capsys, "plan.toml")
    assert result.code == 0
    assert "did not take" not in result.out
    client = mlflow.MlflowClient(tracking_uri=f"sqlite:///{folder / 'runs' / 'mlflow.db'}")
    (run,) = client.search_runs([client.get_experiment_by_name("nightly").experiment_id])
    report = load_report(folder / "out")
    assert run.info.run_name == "out"
    assert run.info.status == "FINISHED"
    assert run.data.metrics["text.txt/perplexity"] == report.evaluation[0].compressed.perplexity
    assert run.data.metrics["linear_sparsity"] == report.output.linear_sparsity
    assert run.data.params["pass 0"] == "wanda (sparsity 0.5)"


def test_a_tracker_that_fails_costs_a_warning(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("mlflow")
    (folder / "taken").write_text("a file")
    Path("plan.toml").write_text(PLAN + TRACKED.replace('"runs"', '"taken"'))
    result = command(capsys, "plan.toml")
    assert result.code == 0
    assert "warning: mlflow did not take the results" in result.out
    assert (folder / "out" / "report.json").is_file()


def test_a_tracker_that_is_not_installed(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "trackio", None)
    Path("plan.toml").write_text(PLAN + '[track]\nto = "trackio"\n')
    for arguments in (["plan.toml"], ["check", "plan.toml"]):
        message = refused(capsys, *arguments)
        assert "track.to: trackio is not installed" in message
        assert "pip install trackio" in message
    Path("plan.toml").write_text(PLAN + '[track]\nto = "notebook"\n')
    assert "track.to" in refused(capsys, "check", "plan.toml")
