"""Calibration text sampled from the model itself, for where no representative text is at hand.

Source: LLM-QAT (Liu et al. 2023, arXiv 2305.17888), data-free generation from the model's own next-token
distribution; applied to calibration of pruning and quantization as self-calibration (Williams et al. 2024, arXiv
2410.17170). We sample the plain distribution: temperature 1, no top-k, no top-p, from the first token on. LLM-QAT takes
the argmax for the first few tokens; ours is the unbiased choice.

An end-of-text token does not end a sample: as in packed training data, the text goes on after it.
"""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList

from compress.calibration.tokens import TokenSet
from compress.errors import PlanError, RunError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def generate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    *,
    samples: int,
    length: int,
    seed: int,
    batch_size: int = 32,
) -> TokenSet:
    """Sample `samples` texts of `length` tokens from `model`; every token is real.

    Each text starts with the tokenizer's BOS token, else its EOS token, else a random one, and that token is counted.
    The same seed and batch size give the same tokens on the same hardware; the caller's random state, the model's mode
    and its generation settings are left as they were.

    Raises PlanError where `length` exceeds the model's max_position_embeddings, RunError where logits are not finite.
    """
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if limit is not None and length > limit:
        raise PlanError(
            f"cannot sample {length} tokens from a model of {limit} positions (max_position_embeddings)",
            where="calibration.length",
            fix=f"set length to at most {limit}",
        )
    with _own_random_state(model.device, seed), _sampling(model):
        starts = _starts(tokenizer, samples).to(model.device)  # (samples, 1)
        batches = [_continue(model, batch, length) for batch in torch.split(starts, batch_size)]
    ids = torch.cat(batches)  # (samples, length)
    return TokenSet(ids, torch.ones_like(ids, dtype=torch.bool))


class _FiniteLogits(LogitsProcessor):  # type: ignore[misc]
    """Refuses logits that are no distribution (NaN, +inf, only -inf). On a GPU sampling them kills the process."""

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Return `scores` (batch, vocabulary) unchanged. Raises RunError."""
        if not bool(torch.isfinite(torch.logsumexp(scores.float(), dim=-1)).all()):
            raise RunError(
                f"the model's logits are not finite at token {input_ids.shape[1]} of self-generated text",
                where="calibration.source",
                fix="load the model in bfloat16 or float32, or calibrate on a file or dataset",
            )
        return scores


def _starts(tokenizer: PreTrainedTokenizerBase, samples: int) -> Tensor:
    """The first token of each sample, (samples, 1)."""
    for token in (tokenizer.bos_token_id, tokenizer.eos_token_id):
        if token is not None:
            return torch.full((samples, 1), token, dtype=torch.int64)
    return torch.randint(len(tokenizer), (samples, 1))


def _continue(model: PreTrainedModel, starts: Tensor, length: int) -> Tensor:
    """`starts` (batch, 1) continued to (batch, length), on the CPU."""
    if length == 1:
        return starts.cpu()
    ids: Tensor = model.generate(
        starts,
        attention_mask=torch.ones_like(starts),
        generation_config=GenerationConfig(
            do_sample=True,
            temperature=1.0,
            top_k=0,  # 0 = the full vocabulary; the library's default is 50
            top_p=1.0,
            max_new_tokens=length - 1,
            use_cache=True,
        ),
        logits_processor=LogitsProcessorList([_FiniteLogits()]),
    )
    return ids.cpu()


@contextmanager
def _own_random_state(device: torch.device, seed: int) -> Iterator[None]:
    """Seed the generators that sampling on `device` draws from, and restore them afterwards."""
    accelerators: list[Any] = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=accelerators):
        # torch.manual_seed would seed every GPU; only this one is restored.
        torch.default_generator.manual_seed(seed % 2**63)
        for accelerator in accelerators:
            with torch.cuda.device(accelerator):
                torch.cuda.manual_seed(seed % 2**63)
        yield


@contextmanager
def _sampling(model: PreTrainedModel) -> Iterator[None]:
    """Evaluation mode, and none of the model's own generation settings.

    generate() fills whatever a given configuration leaves open from the model's own: its EOS token would end the text,
    its top_p or repetition penalty bend the distribution. Nothing in the call can say "none", so they are set aside.
    """
    settings, training = model.generation_config, model.training
    model.generation_config = GenerationConfig()
    model.eval()
    try:
        yield
    finally:
        model.generation_config = settings
        model.train(training)
