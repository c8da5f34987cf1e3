"""Divergence from the dense model on the tokens that tasks score: KL, top token, and both by position.

Both models see what lm-eval would give them: its contexts and continuations, its windows of long documents. A pair of
context and continuation that several requests share counts once.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from pydantic import TypeAdapter, ValidationError
from torch.nn.utils.rnn import pad_sequence

from compress.evals.harness import (
    Runner,
    cache_folder,
    check_alike,
    documents_hash,
    need_harness,
    quiet,
    seed_as_harness,
    settle,
    task_hash,
)
from compress.evals.perplexity import LOGITS_AT_ONCE, Scores
from compress.evals.results import PositionLine, TokenLine
from compress.evals.specs import load_tasks, read_specs
from compress.report import replace_text

if TYPE_CHECKING:
    from torch import Tensor

    from compress.plan import Evaluate

MOST_BINS = 48  # points of a plot
_LINES = TypeAdapter(list[TokenLine])


def token_lines(
    directory: Path,
    dense: Path,
    settings: Evaluate,
    *,
    folder: Path = Path(),
    device: torch.device | None = None,
    trust_remote_code: bool = False,
    cache: bool = True,
) -> dict[str, TokenLine]:
    """Compare a model with the dense one on the tasks of `settings`: a line per task that scores tokens.

    Args:
        directory: the model in question.
        dense: the model that it came from.
        settings: tasks and conditions.
        folder: what relative files are relative to.
        device: where to compute; the CPU by default.
        trust_remote_code: run Python code that comes with the models.
        cache: use what an earlier comparison found, and keep what this one finds.

    Raises:
        PlanError: a task or its samples are not there, or the two models have different tokenizers.
    """
    need_harness()
    device = device or torch.device("cpu")
    runners = [Runner(path, settings, device, trust_remote_code=trust_remote_code) for path in (directory, dense)]
    check_alike(runners[0].tokenizer, runners[1].tokenizer, directory)
    include = folder / settings.include_path if settings.include_path else None
    found: dict[str, TokenLine] = {}
    pair: Any = None
    for spec in read_specs(settings.tasks, folder, "tasks"):
        with quiet():
            loaded = load_tasks(spec, include)
        tasks = loaded["tasks"]
        for task in tasks.values():
            settle(task, settings.num_fewshot)
        identity = [[task_hash(task), documents_hash(task, settings.limit)] for task in tasks.values()]
        entry = cache_folder() / f"{runners[0].key(spec, runners[1].model_hash, identity)}.tokens.json"
        lines = _cached(entry) if cache else None
        if lines is None:
            lines = []
            for name, task in tasks.items():
                if task.OUTPUT_TYPE == "generate_until":
                    continue
                if pair is None:
                    with quiet():
                        pair = _pair(runners)
                shown = spec.name if spec.form else name
                lines.append(_line(shown, _requests(pair, name, task, settings.limit), pair, settings.batch_size))
            if cache:
                entry.parent.mkdir(parents=True, exist_ok=True)
                replace_text(entry, _LINES.dump_json(lines).decode())
        found |= {line.task: line for line in lines}
    return found


def _pair(runners: list[Runner]) -> Any:
    from compress.evals.lm import PairLM

    return PairLM(*(runner.lm() for runner in runners))


def _cached(entry: Path) -> list[TokenLine] | None:
    try:
        return _LINES.validate_json(entry.read_bytes())
    except (OSError, ValidationError):
        return None


def _requests(pair: Any, name: str, task: Any, limit: int | None) -> list[tuple[list[int], list[int]]]:
    """The contexts and continuations that lm-eval would score, each once, longest first."""
    from lm_eval.evaluator import evaluate

    pair.seen.clear()
    with quiet():
        seed_as_harness()
        evaluate(pair, {"tasks": {name: task}}, limit=limit, bootstrap_iters=0, log_samples=False)
    unique = {(tuple(context), tuple(continuation)): None for context, continuation in pair.seen}
    ordered = sorted(unique, key=lambda one: (-len(one[0]) - len(one[1]), one))
    return [(list(context), list(continuation)) for context, continuation in ordered]


@torch.no_grad()
def _line(name: str, requests: list[tuple[list[int], list[int]]], pair: Any, batch_size: int) -> TokenLine:
    scores = Scores()
    positions: list[Tensor] = []
    for start in range(0, len(requests), batch_size):
        batch = requests[start : start + batch_size]
        rows = [torch.tensor((c + t)[-(pair.max_length + 1) :]) for c, t in batch]
        inputs = pad_sequence([row[:-1] for row in rows], batch_first=True)  # (rows, length); causal: padding is unseen
        logits = [model(inputs.to(pair.device)).logits for model in pair.models]  # (rows, length, vocabulary) each
        places = [torch.arange(len(row) - len(t), len(row)) for row, (_, t) in zip(rows, batch, strict=True)]
        for index, (row, place) in enumerate(zip(rows, places, strict=True)):
            for part in torch.split(place, max(1, LOGITS_AT_ONCE // logits[0].shape[-1])):
                # The state before a target predicts it.
                scores.add([one[index, part - 1] for one in logits], row[part].to(pair.device))
        positions += places
    return TokenLine(task=name, divergence=scores.divergence(), positions=_by_position(scores, torch.cat(positions)))


def _by_position(scores: Scores, positions: Tensor) -> tuple[PositionLine, ...]:
    """Means over the tokens of each position (tokens,), several positions to a line where there are many."""
    kl, agree = torch.cat(scores.kl).clamp_min(0), torch.cat(scores.agree).double()
    width = -(-(int(positions.max()) + 1) // MOST_BINS)
    bins = positions // width
    lines = []
    for index in sorted(set(bins.tolist())):
        chosen = bins == index
        lines.append(
            PositionLine(
                first=index * width,
                last=index * width + width - 1,
                tokens=int(chosen.sum()),
                kl_mean=float(kl[chosen].mean()),
                top1_agreement=float(agree[chosen].mean()),
            )
        )
    return tuple(lines)
