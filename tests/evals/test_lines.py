"""What the lines of a report say of tasks: flips against the dense model, ties, samples under several filters."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import TYPE_CHECKING

from compress.evals.lines import task_lines
from compress.evals.results import Flips
from tests.evals.test_gate import measured, outcomes, rights

if TYPE_CHECKING:
    from compress.evals.outcomes import Outcomes, Sample


def under_both(*samples: Sample) -> Outcomes:
    """A task whose samples stand under two filters, as lm-eval logs them: one filter after the other."""
    found = outcomes(t=[replace(one, filter=name) for name in ("strict-match", "flexible-extract") for one in samples])
    task = found.tasks[0].model_copy(update={"samples": len(samples)})
    return found.model_copy(update={"tasks": (task,)}).with_samples(found.samples)


def test_what_stands_under_two_filters_counts_once() -> None:
    before = rights(True, True, False, True)
    after = rights(True, False, True, False)
    tied = replace(after[0], loglikelihoods=(-1.0, -1.0))
    (line,) = task_lines(under_both(tied, *after[1:]), under_both(*before))
    assert (line.samples, line.ties) == (4, 1)
    assert line.flips == Flips(worse=2, better=1, answers=3)


def test_flips_are_those_of_right_and_wrong() -> None:
    """Not the changes of another mean, and of an error rate the rises."""
    assert task_lines(measured("f1", [0.5, 0.5]), measured("f1", [0.7, 0.2]))[0].flips is None
    rates = [measured("error", values, higher_is_better=False) for values in ([0.0, 1.0, 1.0], [0.0, 0.0, 0.0])]
    assert task_lines(*rates)[0].flips == Flips(worse=2, better=0)


def test_a_model_of_nan_has_no_flips() -> None:
    """argmax takes the first of its choices, and would call it better wherever that is right."""
    nan = [replace(one, loglikelihoods=(math.nan,) * 2, metrics={"acc": (1.0,)}) for one in rights(False, False)]
    (line,) = task_lines(outcomes(t=nan), outcomes(t=rights(False, False)))
    assert (line.not_finite, line.flips) == (2, None)
