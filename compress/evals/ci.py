"""A gate's result in the words of CI: JUnit XML, and GitHub Actions' annotations and step summary."""

from __future__ import annotations

from typing import TYPE_CHECKING
from xml.etree import ElementTree

if TYPE_CHECKING:
    from compress.evals.results import Comparison, GateResult


def junit(result: GateResult) -> str:
    """JUnit XML: a test case per judged comparison; one that is inconclusive fails where the gate counts it so."""
    judged = [one for one in result.comparisons if one.verdict]
    failed = [one for one in judged if _fails(one, result)]
    suite = ElementTree.Element(
        "testsuite", name="compress gate", tests=str(len(judged)), failures=str(len(failed)), errors="0", skipped="0"
    )
    for one in judged:
        case = ElementTree.SubElement(suite, "testcase", classname=_plain(one.task), name=_plain(one.metric))
        if one in failed:
            ElementTree.SubElement(case, "failure", type=str(one.verdict), message=_plain(sentence(one))).text = _plain(
                one.why
            )
        else:
            ElementTree.SubElement(case, "system-out").text = _plain(sentence(one))
    root = ElementTree.Element("testsuites")
    root.append(suite)
    return ElementTree.tostring(root, encoding="unicode", xml_declaration=True) + "\n"


def workflow_commands(result: GateResult) -> list[str]:
    """GitHub's workflow commands: an error for each comparison that fails, a warning where too few samples are allowed.

    https://docs.github.com/actions/reference/workflow-commands-for-github-actions
    """
    lines = []
    for one in result.comparisons:
        if one.verdict in ("fail", "inconclusive"):
            level = "error" if _fails(one, result) else "warning"
            title = f"compress gate: {one.task}, {one.metric}"
            lines.append(f"::{level} title={_property(title)}::{_data(sentence(one))}")
    return lines or [f"::notice title=compress gate::{_data(f'{result.model} is as good as its baseline')}"]


def summary(result: GateResult) -> str:
    """Markdown for ``$GITHUB_STEP_SUMMARY``."""
    from compress.evals.commands import cells, remarks

    rows = [
        "| task | metric | verdict | loss | at most | margin | baseline | value |",
        "|:--|:--|:--|--:|--:|--:|--:|--:|",
    ]
    for one in result.comparisons:
        shown = (one.task, one.metric, one.verdict or "-", *cells(one))
        rows.append(f"| {' | '.join(text.replace('|', '/') for text in shown)} |")
    notes = "\n".join(f"- {line}" for line in remarks(result))
    return f"## compress gate: {result.verdict}\n\n" + "\n".join(rows) + f"\n\n{notes}\n"


def sentence(one: Comparison) -> str:
    """A comparison in one sentence."""
    from compress.evals.commands import cells

    loss, high, margin, baseline, value = cells(one)
    figures = (
        f"{one.metric} {baseline} to {value}, loss {loss} (at most {high}), margin {margin}, {one.samples:,} samples"
    )
    return f"{one.verdict}: {figures}" + (f"; {one.why}" if one.why else "")


def _fails(one: Comparison, result: GateResult) -> bool:
    return one.verdict == "fail" or (one.verdict == "inconclusive" and result.inconclusive == "fail")


def _plain(text: str) -> str:
    """Without characters that XML cannot hold."""
    return "".join(char if char.isprintable() or char in "\t\n" else "?" for char in text)


def _data(text: str) -> str:
    return text.replace("%", "%25").replace("\r", "%0D").replace("\n", "%0A")


def _property(text: str) -> str:
    return _data(text).replace(":", "%3A").replace(",", "%2C")
