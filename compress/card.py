"""The model card, README.md: what was done to which model, how good the result is, and how to load it.

The card of a run is byte-identical each time the plan runs: no times, dates, machine facts or absolute paths. Those are
in report.json.
"""

from __future__ import annotations

import os
import re
from pathlib import Path, PureWindowsPath
from typing import TYPE_CHECKING

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from compress.model_files import read_json
from compress.report import comparison, described, figure, human_bytes, percent, replace_text
from compress.usage import usage

if TYPE_CHECKING:
    from typing import Any

    from compress.evals.results import Divergence
    from compress.report import PassSummary, Report

PRUNED = ("pattern", "sparsity")  # settings of passes that make a mask
SMALLER = ("width", "depth", "loraprune")  # passes that leave a smaller model


def write_card(report: Report, directory: Path | str, base_model: str, license: str | None) -> None:
    """Write README.md into `directory`, whose config.json says what was emitted.

    `base_model` is a hub id, or a local directory of which only the name appears; `license` is the base model's
    identifier on the hub ("apache-2.0", "llama3.2"), None where it is not known.
    """
    report, file = _public_report(report), Path(directory) / "config.json"
    body = _body(report, base_model, read_json(file) if file.exists() else {})
    card = ModelCard(f"---\n{_metadata(report, base_model, license).to_yaml()}\n---\n\n{body}")
    replace_text(Path(directory) / "README.md", str(card))


def _public_report(report: Report) -> Report:
    """The report with the names of texts in place of their paths on this machine."""
    lines = tuple(line.model_copy(update={"text": _public(line.text)}) for line in report.evaluation)
    source = report.calibration
    calibration = source.model_copy(update={"source": _public(source.source)}) if source else None
    return report.model_copy(update={"evaluation": lines, "calibration": calibration})


def _metadata(report: Report, base_model: str, license: str | None) -> ModelCardData:
    """The YAML header; the hub refuses a base model that is no hub id, so that a local one is left out."""
    quantized = any(step.settings.get("bits") or step.settings.get("choices_bits") for step in report.passes)
    pruned = any(step.use in SMALLER or any(map(step.settings.get, PRUNED)) for step in report.passes)
    kinds = ["pruning"] * pruned + ["quantization"] * quantized
    methods = [step.use for step in report.passes if step.use.isidentifier()]  # not my_package.my_pass:MyPass
    on_hub = _is_hub_id(base_model)
    results = _eval_results(report)
    return ModelCardData(
        base_model=base_model if on_hub else None,
        base_model_relation="quantized" if on_hub and quantized else None,
        library_name="transformers",
        license=license,
        pipeline_tag="text-generation" if report.model.architecture.endswith("ForCausalLM") else None,
        tags=list(dict.fromkeys(["compress", *kinds, *methods])),
        model_name=_harmless(report.output.path) if results else None,
        eval_results=results or None,
    )


def _eval_results(report: Report) -> list[EvalResult]:
    """The ``model-index``: perplexities and what the tasks found, as far as they are finite."""
    found = [
        ("text-generation", line.text, "perplexity", f"perplexity ({line.convention})", line.compressed.perplexity)
        for line in report.evaluation
    ]
    found += [
        (
            "text-generation",
            line.task,
            one.metric,
            f"{one.metric} (lm-eval, {line.num_fewshot}-shot)",
            one.compressed.value,
        )
        for line in report.tasks
        for one in line.metrics
    ]
    return [
        EvalResult(
            task_type=task,
            dataset_type=_harmless(dataset),
            dataset_name=_harmless(dataset),
            metric_type=_harmless(metric),
            metric_name=_harmless(name),
            metric_value=value,
        )
        for task, dataset, metric, name, value in found
        if value is not None
    ]


def _body(report: Report, base_model: str, config: dict[str, Any]) -> str:
    sections = [
        f"# {_code(report.output.path)}",
        f"{_code(_public(base_model))}, compressed with `compress` {report.compress_version}. "
        f"After writing, {report.verified.tensors:,} tensors ({human_bytes(report.verified.bytes)}) were read back and "
        "were equal, bit for bit, to the compressed model in memory.",
        _method(report),
        _results(report),
        usage(report, config),
        *_warnings(report),
        "## Reproduce\n\n`plan.toml` beside this card is the plan of the run, `lock.json` what it was compiled to. "
        "Set the plan's paths, and run:\n\n```sh\ncompress plan.toml\n```",
        _limits(report),
    ]
    return "\n\n".join(sections) + "\n"


def _method(report: Report) -> str:
    steps = [
        f"{number}. {_code(described(step))} on {step.linears:,} linear layers: "
        f"{percent(step.sparsity)} pruned after it" + (f", {_error(step)}" if step.relative_error is not None else "")
        for number, step in enumerate(report.passes, start=1)
    ]
    text = "## Method\n\n" + ("\n".join(steps) or "No pass changed the weights.")
    if report.calibration:
        source = report.calibration
        text += (
            f"\n\nCalibrated on {source.samples:,} samples of {_code(source.source)}, up to "
            f"{source.length:,} tokens each ({source.tokens:,} tokens in all)."
        )
    return text


def _error(step: PassSummary) -> str:
    """Passes that have no inputs at hand compare weights."""
    of = "weights" if step.error_kind == "weight" else "output"
    return f"mean relative error of the {of} {figure(step.relative_error)}"


def _results(report: Report) -> str:
    rows = [_row(name.strip(), *cells) for name, *cells in comparison(report)]
    text = "## Results\n\n" + "\n".join(["| | before | after | change |", "|:--|--:|--:|--:|", *rows])
    text += _tasks(report)
    if not report.evaluation:
        if report.tasks:
            return text
        return text + "\n\nThe quality of this model was not measured."
    conventions = "\n".join(f"- {_code(line.text)}: {line.convention}" for line in report.evaluation)
    text += f"\n\nScored from the files in this repository. How perplexity was taken:\n\n{conventions}"
    divergences = [_divergence(line.text, line.divergence) for line in report.evaluation if line.divergence]
    if divergences:
        head = "| text | KL mean | median | p99 | p99.9 | max | same top token |\n|:--|--:|--:|--:|--:|--:|--:|"
        text += "\n\nDivergence from the dense model, KL(dense ‖ compressed) per token in nats:\n\n"
        text += "\n".join([head, *divergences])
    return text


def _tasks(report: Report) -> str:
    """How tasks were taken, and what the gate said of them."""
    text = ""
    if report.tasks and report.tasks_info:
        info = report.tasks_info
        limit = f", the first {info.limit:,} samples of each at most" if info.limit else ""
        text += (
            f"\n\nTasks were evaluated with lm-eval {info.harness} from the files in this repository, "
            f"{info.batch_size} requests a batch{limit}. 95 % intervals are in `report.html`."
        )
    if report.gate:
        judged = [one for one in report.gate.comparisons if one.verdict]
        passed = sum(one.verdict == "pass" for one in judged)
        against = _code(_public(report.gate.baseline))
        text += (
            f"\n\nGate: **{report.gate.verdict}** against {against}, {passed} of {len(judged)} comparisons passed "
            f"(level {report.gate.alpha}; `gate.json`)."
        )
    return text


def _divergence(text: str, kl: Divergence) -> str:
    values = (kl.kl_mean, kl.kl_median, kl.kl_p99, kl.kl_p999, kl.kl_max)
    return _row(text, *(figure(value, "not finite") for value in values), percent(kl.top1_agreement))


def _warnings(report: Report) -> list[str]:
    """What the run warned of: it follows from plan and model, and so is the same each time."""
    warned = "\n".join(f"- {_escaped(warning)}" for warning in report.warnings)
    return [f"The run warned:\n\n{warned}"] if warned else []


def _limits(report: Report) -> str:
    limits = [
        "Perplexity compares only between models scored by the same convention, and does not show how the model does "
        "on a task; evaluate on yours before use.",
        "Compression can change answers while averages stay the same, above all on text unlike the calibration text.",
        "The limits, biases and licence terms of the base model hold for this model too.",
    ]
    if report.output.linear_sparsity > 0 and report.output.bytes >= 0.95 * report.model.bytes:
        stored = "The zeros are stored like any other weight: the files are not smaller for them, and only a runtime "
        limits.insert(0, stored + "with sparse kernels is faster.")
    return "## Limits\n\n" + "\n".join(f"- {limit}" for limit in limits)


def _is_hub_id(name: str) -> bool:
    return re.fullmatch(r"(\w[\w.\-]*/)?\w[\w.\-]*", name, re.ASCII) is not None and not os.path.exists(name)  # noqa: PTH110  # Path raises for long names


def _public(name: str) -> str:
    """The name without the directories of this machine: a hub id stays, a path keeps its last part."""
    return name if _is_hub_id(name) else PureWindowsPath(name).name or "local model"


def _harmless(name: str) -> str:
    """A name in the YAML header, which the hub shows as it is: without anything that could be markup."""
    return re.sub(r"[^\w .:,/()+-]", "_", name)


def _code(text: str) -> str:
    """`text` as a code span: there no HTML or Markdown is interpreted, and a backtick cannot leave it."""
    return f"`{''.join(char for char in text if char.isprintable() and char != '`') or '-'}`"


def _escaped(text: str) -> str:
    """`text` without what Markdown or HTML would read as markup."""
    return re.sub(r"([\\`*_\[\]<>!|~&$])", r"\\\1", "".join(filter(str.isprintable, text)))


def _row(name: str, *cells: str) -> str:
    """A table row."""
    return f"| {_escaped(name)} | {' | '.join(cells)} |"
