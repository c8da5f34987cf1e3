"""The report: JSON round trip, a self-contained page, and a terminal table that fits.

Every number here is made up; only the shapes and orders of magnitude follow real runs.
"""

from __future__ import annotations

import io
import json
import math
from html.parser import HTMLParser
from typing import TYPE_CHECKING

import pytest
from rich.console import Console

from compress.errors import PlanError
from compress.passes import PEQA, RTN, DepthPruning, LQLoRA, SparseGPT, WidthPruning
from compress.report import (
    SCHEMA_VERSION,
    BlockLine,
    CalibrationInfo,
    Divergence,
    Environment,
    EvaluationLine,
    LedgerLine,
    ModelInfo,
    OutputInfo,
    PassSummary,
    Report,
    TextScore,
    VerifiedInfo,
    change,
    comparison,
    described,
    figure,
    human_bytes,
    human_seconds,
    load_report,
    percent,
    print_summary,
    signed,
    write_report,
)

if TYPE_CHECKING:
    from pathlib import Path

    from compress.passes import Pass

KINDS = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj")
KINDS += ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
PASSES = (("sparsegpt", {"pattern": "2:4", "damping": 0.01}), ("gptq", {"bits": 4, "group_size": 128, "where": []}))
SCORES = {
    "dense": TextScore(perplexity=133.884, bits_per_byte=1.7425, nll=math.log(133.884)),
    "compressed": TextScore(perplexity=141.027, bits_per_byte=1.7611, nll=math.log(141.027)),
}
DIVERGENCE = Divergence(
    kl_mean=0.0217,
    kl_median=0.0112,
    kl_p99=0.154,
    kl_p999=0.491,
    kl_max=2.318,
    top1_agreement=0.8803,
    rms_delta_p=0.041,
)


def ledger(blocks: int) -> list[LedgerLine]:
    """A made-up ledger; errors vary smoothly along the depth, and one linear used a fallback."""
    lines = []
    for block in range(blocks):
        for index, (use, _) in enumerate(PASSES):
            for number, kind in enumerate(KINDS):
                error = (0.02 + 0.01 * number) * (1.6 + math.sin(number + 9 * block / blocks)) * (1 + 0.35 * index)
                lines.append(
                    LedgerLine(
                        sweep=0,
                        block=block,
                        linear=f"model.layers.{block}.{kind}",
                        pass_index=index,
                        use=use,
                        out_features=256 if number != 4 else 768,
                        in_features=256 if number != 6 else 768,
                        sparsity=0.5,
                        error_before=0.0 if index == 0 else error / 1.35,
                        error_after=error,
                        error_kind="gram",
                        tokens=32_768,
                        damping=0.01,
                        dead_columns=3 if (block, number) == (0, 4) else 0,
                        fallback="round to nearest" if (block, index, number) == (1, 1, 6) else None,
                        seconds=0.11 + 0.02 * number,
                    )
                )
    return lines


def made_up(depth: int = 4, **changes: object) -> Report:
    """A made-up run of two passes over a model of `depth` blocks."""
    lines = ledger(depth)
    fields = {
        "compress_version": "0.1.0",
        "model": ModelInfo(
            path="/data/models/tiny-llama", architecture="LlamaForCausalLM", parameters=4_198_656, bytes=8_400_112
        ),
        "output": OutputInfo(
            path="tiny-llama-2of4-w4",
            bytes=3_912_704,
            parameters=4_198_656,
            nonzero_parameters=2_625_792,
            linear_sparsity=0.5,
        ),
        "environment": Environment(
            python="3.11.9",
            torch="2.13.0+cpu",
            transformers="5.23.0",
            device="cpu",
            threads=2,
            platform="Linux-6.1-x86_64",
        ),
        "calibration": CalibrationInfo(source="wikitext", samples=128, length=256, tokens=32_768, digest="9f2c" * 16),
        "passes": tuple(
            PassSummary(
                index=index,
                use=use,
                settings=settings,
                linears=7 * depth,
                seconds=4.25 * (index + 1) * depth,
                relative_error=0.0731 * (index + 1),
                error_kind="gram",
                sparsity=0.5,
            )
            for index, (use, settings) in enumerate(PASSES)
        ),
        "linears": tuple(lines),
        "blocks": tuple(
            BlockLine(
                sweep=0, index=block, seconds=3.1 + math.sin(block), peak_memory_bytes=612_000_000 + block * 10_000
            )
            for block in range(depth)
        ),
        "evaluation": (
            EvaluationLine(
                text="wikitext", window=256, stride=256, windows=64, tokens=16_320, divergence=DIVERGENCE, **SCORES
            ),
        ),
        "phases": {"calibration": 2.31, "sweep": 12.75 * depth, "export": 0.84, "verify": 0.42, "evaluate": 9.6},
        "peak_memory_bytes": 655_360_000,
        "estimated_memory_bytes": 700_448_768,
        "resumed": 1,
        "warnings": ("3 of 32,768 calibration tokens are the unknown token",),
        "plan_toml": '[model]\npath = "/data/models/tiny-llama"\n\n[[pass]]\nuse = "sparsegpt"\npattern = "2:4"\n',
        "verified": VerifiedInfo(tensors=39, bytes=3_904_512),
    }
    return Report.model_validate(fields | changes)


class Page(HTMLParser):
    """Collects what the page refers to, and checks that its elements nest."""

    VOID = frozenset({"meta", "br", "wbr", "link", "img", "input", "hr"})

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.links: list[str | None] = []
        self.elements: list[str] = []
        self.text = ""
        self.feed(html)
        self.close()
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append(tag)
        self.links += [value for name, value in attrs if name in ("src", "href", "xlink:href", "srcset", "action")]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def page(report: Report, directory: Path) -> tuple[str, Page]:
    write_report(report, directory)
    html = (directory / "report.html").read_text(encoding="utf-8")
    return html, Page(html)


def bare() -> Report:
    """A run in which nothing optional happened."""
    nothing = dict.fromkeys(("passes", "linears", "blocks", "evaluation", "warnings"), ())
    return made_up(1, calibration=None, phases={}, resumed=0, **nothing)


def printed(report: Report, width: int = 80, encoding: str = "utf-8", **options: bool) -> str:
    raw = io.BytesIO()
    with io.TextIOWrapper(raw, encoding=encoding, write_through=True) as file:
        print_summary(report, Console(file=file, width=width, **options))
        return raw.getvalue().decode(encoding)


@pytest.mark.parametrize("report", [made_up(), bare()], ids=["full", "bare"])
def test_a_report_survives_the_round_trip(tmp_path: Path, report: Report) -> None:
    write_report(report, tmp_path)
    assert load_report(tmp_path) == report
    assert load_report(str(tmp_path)) == report
    assert sorted(path.name for path in tmp_path.iterdir()) == ["report.html", "report.json"]


def test_the_json_keeps_the_declared_order_and_the_same_bytes(tmp_path: Path) -> None:
    write_report(made_up(), tmp_path)
    first = (tmp_path / "report.json").read_bytes()
    assert list(json.loads(first)) == list(Report.model_fields)
    assert first.startswith(b'{\n  "schema_version": 1,\n')
    assert first.endswith(b"}\n")
    write_report(made_up(), tmp_path)
    assert (tmp_path / "report.json").read_bytes() == first


def test_numbers_that_are_not_finite_become_null(tmp_path: Path) -> None:
    ruined = TextScore(perplexity=math.inf, nll=math.nan)
    line = made_up().evaluation[0].model_copy(update={"compressed": ruined})
    ledger_line = LedgerLine.model_validate(made_up().linears[0].model_dump() | {"error_after": math.nan})
    report = made_up(evaluation=(line,), linears=(ledger_line,))
    html, _ = page(report, tmp_path)
    content = json.loads((tmp_path / "report.json").read_text(), parse_constant=lambda name: pytest.fail(name))
    assert content["evaluation"][0]["compressed"] == {"perplexity": None, "bits_per_byte": None, "nll": None}
    assert content["linears"][0]["error_after"] is None
    assert load_report(tmp_path) == report
    assert "not finite" in html
    assert "not finite" in printed(report)


def test_settings_of_python_become_json() -> None:
    step = PassSummary(index=0, use="x", settings={"except": ("a", "b")}, linears=1, seconds=1.0, sparsity=0.0)
    assert step.settings == {"except": ["a", "b"]}
    with pytest.raises(ValueError, match="finite"):
        PassSummary(index=0, use="x", settings={"sparsity": math.nan}, linears=1, seconds=1.0, sparsity=0.0)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "No such file"),
        (b"{", "cannot be read"),
        (b'{"schema_version": NaN}', "cannot be read"),
        (b"\xff\xfe", "cannot be read"),
        (b"[" * 100_000, "cannot be read"),
        (b"[]", "the document"),
        (b'{"schema_version": 1}', "compress_version: Field required"),
        (b'{"schema_version": "one"}', "schema_version"),
        (b'{"schema_version": 0}', "schema_version"),
    ],
)
def test_a_file_that_is_no_report_is_refused(tmp_path: Path, content: bytes | None, message: str) -> None:
    if content is not None:
        (tmp_path / "report.json").write_bytes(content)
    with pytest.raises(PlanError, match=message) as caught:
        load_report(tmp_path)
    assert caught.value.where == str(tmp_path / "report.json")
    assert caught.value.fix


def test_a_newer_schema_is_refused_even_with_unknown_keys(tmp_path: Path) -> None:
    content = made_up().model_dump(mode="json") | {"schema_version": SCHEMA_VERSION + 1, "news": 1}
    (tmp_path / "report.json").write_text(json.dumps(content))
    with pytest.raises(PlanError, match=rf"schema version {SCHEMA_VERSION + 1}.*reads up to {SCHEMA_VERSION}"):
        load_report(tmp_path)


def test_a_failed_write_leaves_the_old_report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_report(made_up(), tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="No space"):
        write_report(made_up(2), tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


@pytest.mark.parametrize("report", [made_up(), bare(), made_up(126)], ids=["4 blocks", "bare", "126 blocks"])
def test_the_page_is_one_self_contained_file(tmp_path: Path, report: Report) -> None:
    html, parsed = page(report, tmp_path)
    assert parsed.links == []
    assert not {"link", "img", "iframe", "object", "embed", "base"} & set(parsed.elements)
    assert parsed.elements.count("script") == 1
    for fetching in ("http://", "https://", "url(", "@import", "fetch("):
        assert fetching not in html
    assert "default-src 'none'" in html
    assert "nan" not in html.split()


def test_every_linear_is_in_the_charts_and_the_ledger(tmp_path: Path) -> None:
    report = made_up(126)
    html, parsed = page(report, tmp_path)
    assert len(report.linears) == 2 * 882
    assert html.count("<circle") == 2 * len(report.linears)  # once in the errors, once in the pruned shares
    assert html.count("<rect") >= 2 * 126
    for line in report.linears:
        assert f">{line.linear}<" in html
    assert len(html) < 3_000_000
    assert parsed.elements.count("figure") == len(KINDS) + 3


def test_every_mark_lies_inside_its_chart(tmp_path: Path) -> None:
    class Marks(HTMLParser):
        width = height = 0.0
        seen = 0

        def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
            given = dict(attrs)
            if tag == "svg":
                self.width, self.height = map(float, str(given["viewbox"]).split()[2:])
            elif tag == "circle":
                self.seen += 1
                assert 40 <= float(str(given["cx"])) <= self.width
                assert 7.9 <= float(str(given["cy"])) <= self.height - 19.9

    lines = list(made_up().linears)
    for number, error in enumerate((1e-12, 9.999999999999999e-4, 1e-3, 1.0, 37.5, 0.0, -1e-9, None)):
        lines[number] = lines[number].model_copy(update={"error_after": error})
    html, _ = page(made_up(linears=tuple(lines)), tmp_path)
    marks = Marks()
    marks.feed(html)
    assert marks.seen == 2 * len(lines) - 3
    assert "3 points are not drawn" in html


@pytest.mark.parametrize("error", [1e-3, 9.999999999999999e-4, 1.0000000000000002, 5.0, 1e-300, 1e300, 0.0, None])
def test_any_error_can_be_drawn(tmp_path: Path, error: float | None) -> None:
    line = made_up().linears[0].model_copy(update={"error_after": error, "block": None, "linear": "lm_head"})
    page(made_up(linears=(line,)), tmp_path)


@pytest.mark.parametrize("seconds", [0.0, 1e-12, 1e-6, 0.1, 1.0, 5.0, 1e6])
def test_any_duration_can_be_drawn(tmp_path: Path, seconds: float) -> None:
    block = BlockLine(sweep=0, index=0, seconds=seconds, peak_memory_bytes=0)
    page(made_up(blocks=(block, block), phases={"sweep": seconds}), tmp_path)


def test_experts_share_a_chart_without_a_line(tmp_path: Path) -> None:
    line = made_up().linears[0]
    names = [f"model.layers.{block}.mlp.experts.{expert}.up_proj" for block in range(4) for expert in range(8)]
    lines = [line.model_copy(update={"linear": name, "block": int(name.split(".")[2])}) for name in names]
    html, _ = page(made_up(linears=tuple(lines)), tmp_path)
    assert html.count("<h3>mlp.experts.*.up_proj</h3>") == 1
    assert html.count("<polyline") == 1  # only along the pruned shares, where every linear has its own place


HOSTILE = '</title></pre><script>alert("1")</script><img src=x onerror=alert(1)>\'"&'


def test_hostile_names_are_escaped_everywhere(tmp_path: Path) -> None:
    report = made_up(
        1,
        model=made_up().model.model_copy(update={"path": HOSTILE, "architecture": HOSTILE}),
        output=made_up().output.model_copy(update={"path": HOSTILE}),
        environment=made_up().environment.model_copy(update={"platform": HOSTILE}),
        calibration=made_up().calibration.model_copy(update={"source": HOSTILE}),  # type: ignore[union-attr]
        passes=tuple(s.model_copy(update={"use": HOSTILE, "settings": {HOSTILE: HOSTILE}}) for s in made_up().passes),
        linears=tuple(
            line.model_copy(update={"linear": HOSTILE + str(n), "use": HOSTILE, "fallback": HOSTILE})
            for n, line in enumerate(ledger(1))
        ),
        evaluation=(made_up().evaluation[0].model_copy(update={"text": HOSTILE}),),
        phases={HOSTILE: 1.0},
        warnings=(HOSTILE,),
        plan_toml=HOSTILE,
    )
    html, parsed = page(report, tmp_path)
    assert parsed.elements.count("script") == 1
    assert "img" not in parsed.elements
    assert parsed.links == []
    assert "&amp;lt;" not in html  # nothing is escaped twice
    assert HOSTILE in parsed.text
    assert load_report(tmp_path) == report


def test_the_page_shows_the_numbers_given(tmp_path: Path) -> None:
    _, parsed = page(made_up(), tmp_path)
    expected = ["8,400,112 bytes before", "3,912,704 bytes after", "133.884", "141.027", "+5.34 %", "0.0217", "0.491"]
    expected += ["window 256, stride 256, 64 windows, 16,320 targets, one tokenizer call", "88.03 %", "50.00 %"]
    expected += ["39 tensors (3.72 MiB) read back", "3 of 32,768 calibration tokens", "2.13.0+cpu", "9f2c" * 16]
    expected += ["Fallback: round to nearest, 1 linear", "pattern = 2:4", "625.00 MiB", 'use = "sparsegpt"']
    for text in expected:
        assert text in parsed.text, text


def test_the_summary_shows_the_numbers_given() -> None:
    text = printed(made_up())
    for expected in (
        "133.884",
        "141.027",
        "+5.34 %",
        "-53.42 %",
        "sparsegpt (pattern 2:4)",
        "0.0731 gram",
        "39 tensors",
    ):
        assert expected in text
    assert "\x1b" not in text


@pytest.mark.parametrize("width", [40, 80, 200])
@pytest.mark.parametrize("terminal", [False, True])
def test_no_line_of_the_summary_is_wider_than_the_console(width: int, terminal: bool) -> None:
    long = made_up(
        model=made_up().model.model_copy(update={"path": "/very/long/path" * 12}),
        evaluation=(made_up().evaluation[0].model_copy(update={"text": "a-text-with-a-very-long-name-" * 4}),),
        warnings=("one warning that goes on " * 9,),
    )
    for report in (made_up(), bare(), long):
        text = printed(report, width, no_color=True, force_terminal=terminal).replace("\x1b[1m", "")
        assert max(len(line.replace("\x1b[0m", "")) for line in text.splitlines()) <= width


def test_names_cannot_control_the_terminal() -> None:
    path = "[bold]/models[/bold]\x1b[2J\x07\r/é→"
    text = printed(made_up(model=made_up().model.model_copy(update={"path": path})), encoding="ascii")
    assert "[bold]/models[/bold]?[2J??/??" in text


def test_what_masks_prune_is_not_called_zeros(tmp_path: Path) -> None:
    """A code may be 0 by rounding, which these figures do not count."""
    write_report(made_up(), tmp_path)
    for text in (printed(made_up(), width=120), (tmp_path / "report.html").read_text()):
        assert "pruned in linears" in text
        assert "of these not pruned" in text
        assert "zero" not in text.lower()


@pytest.mark.parametrize(
    ("one", "text"),
    [
        (WidthPruning(channels=0.25, heterogeneous=True), "width (channels 0.25, heterogeneous)"),
        (WidthPruning(hidden=0.25, heads=0.5), "width (heads 0.5, hidden 0.25)"),
        (DepthPruning(blocks=2), "depth (blocks 2)"),
        (LQLoRA(budget=4.25), "lqlora (rank 64, budget 4.25)"),
        (RTN(bits=3, symmetric=False), "rtn (bits 3, group size 128, asymmetric)"),
        (PEQA(name="stories"), "peqa (name stories)"),
        (PEQA(), "peqa"),
        (SparseGPT(pattern="2:4"), "sparsegpt (pattern 2:4)"),
    ],
)
def test_what_defines_a_pass_is_said(one: Pass, text: str) -> None:
    step = made_up().passes[0].model_copy(update={"use": one.use(), "settings": one.settings()})
    assert described(step) == text


def test_comparison_without_a_dense_score() -> None:
    line = made_up().evaluation[0].model_copy(update={"dense": None, "divergence": None})
    rows = comparison(made_up(evaluation=(line,)))
    assert ("perplexity, wikitext", "-", "141.027", "-") in rows


def test_losses_and_changes_of_any_size_stay_short() -> None:
    """A broken model's perplexity has no bound; rounding leaves no sign before 0."""
    losses = (None, -1e-9, 0.0, -0.2, 12.3, 1e4, 1e304)
    told = ["-", "0.00 %", "0.00 %", "-20.00 %", "1,230.00 %", "1.00e+06 %", "1.00e+306 %"]
    assert [signed(loss) for loss in losses] == told
    assert [change(50.0, after) for after in (None, 50.0, 40.0, 60.0, 1e17)] == [
        "-", "0.00 %", "-20.00 %", "+20.00 %", "+2.00e+17 %",
    ]  # fmt: skip


def test_figures() -> None:
    values = (None, 0.0, 0.0217, 7e-5, 0.88, 133.8841, 2e6, -0.5)
    assert [figure(value) for value in values] == [
        *("-", "0", "0.0217", "7.00e-05", "0.880", "133.884", "2.00e+06", "-0.500")
    ]
    assert [percent(value) for value in (None, 0, 1, 0.5, 1e-9, 0.999999)] == [
        *("-", "0.00 %", "100.00 %", "50.00 %", "< 0.01 %", "> 99.99 %")
    ]
    assert [human_bytes(value) for value in (0, 1023, 1024, 2_471_645_608)] == [
        "0 B",
        "1,023 B",
        "1.00 KiB",
        "2.30 GiB",
    ]
    assert [human_seconds(value) for value in (0.004, 12.34, 59.96, 245, 7380)] == [
        *("4.0 ms", "12.3 s", "1 min 00 s", "4 min 05 s", "2 h 03 min")
    ]
    assert [change(*pair) for pair in ((2, 1), (1, 1), (None, 1), (0, 1), (1, None))] == [
        *("-50.00 %", "0.00 %", "-", "-", "-")
    ]
