"""The gate on outcomes made up for it: what it alarms at and how often, what it refuses, and what it says."""

from __future__ import annotations

import math
import os
import random
from dataclasses import replace
from typing import TYPE_CHECKING
from xml.etree import ElementTree

import numpy as np
import pytest
from pyarrow import parquet
from scipy import stats

from compress.errors import PlanError
from compress.evals.ci import junit, summary, workflow_commands
from compress.evals.commands import cells
from compress.evals.gate import compare
from compress.evals.outcomes import Outcomes, Sample, Task, prompts_hash
from compress.plan import Gate

if TYPE_CHECKING:
    from pathlib import Path

    from compress.evals.results import Comparison, GateResult

GATES = 500


def sample(number: int, right: bool = True, loglikelihood: float | None = None, size: int = 1) -> Sample:
    """A sample of a multiple choice between two, or of a document with `loglikelihood` of `size` words."""
    identity = {"filter": "none", "doc_id": number, "doc": f"{number:016x}", "prompt": f"{number:016x}"}
    if loglikelihood is None:
        scores = (-1.0, -2.0) if right else (-2.0, -1.0)
        return Sample(**identity, loglikelihoods=scores, greedy=(False,) * 2, gold=0, metrics={"acc": (float(right),)})
    metrics = {"word_perplexity": (loglikelihood, float(size))}
    return Sample(**identity, loglikelihoods=(loglikelihood,), greedy=(False,), gold=None, metrics=metrics)


def outcomes(**tasks: list[Sample]) -> Outcomes:
    """Outcomes under fixed conditions."""
    described = tuple(
        Task(
            name=name,
            spec=name,
            hash="h",
            prompts=prompts_hash(samples),
            version="1.0",
            num_fewshot=0,
            output_type="multiple_choice",
            samples=len(samples),
            metrics={},
            aggregation={"acc": "mean", "word_perplexity": "weighted_perplexity"},
            higher_is_better={},
        )
        for name, samples in tasks.items()
    )
    conditions = {"compress_version": "0", "harness": "0.4.13", "versions": {"torch": "2"}, "device": "cpu"}
    conditions |= {"dtype": "auto", "batch_size": 16, "limit": None, "num_fewshot": None, "add_bos_token": None}
    found = Outcomes(model="m", model_hash="m", tokenizer_hash="t", tasks=described, **conditions)
    return found.with_samples(dict(tasks))


def rights(*correct: bool) -> list[Sample]:
    return [sample(number, right) for number, right in enumerate(correct)]


def scored(correct: np.ndarray) -> list[Sample]:
    """Samples that are right or wrong, of a task without choices."""
    return [
        Sample("none", i, f"{i:016x}", "", (-2.0 + right,), (bool(right),), None, {"acc": (float(right),)})
        for i, right in enumerate(correct)
    ]


def measured(metric: str, values: list[float], aggregation: str = "mean", higher_is_better: bool = True) -> Outcomes:
    """A task of one metric of generated answers, with these values."""
    samples = [Sample("none", i, f"{i:016x}", "", (), (), None, {metric: (x,)}) for i, x in enumerate(values)]
    found = outcomes(t=samples)
    described = {"aggregation": {metric: aggregation}, "higher_is_better": {metric: higher_is_better}}
    task = found.tasks[0].model_copy(update=described)
    return found.model_copy(update={"tasks": (task,)}).with_samples({"t": samples})


def two_models(draw: np.random.Generator, n: int, worse: float, better: float) -> tuple[list[Sample], list[Sample]]:
    """n samples on which a share `worse` turns from right to wrong, and a share `better` the other way."""
    kinds = draw.choice(4, n, p=[worse, better, 0.7 * (1 - worse - better), 0.3 * (1 - worse - better)])
    before, after = (kinds == 0) | (kinds == 2), (kinds == 1) | (kinds == 2)
    return scored(before), scored(after)


def gate(before: Outcomes, after: Outcomes, **settings: object) -> GateResult:
    return compare(after, before, Gate(**{"resamples": 999, **settings}), name="baseline.json")


def only(result: GateResult, metric: str = "acc") -> Comparison:
    (found,) = [one for one in result.comparisons if one.metric == metric]
    return found


def alarms(n: int, worse: float, better: float, tasks: int = 1, **settings: object) -> list[str]:
    """The verdicts of many gates on models that differ by chance or by more."""
    draw = np.random.default_rng(0)
    verdicts = []
    for _ in range(GATES):
        pairs = [two_models(draw, n, worse, better) for _ in range(tasks)]
        both = [outcomes(**{f"task{i}": pair[side] for i, pair in enumerate(pairs)}) for side in (0, 1)]
        verdicts.append(gate(both[0], both[1], **settings).verdict)
    return verdicts


def at_most(rate: float) -> float:
    """The most of GATES that an event of this rate reaches, at three standard deviations."""
    return GATES * rate + 3 * math.sqrt(GATES * rate * (1 - rate))


# ------------------------------------------------------------------ how often


@pytest.mark.parametrize("margin", [0.0005, 0.02])
def test_models_that_are_equally_good_raise_no_false_alarm(margin: float) -> None:
    """Three tasks, a tenth of the answers flipped by chance: an alarm at rate alpha at most, whatever the margin."""
    verdicts = alarms(120, 0.05, 0.05, tasks=3, margin=margin)
    assert verdicts.count("fail") <= at_most(0.05)


def test_a_planted_regression_is_alarmed_at_with_the_stated_power() -> None:
    n, flips, margin, power = 500, 0.10, 0.03, 0.8
    first = two_models(np.random.default_rng(9), n, flips / 2, flips / 2)
    stated = only(gate(outcomes(t=first[0]), outcomes(t=first[1]), margin=margin)).detects
    error = math.sqrt(flips / n)
    planted = max(margin, stats.norm.ppf(0.95) * error) + stats.norm.ppf(power) * error
    assert stated == pytest.approx(planted, rel=0.1)
    verdicts = alarms(n, (flips + planted) / 2, (flips - planted) / 2, margin=margin)
    assert verdicts.count("fail") / GATES == pytest.approx(power, abs=3 * math.sqrt(power * (1 - power) / GATES) + 0.02)


def test_one_regression_of_ten_tasks_is_alarmed_at_with_the_stated_power() -> None:
    """Holm asks more of it than of one alone, and so `detects` and the size that would do say more."""
    draw, n, flips, gates = np.random.default_rng(10), 200, 0.10, 120

    def both(planted: float) -> tuple[Outcomes, Outcomes]:
        losses = [planted, *[0.0] * 9]
        pairs = [two_models(draw, n, (flips + loss) / 2, (flips - loss) / 2) for loss in losses]
        one, other = ({f"task{i}": pair[side] for i, pair in enumerate(pairs)} for side in (0, 1))
        return outcomes(**one), outcomes(**other)

    stated = np.mean([one.detects for one in gate(*both(0.0), margin=0.001).comparisons if one.detects])
    error = math.sqrt(flips / n)
    assert stated == pytest.approx((stats.norm.ppf(1 - 0.005) + stats.norm.ppf(0.8)) * error, rel=0.1)
    found = [gate(*both(float(stated)), margin=0.001).comparisons[0] for _ in range(gates)]
    alarmed = sum(one.verdict == "fail" for one in found) / gates
    assert alarmed == pytest.approx(0.8, abs=3 * math.sqrt(0.16 / gates) + 0.02)
    undecided = next(one for one in found if one.verdict == "inconclusive" and (one.loss or 0) > 0.001)
    flipped, loss = undecided.flips, undecided.loss
    assert flipped is not None
    assert loss is not None
    variance = (flipped.worse + flipped.better) / n - loss**2
    z = stats.norm.ppf(1 - 0.005) + stats.norm.ppf(0.8)
    assert undecided.needed == math.ceil(z**2 * variance / loss**2)


def test_a_model_that_is_worse_by_the_margin_seldom_passes() -> None:
    verdicts = alarms(400, 0.065, 0.035, margin=0.03)
    assert verdicts.count("pass") <= at_most(0.05)


def test_the_size_that_would_do_does() -> None:
    before, after = two_models(np.random.default_rng(0), 100, 0.03, 0.03)
    small = only(gate(outcomes(t=before), outcomes(t=after), margin=0.04))
    assert small.verdict == "inconclusive"
    assert small.needed is not None
    assert f"{small.needed:,} samples would do" in small.why
    flips, loss = small.flips, small.loss
    assert flips is not None
    assert loss is not None
    rates = flips.worse / 100, flips.better / 100
    assert alarms(small.needed, *rates, margin=0.04).count("pass") >= GATES * 0.8 - 3 * math.sqrt(GATES * 0.16)


def test_perplexity_alarms_and_passes() -> None:
    """Documents that all lose 3 % per word, with noise: a margin of 2 % fails, one of 5 % passes."""
    draw = np.random.default_rng(5)
    sizes = draw.integers(20, 200, 80)
    before = [sample(i, loglikelihood=-5.0 * size, size=int(size)) for i, size in enumerate(sizes)]
    noise = draw.normal(0, 0.05, 80)
    after = [
        sample(i, loglikelihood=-(5.0 + math.log(1.03)) * size + noise[i] * math.sqrt(size), size=int(size))
        for i, size in enumerate(sizes)
    ]
    for margin, verdict in ((0.02, "fail"), (0.05, "pass")):
        found = only(gate(outcomes(t=before), outcomes(t=after), perplexity_margin=margin), "word_perplexity")
        assert found.verdict == verdict
        assert found.loss == pytest.approx(0.03, abs=0.003)
        assert found.baseline == pytest.approx(math.exp(5))


def test_the_loss_of_bits_per_byte_is_their_own_increase() -> None:
    """Not that of the perplexity per byte: at 6 bits a byte, 8 % more bits are 39 % more perplexity."""
    draw = np.random.default_rng(8)
    sizes = draw.integers(50, 500, 60)
    before = -6.0 * math.log(2) * sizes * draw.uniform(0.9, 1.1, 60)
    after = before * (1.08 + draw.normal(0, 0.005, 60))
    sides = []
    for values in (before, after):
        samples = [sample(i, loglikelihood=float(x), size=int(sizes[i])) for i, x in enumerate(values)]
        found = outcomes(t=samples)
        task = found.tasks[0].model_copy(update={"aggregation": {"word_perplexity": "bits_per_byte"}})
        sides.append(found.model_copy(update={"tasks": (task,)}).with_samples({"t": samples}))
    one = only(gate(*sides, perplexity_margin=0.1), "word_perplexity")
    bits = [-values.sum() / sizes.sum() / math.log(2) for values in (before, after)]
    assert (one.baseline, one.value) == pytest.approx(tuple(bits))
    assert one.loss == pytest.approx(bits[1] / bits[0] - 1)
    ends = [
        np.quantile([after[rows].sum() / before[rows].sum() - 1 for rows in draw.integers(60, size=(4000, 60))], q)
        for q in (0.05, 0.95)
    ]
    assert (one.low, one.high) == pytest.approx(tuple(ends), abs=2e-4)
    assert (one.verdict, only(gate(*sides, perplexity_margin=0.07), "word_perplexity").verdict) == ("pass", "fail")


def test_equal_perplexities_raise_no_false_alarm() -> None:
    draw, failed = np.random.default_rng(6), 0
    for _ in range(GATES):
        values = draw.normal(-50, 10, 40)
        before = [sample(i, loglikelihood=float(x), size=10) for i, x in enumerate(values)]
        after = [sample(i, loglikelihood=float(x + draw.normal(0, 2)), size=10) for i, x in enumerate(values)]
        failed += gate(outcomes(t=before), outcomes(t=after), perplexity_margin=1e-6).verdict == "fail"
    assert failed <= at_most(0.05)


def test_ties_of_equally_good_models_raise_no_false_alarm() -> None:
    """A tenth of the answers of each is a tie, as with letters for answers in 16 bits, and right by their order half
    the time."""
    draw, failed = np.random.default_rng(7), 0
    answers = {"tie": (-1.5, -1.5), "right": (-1.0, -2.0), "wrong": (-2.0, -1.0)}

    def model() -> list[Sample]:
        kinds = [("tie", "right", "wrong")[kind] for kind in draw.choice(3, 300, p=[0.1, 0.6, 0.3])]
        rights = [kind == "right" or (kind == "tie" and bool(draw.integers(2))) for kind in kinds]
        return [
            Sample("none", i, f"{i:016x}", "", answers[kind], (False,) * 2, None, {"acc": (float(right),)})
            for i, (kind, right) in enumerate(zip(kinds, rights, strict=True))
        ]

    for _ in range(GATES):
        failed += gate(outcomes(t=model()), outcomes(t=model()), margin=0.0005).verdict == "fail"
    assert failed <= at_most(0.05)


# ------------------------------------------------------------------ verdicts


def test_the_same_answers_pass_however_few() -> None:
    same = rights(True, False, True)
    result = gate(outcomes(t=same), outcomes(t=same))
    assert result.verdict == "pass"
    assert only(result).why == "the same as the baseline, bit for bit"
    assert only(result).high == pytest.approx(2.7055 / (3 + 2.7055), rel=1e-3)  # no flips: z² / (n + z²)


def test_equal_scores_without_log_likelihoods_prove_no_equal_model() -> None:
    """Two models may both be right on ten generated answers."""
    before = [Sample("none", i, f"{i:016x}", "", (), (), None, {"acc": (1.0,)}) for i in range(10)]
    assert gate(outcomes(t=before), outcomes(t=before)).verdict == "inconclusive"


def test_the_order_of_samples_does_not_matter() -> None:
    before, after = two_models(np.random.default_rng(1), 300, 0.08, 0.03)
    mixed = [list(before), list(after)]
    for seed, samples in enumerate(mixed):
        random.Random(seed).shuffle(samples)
    assert gate(outcomes(t=before), outcomes(t=after)) == gate(outcomes(t=mixed[0]), outcomes(t=mixed[1]))


def test_inconclusive_counts_as_told() -> None:
    before, after = rights(*[True] * 40), rights(*[True] * 39, False)
    results = [gate(outcomes(t=before), outcomes(t=after), inconclusive=told) for told in ("fail", "pass")]
    assert [one.verdict for one in results] == ["inconclusive"] * 2
    assert [one.passed for one in results] == [False, True]


def test_log_likelihoods_that_are_not_finite_fail() -> None:
    """A model of NaN is right on every pair: argmax takes the first."""
    before = rights(*[True] * 50)
    broken = [
        Sample(one.filter, one.doc_id, one.doc, one.prompt, (math.nan, math.nan), one.greedy, 0, {"acc": (1.0,)})
        for one in before
    ]
    result = gate(outcomes(t=before), outcomes(t=broken))
    assert result.verdict == "fail"
    assert "50 of 50 samples have log-likelihoods that are not finite" in result.notes[-1]
    assert only(result).flips is None


def test_a_model_that_says_the_same_to_everything_fails() -> None:
    """It is right on every pair, too, where the right sentence comes first."""
    before = rights(*[True] * 50)
    constant = [
        Sample(one.filter, one.doc_id, one.doc, one.prompt, (-1.0, -1.0), one.greedy, 0, {"acc": (1.0,)})
        for one in before
    ]
    result = gate(outcomes(t=before), outcomes(t=constant))
    assert result.verdict == "fail"
    assert "50 answers are ties that were none in the baseline; they count as wrong" in result.notes[-1]
    assert gate(outcomes(t=constant), outcomes(t=constant)).verdict == "pass"
    gained = gate(outcomes(t=constant), outcomes(t=before))
    assert gained.verdict == "pass"
    assert "50 answers are ties in the baseline alone; they count as wrong there" in gained.notes[-1]


@pytest.mark.parametrize(("higher", "wrong"), [(True, 0.0), (False, 1.0)])
def test_a_tie_is_wrong_in_every_accuracy(higher: bool, wrong: float) -> None:
    """Also where its order made it right, of an error rate as of a share of right answers."""
    sides = []
    for scores in ((-1.0, -2.0), (-1.0, -1.0)):
        samples = [Sample("none", i, f"{i:016x}", "", scores, (False,) * 2, 0, {"x": (1 - wrong,)}) for i in range(50)]
        found = measured("x", [1 - wrong] * 50, higher_is_better=higher)
        sides.append(found.with_samples({"t": samples}))
    one = only(gate(*sides), "x")
    assert (one.baseline, one.value, one.verdict) == (1 - wrong, wrong, "fail")


@pytest.mark.parametrize("step", [1.0, 0.5])  # of rights and wrongs; of other means
def test_a_metric_that_had_better_be_low_is_worse_when_it_rises(step: float) -> None:
    low, high = ([0.0] * (60 - k) + [step] * k for k in (10, 40))
    before, after = (measured("error", values, higher_is_better=False) for values in (low, high))
    risen = only(gate(before, after), "error")
    assert risen.loss == pytest.approx(30 * step / 60)
    assert risen.verdict == "fail"
    fallen = only(gate(after, before), "error")
    assert fallen.loss == pytest.approx(-30 * step / 60)
    assert fallen.verdict == "pass"


def test_a_mean_that_is_no_share_has_a_unit_of_its_own() -> None:
    """Marks from 1 to 10 that fall by 0.3 lose no 30 %."""
    marks = [4.0, 5.5, 7.0, 3.5] * 20
    one = only(gate(measured("marks", marks), measured("marks", [mark - 0.3 for mark in marks])), "marks")
    assert (one.kind, one.loss) == ("score", pytest.approx(0.3))
    assert cells(one)[:3] == ("0.300", "0.300", "0.0100")


def test_what_a_mean_leaves_out_is_left_out() -> None:
    """lm-eval's nanmean is over the samples that have a number."""
    nan = math.nan
    before = measured("x", [1.0, 0.0, nan, 1.0] * 30, aggregation="nanmean")
    after = measured("x", [1.0, 0.0, 1.0, 0.0] * 30, aggregation="nanmean")
    one = only(gate(before, after, margin=0.2), "x")
    assert one.samples == 90
    assert (one.baseline, one.value, one.loss) == pytest.approx((2 / 3, 1 / 3, 1 / 3))
    assert one.verdict == "fail"
    silent = only(gate(after, before, margin=0.9), "x")  # it has no number where the baseline has one
    assert silent.kind == "accuracy"
    assert (silent.verdict, silent.why) == ("fail", "30 of 120 values are not finite that are in the baseline")
    lacking = measured("x", [1.0, nan], aggregation="mean")
    assert only(gate(lacking, lacking), "x").why == "1 of 2 values are not finite in the baseline"


def test_samples_that_a_mean_leaves_out_are_the_same_as_themselves(tmp_path: Path) -> None:
    samples = [replace(one, metrics=one.metrics | {"x": (math.nan,)}) for one in rights(True, False, True)]
    outcomes(t=samples).save(tmp_path / "b.json")
    result = gate(Outcomes.load(tmp_path / "b.json"), Outcomes.load(tmp_path / "b.json"))
    assert only(result).why == "the same as the baseline, bit for bit"


def test_flips_and_answers() -> None:
    before, after = rights(True, True, False, True), rights(True, False, True, True)
    found = only(gate(outcomes(t=before), outcomes(t=after), margin=0.9))
    assert found.flips is not None
    assert (found.flips.worse, found.flips.better, found.flips.answers) == (1, 1, 2)
    p = math.exp(-1) / (math.exp(-1) + math.exp(-2))  # softmax over the two answers
    kl = p * math.log(p / (1 - p)) + (1 - p) * math.log((1 - p) / p)
    assert found.answer_kl == pytest.approx(kl / 2)  # on two of the four samples


def test_the_likelihood_of_right_answers_is_shown_and_judged_when_asked() -> None:
    before, after = rights(*[True] * 60), rights(*[True] * 50, *[False] * 10)
    shown = only(gate(outcomes(t=before), outcomes(t=after), margin=0.5), "loglikelihood")
    assert shown.loss == pytest.approx(1 / 6)
    assert shown.verdict is None
    judged = gate(outcomes(t=before), outcomes(t=after), margin=0.5, loglikelihood_margin=0.01)
    assert only(judged, "loglikelihood").verdict == "fail"


def test_holm_over_tasks() -> None:
    """One task at p = 6/2⁸ is an alarm alone, and none among four."""
    worse = rights(*[True] * 12, *[False] * 6), rights(*[True] * 6, *[False] * 12)
    same = rights(*[True] * 17, False), rights(*[True] * 16, False, True)
    assert gate(outcomes(t=worse[0]), outcomes(t=worse[1])).verdict == "fail"
    tasks = {"t": worse} | {f"s{number}": same for number in range(3)}
    both = [outcomes(**{name: pair[side] for name, pair in tasks.items()}) for side in (0, 1)]
    found = next(one for one in gate(*both).comparisons if one.task == "t" and one.metric == "acc")
    assert found.p == pytest.approx(1 / 64)
    assert found.p_holm == pytest.approx(4 / 64)
    assert found.verdict == "inconclusive"


def filtered(strict: list[float], flexible: list[float]) -> Outcomes:
    """Generated answers under two filters, the first of which is not the first by the alphabet."""
    samples = [
        Sample(chosen, i, f"{i:016x}", "", (), (), None, {"exact_match": (value,)})
        for chosen, values in (("strict-match", strict), ("flexible-extract", flexible))
        for i, value in enumerate(values)
    ]
    found = measured("exact_match", [])
    names = {f"exact_match,{chosen}": 0.0 for chosen in ("strict-match", "flexible-extract")}
    task = found.tasks[0].model_copy(update={"metrics": names, "samples": len(strict)})
    return found.model_copy(update={"tasks": (task,)}).with_samples({"t": samples})


def test_of_several_filters_the_first_is_judged_or_the_one_that_is_named() -> None:
    before = filtered([0.0] * 400, [1.0] * 400)
    after = filtered([0.0] * 400, [0.0] * 400)
    strict, flexible = "exact_match,strict-match", "exact_match,flexible-extract"
    for metrics, shown in (((), [strict]), (("exact_match",), [strict]), ((flexible,), [flexible])):
        found = gate(before, after, metrics=metrics).comparisons
        assert [one.metric for one in found] == shown
        assert found[0].samples == 400
    assert only(gate(before, after), strict).verdict == "pass"
    assert only(gate(before, after, metrics=(flexible,)), flexible).verdict == "fail"
    assert len(gate(before, after, metrics=(strict, flexible)).comparisons) == 2


# ------------------------------------------------------------------ refusals


def test_a_metric_that_no_task_has() -> None:
    same = outcomes(t=rights(True))
    assert only(gate(same, same, metrics=("acc",))).verdict == "pass"
    with pytest.raises(PlanError, match='no task has a metric "acc_nrom"'):
        gate(same, same, metrics=("acc_nrom",))


def test_a_metric_that_is_named_and_cannot_be_judged() -> None:
    """F1 over all samples has no value of a single one; the gate must not pass as if it had looked."""
    made = outcomes(t=[replace(one, metrics=one.metrics | {"f1": (0.0, 1.0)}) for one in rights(True, False)])
    task = made.tasks[0].model_copy(update={"aggregation": {"acc": "mean", "f1": "f1_score"}})
    made = made.model_copy(update={"tasks": (task,)}).with_samples(made.samples)
    with pytest.raises(PlanError, match='"f1" cannot be judged: it is no mean and no perplexity of its samples'):
        gate(made, made, metrics=("acc", "f1"))


def test_a_task_that_is_not_judged_is_named() -> None:
    texts = [sample(0, loglikelihood=-3.0, size=4)]
    both = outcomes(t=rights(True), texts=texts)
    assert gate(both, both).notes == ()
    assert gate(both, both, metrics=("acc",)).notes == ("texts: none of its metrics is judged",)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"harness": "0.4.9"}, "the baseline has another version of lm-eval: 0.4.9, not 0.4.13"),
        ({"batch_size": 8}, "the baseline has another batch size: 8, not 16"),
        ({"limit": 10}, "another limit: 10, not None"),
        ({"tokenizer_hash": "other"}, "the tokenizer differs from the baseline's"),
    ],
)
def test_a_baseline_of_other_conditions_is_refused(change: dict[str, object], says: str) -> None:
    same = outcomes(t=rights(True))
    with pytest.raises(PlanError, match=r"^") as caught:
        gate(same.model_copy(update=change).with_samples(same.samples), same)
    assert says in str(caught.value)
    assert "baseline.json: " in str(caught.value)
    assert caught.value.fix


def test_another_prompt_is_refused() -> None:
    same = outcomes(t=rights(True))
    other = same.model_copy(update={"tasks": (same.tasks[0].model_copy(update={"hash": "x", "version": "0.9"}),)})
    with pytest.raises(PlanError, match=r"another prompt or metric \(version 0.9 then, 1.0 now\)"):
        gate(other.with_samples(same.samples), same)


def test_tasks_that_one_side_lacks() -> None:
    one, two = outcomes(t=rights(True)), outcomes(t=rights(True), u=rights(True))
    with pytest.raises(PlanError, match="the baseline has no task u; it has t"):
        gate(one, two)
    with pytest.raises(PlanError, match="tasks u were not evaluated"):
        gate(two, one)


def test_samples_that_do_not_match_one_to_one() -> None:
    four, three = outcomes(t=rights(*[True] * 4)), outcomes(t=rights(*[True] * 3))
    with pytest.raises(PlanError, match=r"1 of the baseline's 4 are not among the 3 here, and 0 here are new"):
        gate(four, three)
    twice = outcomes(t=[sample(0), sample(0), sample(1)])
    with pytest.raises(PlanError, match=r"do not match one to one: 1 .* and 1 here are new"):
        gate(twice, outcomes(t=[sample(0), sample(1), sample(1)]))
    assert gate(twice, outcomes(t=[sample(1), sample(0), sample(0)])).verdict == "pass"


def test_other_versions_are_noted() -> None:
    same = outcomes(t=rights(True))
    other = same.model_copy(update={"versions": {"torch": "1"}, "dtype": "float16"}).with_samples(same.samples)
    assert gate(other, same).notes == ("dtype: float16 in the baseline, auto here", "torch: 1 in the baseline, 2 here")


# ------------------------------------------------------------------ files


def test_stored_outcomes_come_back(tmp_path: Path) -> None:
    made = outcomes(t=rights(True, False), p=[sample(0, loglikelihood=-3.25, size=7)])
    made.save(tmp_path / "b.json")
    back = Outcomes.load(tmp_path / "b.json")
    assert back.samples == made.samples
    assert back.model_copy(update={"samples_file": None, "samples_sha256": None}) == made


def test_two_processes_may_store_the_same_outcomes_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As two gates do in the cache: here the second process stores while the first has written half."""
    made, path, written = outcomes(t=rights(True, False)), tmp_path / "b.json", []
    whole = parquet.write_table

    def interrupted(*arguments: object, **options: object) -> None:
        whole(*arguments, **options)
        written.append(arguments)
        if len(written) == 1:
            with monkeypatch.context() as other:
                other.setattr(os, "getpid", lambda: 1)
                made.save(path)

    monkeypatch.setattr(parquet, "write_table", interrupted)
    made.save(path)
    assert len(written) == 2
    assert Outcomes.load(path).samples == made.samples
    assert sorted(one.name for one in tmp_path.iterdir()) == ["b.json", "b.parquet"]


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (lambda folder: (folder / "b.json").unlink(), "cannot be read: No such file"),
        (lambda folder: (folder / "b.parquet").unlink(), "cannot be read: No such file"),
        (lambda folder: (folder / "b.json").write_text("{"), "cannot be read"),
        (
            lambda folder: (folder / "b.json").write_text('{"results": {"acc": NaN}, "lm_eval_version": "0.4.13"}'),
            "cannot be read: it is a result of lm-eval's own command",
        ),
        (lambda folder: (folder / "b.json").write_text("{}"), "compress_version: Field required"),
        (lambda folder: (folder / "b.parquet").write_bytes(b"PAR1"), "b.parquet is not the file that belongs to it"),
        (
            lambda folder: (folder / "b.json").write_text('{"schema_version": 9}'),
            "it has schema version 9, and this compress reads up to 1",
        ),
    ],
)
def test_a_baseline_that_cannot_be_read(spoil: object, says: str, tmp_path: Path) -> None:
    outcomes(t=rights(True)).save(tmp_path / "b.json")
    spoil(tmp_path)  # type: ignore[operator]
    with pytest.raises(PlanError, match=r"^") as caught:
        Outcomes.load(tmp_path / "b.json")
    assert says in str(caught.value)
    assert "fix: give a file that compress baseline wrote" in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"loglikelihoods": (-1.0, None)}, "a sample lacks a value"),
        ({"greedy": (None, True)}, "a sample lacks a value"),
        ({"metrics": {"acc": (None,)}}, "a sample lacks a value"),
        ({"gold": 2}, "of 2 choices none is number 2"),
        ({"gold": -1}, "of 2 choices none is number -1"),
        ({"loglikelihoods": (), "greedy": ()}, "of 0 choices none is number 0"),
    ],
)
def test_a_sample_that_cannot_be(changes: dict[str, object], says: str, tmp_path: Path) -> None:
    one, *others = rights(True, False, True)
    outcomes(t=[replace(one, **changes), *others]).save(tmp_path / "b.json")
    with pytest.raises(PlanError, match="cannot be read") as caught:
        Outcomes.load(tmp_path / "b.json")
    assert says in str(caught.value)


def test_samples_that_belong_to_other_tasks(tmp_path: Path) -> None:
    whole = outcomes(t=rights(True, False), u=rights(True))
    for kept, says in ((("t",), "samples of other tasks than t"), (("t", "u", "v"), "has 3 rows, for tasks of")):
        tasks = tuple(whole.tasks[0].model_copy(update={"name": name}) for name in kept)
        whole.model_copy(update={"tasks": tasks}).with_samples(whole.samples).save(tmp_path / "b.json")
        with pytest.raises(PlanError, match=says):
            Outcomes.load(tmp_path / "b.json")


def test_a_name_that_a_terminal_obeys(tmp_path: Path) -> None:
    outcomes(**{"t\x1b[2J": rights(True)}).save(tmp_path / "b.json")
    with pytest.raises(PlanError, match="holds characters that cannot be printed"):
        Outcomes.load(tmp_path / "b.json")


def test_samples_with_another_number_of_answers() -> None:
    one, *others = rights(True, False, True)
    found = outcomes(t=[replace(one, loglikelihoods=(-1.0, -2.0, -3.0), greedy=(False,) * 3), *others])
    with pytest.raises(PlanError, match="document 0 of t has 2 log-likelihoods in the baseline, 3 here"):
        gate(outcomes(t=rights(True, False, True)), found)


def test_the_words_of_ci() -> None:
    before, after = rights(*[True] * 60), rights(*[True] * 40, *[False] * 20)
    result = gate(outcomes(**{"t:50%": before}), outcomes(**{"t:50%": after}))
    suite = ElementTree.fromstring(junit(result)).find("testsuite")
    assert suite is not None
    assert (suite.get("tests"), suite.get("failures")) == ("1", "1")
    case = suite.find("testcase")
    assert case is not None
    assert case.get("classname") == "t:50%"
    (line,) = workflow_commands(result)
    assert line.startswith("::error title=compress gate%3A t%3A50%25%2C acc::fail: acc 1.000 to 0.667, loss 33.33 %25")
    assert "\n" not in line
    assert "| t:50% | acc | fail | 33.33 % |" in summary(result)
    passed = gate(outcomes(t=before), outcomes(t=before))
    assert workflow_commands(passed) == ["::notice title=compress gate::m is as good as its baseline"]
    allowed = gate(outcomes(t=before), outcomes(t=rights(*[True] * 59, False)), inconclusive="pass")
    assert workflow_commands(allowed)[0].startswith("::warning ")
    assert 'failures="0"' in junit(allowed)
