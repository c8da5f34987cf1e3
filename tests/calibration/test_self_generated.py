"""Text sampled from the reference model: its distribution, its determinism, and what it leaves untouched."""

from __future__ import annotations

import logging
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from compress.calibration.self_generated import generate
from compress.errors import PlanError, RunError

REFERENCE = Path(__file__).parents[2] / "examples" / "reference"


@pytest.fixture
def model() -> Any:
    return AutoModelForCausalLM.from_pretrained(REFERENCE, dtype=torch.float32)


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(REFERENCE)


def always(model: Any, token: int) -> None:
    """Let `model` predict `token` with certainty wherever it is."""
    vocabulary = model.config.vocab_size

    def forward(module: Any, inputs: Any, output: torch.Tensor) -> torch.Tensor:
        certain = torch.full_like(output, float("-inf"))
        certain[..., token % vocabulary] = 0
        return certain

    model.lm_head.register_forward_hook(forward)


def test_same_seed_same_tokens_and_every_token_is_real(model: Any, tokenizer: Any) -> None:
    first, again, other = (generate(model, tokenizer, samples=3, length=16, seed=seed) for seed in (0, 0, 1))
    assert first.ids.shape == (3, 16)
    assert first.mask.all()
    assert first.digest == again.digest != other.digest
    assert (first.ids[:, 0] == tokenizer.bos_token_id).all()
    assert not torch.equal(first.ids[0], first.ids[1])
    assert 0 <= first.ids.min() <= first.ids.max() < model.config.vocab_size


def test_batches_may_be_smaller_than_the_samples(model: Any, tokenizer: Any) -> None:
    made = generate(model, tokenizer, samples=5, length=8, seed=0, batch_size=2)
    assert made.ids.shape == (5, 8)
    assert len({tuple(row) for row in made.ids.tolist()}) == 5


def test_the_text_goes_on_after_the_end_token(model: Any, tokenizer: Any) -> None:
    always(model, tokenizer.eos_token_id)
    made = generate(model, tokenizer, samples=2, length=8, seed=0)
    assert made.ids.shape == (2, 8)
    assert (made.ids[:, 1:] == tokenizer.eos_token_id).all()


def test_the_whole_distribution_is_sampled(model: Any, tokenizer: Any) -> None:
    """Almost uniform logits must reach the whole vocabulary; top-k or top-p would not."""
    size = model.config.vocab_size
    slope = torch.linspace(0, 0.01, size)
    model.lm_head.register_forward_hook(lambda module, inputs, output: slope.expand_as(output))
    drawn = generate(model, tokenizer, samples=512, length=9, seed=0, batch_size=512).ids[:, 1:]
    expected = size * (1 - (1 - 1 / size) ** drawn.numel())
    assert abs(len(set(drawn.flatten().tolist())) - expected) < 0.05 * expected


def test_the_models_own_generation_settings_do_not_bend_the_distribution(model: Any, tokenizer: Any) -> None:
    """Two equally likely tokens: each follows itself half the time, within 5 standard errors."""
    model.generation_config.update(
        top_k=1, top_p=0.1, temperature=0.01, do_sample=False, repetition_penalty=9.0, suppress_tokens=[5]
    )
    even = torch.full((model.config.vocab_size,), float("-inf"))
    even[5:7] = 2.0
    model.lm_head.register_forward_hook(lambda module, inputs, output: even.expand_as(output))
    drawn = generate(model, tokenizer, samples=512, length=9, seed=0, batch_size=512).ids[:, 1:]
    repeats = (drawn[:, 1:] == drawn[:, :-1]).float()
    assert abs(float(repeats.mean()) - 0.5) < 5 * 0.5 / repeats.numel() ** 0.5


def test_frequencies_follow_the_model(model: Any, tokenizer: Any) -> None:
    """The first sampled token against the model's own probabilities: within 5 standard errors for the likely ones."""
    samples = 4000
    made = generate(model, tokenizer, samples=samples, length=2, seed=0, batch_size=samples)
    with torch.no_grad():
        logits = model(torch.tensor([[tokenizer.bos_token_id]])).logits[0, -1]
    probability = logits.softmax(-1)
    frequency = torch.bincount(made.ids[:, 1], minlength=len(probability)) / samples
    error = (probability * (1 - probability) / samples).sqrt()
    likely = probability * samples > 20
    assert likely.any()
    assert ((frequency - probability).abs() < 5 * error)[likely].all()


def test_the_callers_state_is_left_alone(model: Any, tokenizer: Any) -> None:
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    model.train()
    before = model.generation_config
    generate(model, tokenizer, samples=1, length=4, seed=0)
    assert torch.equal(torch.rand(3), expected)
    assert model.training
    assert model.generation_config is before


def test_the_callers_random_state_does_not_matter(model: Any, tokenizer: Any) -> None:
    torch.manual_seed(1)
    first = generate(model, tokenizer, samples=1, length=16, seed=3)
    torch.manual_seed(2)
    assert generate(model, tokenizer, samples=1, length=16, seed=3).digest == first.digest


@pytest.mark.parametrize("known", ["eos", "nothing"])
def test_without_bos_it_starts_from_eos_or_a_random_token(model: Any, known: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(REFERENCE)
    tokenizer.bos_token = None
    if known == "nothing":
        tokenizer.eos_token = None
    first, again = (generate(model, tokenizer, samples=8, length=4, seed=seed) for seed in (0, 0))
    assert torch.equal(first.ids, again.ids)
    starts = set(first.ids[:, 0].tolist())
    assert starts == {1} if known == "eos" else len(starts) > 1


def test_no_warning_is_raised(model: Any, tokenizer: Any, caplog: pytest.LogCaptureFixture) -> None:
    log = logging.getLogger("transformers")
    log.addHandler(caplog.handler)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            generate(model, tokenizer, samples=2, length=16, seed=0)
    finally:
        log.removeHandler(caplog.handler)
    assert not caplog.records


def test_more_tokens_than_positions_are_refused(model: Any, tokenizer: Any) -> None:
    with pytest.raises(PlanError, match="257 tokens from a model of 256 positions") as caught:
        generate(model, tokenizer, samples=1, length=257, seed=0)
    assert caught.value.fix


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_logits_without_a_distribution_are_refused(model: Any, tokenizer: Any, value: float) -> None:
    model.lm_head.register_forward_hook(lambda module, inputs, output: torch.full_like(output, value))
    before = model.generation_config
    with pytest.raises(RunError, match="logits are not finite at token 1"):
        generate(model, tokenizer, samples=1, length=4, seed=0)
    assert model.generation_config is before
