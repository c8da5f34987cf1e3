"""Two evaluations, sample by sample: whether they may be compared, and which samples belong together."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

from compress.errors import PlanError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from compress.evals.outcomes import Outcomes, Sample

    Pair = tuple[Sample, Sample]  # of the baseline, of the model in question

BASELINE, FOUND = 0, 1  # the sides of a pair


def check_conditions(found: Outcomes, baseline: Outcomes, name: str) -> None:
    """Refuse a baseline that was taken under other conditions; log-likelihoods depend on each of them."""
    again = "write the baseline again under the conditions of the gate, or give the gate those of the baseline"
    for key, what in (
        ("harness", "version of lm-eval"),
        ("batch_size", "batch size"),
        ("limit", "limit"),
        ("num_fewshot", "number of examples"),
        ("add_bos_token", "setting of add_bos_token"),
    ):
        now, then = getattr(found, key), getattr(baseline, key)
        if now != then:
            raise PlanError(f"the baseline has another {what}: {then}, not {now}", where=name, fix=again)
    check_tokenizer(found.tokenizer_hash, baseline, name)
    known = {task.name: task for task in baseline.tasks}
    for task in found.tasks:
        if task.name not in known:
            has = f"it has {', '.join(known)}"
            raise PlanError(f"the baseline has no task {task.name}; {has}", where=name, fix=again)
        other = known[task.name]
        if task.hash != other.hash:
            was = (
                f"version {other.version} then, {task.version} now" if task.version != other.version else "same version"
            )
            problem = f"the baseline of {task.name} was taken with another prompt or metric ({was})"
            raise PlanError(problem, where=name, fix="write the baseline again")
    missing = sorted(set(known) - {task.name for task in found.tasks})
    if missing:
        raise PlanError(f"the baseline's tasks {', '.join(missing)} were not evaluated", where=name, fix=again)


def check_tokenizer(found: str, baseline: Outcomes, name: str) -> None:
    """Refuse a baseline whose tokenizer has another hash."""
    if found != baseline.tokenizer_hash:
        fix = "copy the tokenizer of the baseline's model, or write a baseline of this one"
        raise PlanError("the tokenizer differs from the baseline's", where=name, fix=fix)


def differences(found: Outcomes, baseline: Outcomes) -> list[str]:
    """What differs from the baseline and is allowed to."""
    pairs: list[tuple[str, str, str | None]] = [
        ("dtype", baseline.dtype, found.dtype),
        ("device", baseline.device, found.device),
    ]
    pairs += [(key, version, found.versions.get(key)) for key, version in baseline.versions.items()]
    return [f"{what}: {then} in the baseline, {now} here" for what, then, now in pairs if then != now]


def pair(task: str, found: Sequence[Sample], baseline: Sequence[Sample], name: str) -> list[Pair]:
    """Match the samples of two runs by what was asked, whatever their order: (baseline, found) each.

    Raises:
        PlanError: they do not match one to one.
    """
    ours, theirs = (Counter(one.identity for one in samples) for samples in (found, baseline))
    extra, absent = list((ours - theirs).elements()), list((theirs - ours).elements())
    if extra or absent:
        documents = {one.identity: one.doc_id for one in (*baseline, *found)}
        first = documents[(absent or extra)[0]]
        raise PlanError(
            f"the samples of {task} do not match one to one: {len(absent):,} of the baseline's {len(baseline):,} are "
            f"not among the {len(found):,} here, and {len(extra):,} here are new (document {first} is the first)",
            where=name,
            fix="evaluate the file of samples that the baseline was taken on, or write the baseline again",
        )
    if not found:
        raise PlanError(f"{task} has no samples", where=name, fix="write the baseline again")
    keys = [sorted(samples, key=lambda one: (one.identity, one.loglikelihoods)) for samples in (baseline, found)]
    pairs: list[Pair] = list(zip(*keys, strict=True))
    for one, other in pairs:
        if len(one.loglikelihoods) != len(other.loglikelihoods):
            counts = f"{len(one.loglikelihoods)} log-likelihoods in the baseline, {len(other.loglikelihoods)} here"
            problem = f"document {one.doc_id} of {task} has {counts}"
            raise PlanError(problem, where=name, fix="write the baseline again")
    return pairs


def tied_alone(pair: Pair, side: int) -> bool:
    """Whether the answer of a multiple choice is a tie in one of the models alone."""
    return pair[side].tied and not pair[1 - side].tied
