"""Tasks and a gate in the page and the terminal: every number given, every mark in its chart, no markup from names."""

from __future__ import annotations

import io
import re
from html.parser import HTMLParser
from typing import TYPE_CHECKING, Any

import pytest
from rich.console import Console

from compress.evals.commands import print_gate, print_tasks
from compress.evals.results import (
    Comparison,
    Figure,
    Flips,
    GateResult,
    MetricLine,
    PositionLine,
    TaskLine,
    TasksInfo,
    TokenLine,
)
from compress.report import load_report
from tests.test_report import DIVERGENCE, HOSTILE, made_up, page

if TYPE_CHECKING:
    from pathlib import Path

    from compress.report import Report


def positions(width: int, count: int) -> tuple[PositionLine, ...]:
    return tuple(
        PositionLine(first=i * width, last=i * width + width - 1, tokens=7, kl_mean=0.01 * i, top1_agreement=1 - i / 99)
        for i in range(1, count)
    )


def task(name: str = "minimal_pairs:pairs", **changes: Any) -> TaskLine:
    metric = MetricLine(
        metric="acc",
        higher_is_better=True,
        compressed=Figure(value=0.731, low=0.702, high=0.758),
        dense=Figure(value=0.742, low=0.714, high=0.769),
    )
    given = TaskLine(
        task=name,
        samples=1000,
        num_fewshot=0,
        metrics=(metric, MetricLine(metric="bleu", higher_is_better=True, compressed=Figure(value=None))),
        ties=2,
        not_finite=0,
        flips=Flips(worse=31, better=20, answers=51),
        divergence=DIVERGENCE,
        positions=positions(3, 20),
    )
    return given.model_copy(update=changes)


def compared(**changes: Any) -> Comparison:
    given: dict[str, Any] = {
        "task": "minimal_pairs:pairs",
        "metric": "acc",
        "kind": "accuracy",
        "samples": 1000,
        "baseline": 0.742,
        "value": 0.731,
        "loss": 0.011,
        "low": -0.001,
        "high": 0.0231,
        "margin": 0.02,
        "p": 0.0804,
        "p_holm": 0.0804,
        "flips": Flips(worse=31, better=20),
        "needed": 2345,
        "verdict": "inconclusive",
        "why": "too few samples for this margin; 2,345 samples would do",
    }
    return Comparison.model_validate(given | changes)


def gated(*comparisons: Comparison, **changes: Any) -> GateResult:
    given: dict[str, Any] = {
        "compress_version": "0.1.0",
        "verdict": "inconclusive",
        "passed": False,
        "inconclusive": "fail",
        "alpha": 0.05,
        "power": 0.8,
        "model": "m",
        "baseline": "base.json",
        "baseline_model": "b",
        "comparisons": comparisons or (compared(),),
        "tokens": (TokenLine(task="minimal_pairs:pairs", divergence=DIVERGENCE, positions=positions(1, 3)),),
        "notes": ("torch: 1 in the baseline, 2 here",),
    }
    return GateResult.model_validate(given | changes)


def report_of(*tasks: TaskLine, gate: GateResult | None = None) -> Report:
    info = TasksInfo(harness="0.4.13", batch_size=16, dtype="auto", limit=1000)
    return made_up(1, tasks=tasks, tasks_info=info if tasks else None, gate=gate)


def test_the_page_shows_the_numbers_given(tmp_path: Path) -> None:
    report = report_of(task(), gate=gated())
    html, parsed = page(report, tmp_path)
    assert parsed.links == []
    for shown in (
        "0.731",
        "0.702 to 0.758",
        "0.742",
        "31",
        "20",
        "51",
        "2 of 1,000 answers are ties",
        "the first 1,000",
    ):
        assert shown in parsed.text
    for shown in ("Inconclusive, against base.json.", "1.10 %", "-0.10 % to 2.31 %", "2.00 %", "0.08", "2,345 samples"):
        assert shown in parsed.text
    assert "3 positions a point" in html
    assert load_report(tmp_path) == report


def test_every_mark_lies_inside_its_chart(tmp_path: Path) -> None:
    class Marks(HTMLParser):
        width = height = 0.0
        seen = 0

        def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
            given = dict(attrs)
            if tag == "svg":
                self.width, self.height = map(float, str(given["viewbox"]).split()[2:])
            for key, value in attrs:
                if key in ("cx", "x1", "x2"):
                    self.seen += 1
                    assert 0 <= float(str(value)) <= self.width
                if key in ("cy", "y1", "y2"):
                    assert 0 <= float(str(value)) <= self.height

    extreme = [compared(loss=x, low=x - 0.3, high=x + 0.3) for x in (-0.9, 0.0, 0.9)]
    extreme += [
        compared(margin=None, verdict=None),
        compared(loss=None, low=None, high=None, value=None, verdict="fail"),
    ]
    tasks = (task(positions=positions(1, 2)), task("other", positions=positions(40, 48)), task("none", positions=()))
    tasks = (*tasks, task("bare", dense=None, divergence=None, flips=None, positions=()))
    html, _ = page(report_of(*tasks[:2], tasks[3], gate=gated(*extreme)), tmp_path)
    marks = Marks()
    marks.feed(html)
    assert marks.seen > 100


def test_divergence_that_is_not_finite_is_left_out_of_the_chart(tmp_path: Path) -> None:
    broken = tuple(one.model_copy(update={"kl_mean": None}) for one in positions(1, 4))
    html, _ = page(report_of(task(positions=broken, not_finite=9)), tmp_path)
    assert "9 of 1,000 samples have log-likelihoods that are not finite" in html


def test_hostile_names_are_escaped(tmp_path: Path) -> None:
    metric = MetricLine(metric=HOSTILE, higher_is_better=True, compressed=Figure(value=0.5, low=0.4, high=0.6))
    names = {"task": HOSTILE, "metric": HOSTILE, "why": HOSTILE}
    gate = gated(compared(**names), baseline=HOSTILE, notes=(HOSTILE,))
    _, parsed = page(report_of(task(HOSTILE, metrics=(metric,)), gate=gate), tmp_path)
    assert parsed.elements.count("script") == 1
    assert "img" not in parsed.elements


def test_the_page_says_what_the_plan_allows(tmp_path: Path) -> None:
    """As the terminal does: the command has ended with 0."""
    _, parsed = page(report_of(task(), gate=gated(inconclusive="pass", passed=True)), tmp_path)
    assert "Inconclusive (which the plan allows), against base.json." in parsed.text


def test_long_names_do_not_widen_the_page(tmp_path: Path) -> None:
    """Whatever holds the name of a task or a baseline breaks it anywhere, or scrolls, or is a tooltip."""
    long = "x" * 300
    html, _ = page(report_of(task(long), gate=gated(compared(task=long), baseline=long, notes=(long,))), tmp_path)
    rules = dict(re.findall(r"^([^{}@]+) \{([^{}]*)\}", html.partition("</style>")[0], re.MULTILINE))
    body = re.sub(r"<title>.*?</title>|<pre>.*?</pre>|<(\w+)[^>]*>", lambda tag: f"<{tag[1]}>" if tag[1] else "", html)
    holders = {match[1] for match in re.finditer(rf"<(\w+)>[^<>]*{long}", body.partition("<body>")[2])}
    assert holders <= {"p", "td", "h3", "span"}
    for rule in ("p", "h3", "td.name", ".tile span"):
        assert "overflow-wrap: anywhere" in rules[rule], rule


@pytest.mark.parametrize("width", [60, 80, 160])
def test_the_terminal(width: int) -> None:
    console = Console(file=io.StringIO(), width=width)
    long = "multiple_choice:" + "a" * 90
    print_tasks((task(), task(long)), {"blimp": {"acc": 0.5}}, console)
    print_gate(gated(compared(), compared(task=long)), console)
    text = console.file.getvalue()  # type: ignore[attr-defined]
    for shown in (
        "0.731",
        "group blimp",
        "2 of 1,000 answers are ties",
        "gate: inconclusive",
        "2,345 samples would do",
    ):
        assert " ".join(shown.split()) in " ".join(text.split())
    table = [line for line in text.splitlines() if "0.0231" in line or "2.31 %" in line]
    assert all(len(line) <= width for line in table)


@pytest.mark.parametrize("width", [40, 60, 66, 67, 80])
def test_a_narrow_terminal_cuts_nothing(width: int) -> None:
    console = Console(file=io.StringIO(), width=width)
    print_tasks((task(ties=0, divergence=None),), {}, console)
    print_gate(gated(compared(), compared(metric="loglikelihood", kind="loglikelihood", verdict=None, why="")), console)
    table, remarks, _ = console.file.getvalue().partition("minimal_pairs:pairs, acc:")  # type: ignore[attr-defined]
    assert remarks
    lines = table.splitlines()
    assert max(map(len, lines)) <= width
    for whole in ("0.702 to 0.758", "inconclusive", "1.10 %", "2.31 %", "2.00 %", "0.742", "0.731", "loglikelihood"):
        assert any(whole in line for line in lines)


def test_the_terminal_breaks_no_name_that_a_line_holds() -> None:
    console = Console(file=io.StringIO(), width=80)
    named = [compared(task="minimal_pairs:agreement"), compared(task="minimal_pairs:agreement", metric="perplexity")]
    print_gate(gated(*named, compared(task="b", metric="acc_norm")), console)
    heading, *shown = console.file.getvalue().splitlines()[:6]  # type: ignore[attr-defined]
    assert [line for line in shown if not line.startswith(" ")] == ["minimal_pairs:agreement", "b"]
    rows = [line for line in shown if line.startswith(" ")]
    assert [line.split()[0] for line in rows] == ["acc", "perplexity", "acc_norm"]
    assert {line.index("inconclusive") for line in rows} == {heading.index("verdict") - 5}


def test_a_name_too_long_for_its_column_stands_above_its_figures() -> None:
    console = Console(file=io.StringIO(), width=80)
    print_gate(gated(compared(metric="exact_match,flexible-extract"), compared()), console)
    heading, _, name, figures, short = console.file.getvalue().splitlines()[:5]  # type: ignore[attr-defined]
    assert name == "  exact_match,flexible-extract"
    assert figures.split() == short.split()[1:]
    assert figures.index("inconclusive") == short.index("inconclusive") == heading.index("verdict") - 5
