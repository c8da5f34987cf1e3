"""A loaded model as lm-eval's, which refuses what lm-eval would only assert; and two models side by side."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lm_eval.models.huggingface import HFLM

from compress.errors import PlanError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Requests = list[tuple[tuple[str, str], list[int], list[int]]]


class HarnessLM(HFLM):  # type: ignore[misc]
    """lm-eval's own model class over one that `compress.load` gave."""

    def __init__(
        self, model: PreTrainedModel, tokenizer: Any, batch_size: int, add_bos_token: bool | None = None
    ) -> None:
        """Wrap `model`; log-probabilities are taken in float32 whatever its dtype."""
        super().__init__(
            pretrained=model,
            tokenizer=tokenizer,
            batch_size=batch_size,
            softmax_dtype="float32",
            add_bos_token=add_bos_token,
        )

    def _loglikelihood_tokens(
        self, requests: Requests, disable_tqdm: bool = False, override_bs: int | None = None
    ) -> list[tuple[float, bool]]:
        vocabulary = self.model.get_input_embeddings().num_embeddings
        for _, context, continuation in requests:
            largest = max(*context, *continuation, 0)
            if largest >= vocabulary:
                fix = "tokenizer and model do not belong together; copy both again"
                problem = f"the tokenizer makes token {largest}, but the model has {vocabulary}"
                raise PlanError(problem, where="tasks", fix=fix)
            if not continuation:
                fix = "correct the sample: its answer has no token of its own"
                raise PlanError("a sample asks for the likelihood of nothing", where="tasks", fix=fix)
            if len(continuation) > self.max_length:
                raise PlanError(
                    f"an answer has {len(continuation)} tokens, more than the model's context of {self.max_length}",
                    where="tasks",
                    fix="leave this sample out, or take a task with shorter answers",
                )
            assert context
        scored: list[tuple[float, bool]] = super()._loglikelihood_tokens(
            requests, disable_tqdm=disable_tqdm, override_bs=override_bs
        )
        return scored


class PairLM(HarnessLM):
    """A model and the dense one: keeps what lm-eval asks for, in tokens, and answers none of it."""

    def __init__(self, model: HarnessLM, dense: HarnessLM) -> None:
        """Take both models out of their wrappers."""
        super().__init__(model.model, model.tokenizer, model.batch_size, model.add_bos_token)
        self.models = (model.model, dense.model)
        self.seen: list[tuple[list[int], list[int]]] = []

    def _loglikelihood_tokens(
        self, requests: Requests, disable_tqdm: bool = False, override_bs: int | None = None
    ) -> list[tuple[float, bool]]:
        self.seen += [(context, continuation) for _, context, continuation in requests]
        return [(0.0, False)] * len(requests)
