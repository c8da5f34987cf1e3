"""Perplexity, bits per byte and divergence to the dense model, measured on emitted directories.

Perplexity is a convention; this is the field's (METHODS 0.1): one tokenizer call on the whole text, windows of fixed
length, the incomplete tail dropped, ``window − 1`` targets in each, float32, exp of the mean negative log-likelihood
over all targets. With a stride below the window, only targets that no earlier window scored are counted.

Models are streamed block by block like everywhere else, so a directory larger than memory can be evaluated. For
KL(dense ‖ compressed) both models run on the same windows and meet at the logits.
"""

from __future__ import annotations

import math
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from compress.architecture import architecture_for
from compress.calibration.plan_source import located
from compress.calibration.sources import whole_text
from compress.calibration.tokenizer import load_tokenizer
from compress.calibration.tokens import eval_stream
from compress.errors import PlanError
from compress.evals.harness import check_alike
from compress.evals.results import Divergence
from compress.export.reader import open_model
from compress.flows import Activations
from compress.report import EvaluationLine, TextScore
from compress.stream import Skeleton
from compress.walk import batch_rows

if TYPE_CHECKING:
    from compress.plan import Evaluate

LOGITS_AT_ONCE = 4 << 20  # values, 16 MiB in float32
DEFAULT_WINDOW = 2048


def evaluate(
    directory: Path,
    settings: Evaluate,
    *,
    dense: Path | None = None,
    folder: Path = Path(),
    device: torch.device | None = None,
    keep: bool = True,
    trust_remote_code: bool = False,
) -> tuple[EvaluationLine, ...]:
    """Score a model directory on every text of `settings`.

    Args:
        directory: what was emitted.
        settings: texts, window, stride and how many windows.
        dense: the model it came from, to be scored on the same windows; with `settings.divergence` compared too.
        folder: what relative text files are relative to.
        device: where to compute; the CPU by default.
        keep: hold hidden states in memory; else on disk.
        trust_remote_code: run Python code that comes with the model.

    Raises:
        PlanError: a text is missing or shorter than one window, or the two models do not read the same tokens.
    """
    device = device or torch.device("cpu")
    with torch.no_grad():
        models = [_open(directory, device, trust_remote_code=trust_remote_code)]
        models += [_open(dense, device, trust_remote_code=trust_remote_code)] if dense else []
        tokenizer = load_tokenizer(directory, trust_remote_code=trust_remote_code)
        if dense:
            check_alike(tokenizer, load_tokenizer(dense, trust_remote_code=trust_remote_code), directory)
            _check_vocabularies(models[0], models[1], directory)
        return tuple(_one_text(text, models, tokenizer, settings, folder, keep=keep) for text in settings.perplexity)


def _open(directory: Path, device: torch.device, *, trust_remote_code: bool) -> Skeleton:
    config, checkpoint = open_model(directory, trust_remote_code=trust_remote_code)
    skeleton = Skeleton(checkpoint, config, architecture_for(config.model_type), trust_remote_code=trust_remote_code)
    return skeleton.to(device, torch.float32)


def _vocabulary(skeleton: Skeleton) -> int:
    return int(skeleton.model.get_input_embeddings().num_embeddings)


def _check_vocabularies(model: Skeleton, dense: Skeleton, directory: Path) -> None:
    """Raises PlanError where two models do not tell the probabilities of the same tokens."""
    size, wanted = _vocabulary(model), _vocabulary(dense)
    if size != wanted:
        problem = f"its vocabulary has {size:,} tokens, the dense model's {wanted:,}"
        raise PlanError(problem, where=str(directory), fix="give the model that it came from")


@dataclass(frozen=True)
class Windows:
    """Token windows: `ids` (windows, window) and which of them are targets, with their size in bytes."""

    ids: Tensor
    targets: Tensor  # (windows, window) bool; the first of a window never is
    bytes: int  # UTF-8 bytes of the text that the targets cover
    stride: int

    @classmethod
    def cut(cls, ids: Tensor, byte_lengths: Tensor, window: int, stride: int, limit: int | None, name: str) -> Windows:
        """Cut a token stream (tokens,). Raises PlanError when it is shorter than one window."""
        count = (len(ids) - window) // stride + 1 if len(ids) >= window else 0
        if count == 0:
            raise PlanError(
                f"the text has {len(ids)} tokens, fewer than one window of {window}",
                where=name,
                fix=f"give a longer text, or window = {max(2, len(ids))} or less",
            )
        count = min(count, limit or count)
        starts = torch.arange(count) * stride
        places = starts.unsqueeze(1) + torch.arange(window)  # (windows, window)
        scored_before = torch.where(starts > 0, starts - stride + window, 0)
        targets = places >= scored_before.unsqueeze(1)
        targets[:, 0] = False
        return cls(ids[places], targets, int(byte_lengths[places][targets].sum()), stride)


def _one_text(
    text: str, models: list[Skeleton], tokenizer: Any, settings: Evaluate, folder: Path, *, keep: bool
) -> EvaluationLine:
    context = getattr(models[0].config, "max_position_embeddings", None) or DEFAULT_WINDOW
    window = settings.window or min(DEFAULT_WINDOW, context)
    stride = settings.stride or window
    if window > context:
        raise PlanError(f"window {window} is more than the model's context of {context}", fix=f"window = {context}")
    if stride > window:
        raise PlanError(f"stride {stride} skips tokens of window {window}", fix=f"stride = {window} or less")
    content = whole_text(located(text, folder), default_split="test")
    ids, lengths = eval_stream(content, tokenizer, settings.special_tokens)
    vocabulary = _vocabulary(models[0])
    if len(ids) and int(ids.max()) >= vocabulary:
        problem = f"the tokenizer makes token {int(ids.max())}, but the model has {vocabulary}"
        fix = "tokenizer and model do not belong together; copy both again"
        raise PlanError(problem, where=str(tokenizer.name_or_path), fix=fix)
    windows = Windows.cut(ids, lengths, window, stride, settings.windows, text)
    scores = _score(models, windows, keep=keep)
    return EvaluationLine(
        text=Path(text).name,
        window=window,
        stride=stride,
        windows=len(windows.ids),
        tokens=int(windows.targets.sum()),
        compressed=scores.summary(0, windows),
        dense=scores.summary(1, windows) if len(models) > 1 else None,
        divergence=scores.divergence() if len(models) > 1 and settings.divergence else None,
    )


def last_hidden(skeleton: Skeleton, ids: Tensor, folder: Path, *, keep: bool) -> Activations:
    """The last block's output for token ids (rows, length), block by block. `folder` holds temporary files."""
    rows = batch_rows(ids.shape[0], ids.shape[1], skeleton.device)
    shapes = [(count, ids.shape[1], skeleton.width) for count in rows]
    flow = Activations(folder / "hidden-0", shapes, skeleton.dtype, keep=keep)
    with skeleton.loaded(skeleton.embedding):
        for batch, some in enumerate(torch.split(ids, rows)):
            flow.put(batch, skeleton.embed(some))
    flow.close()
    for index in range(len(skeleton.blocks)):
        after = Activations(folder / f"hidden-{index + 1}", shapes, skeleton.dtype, keep=keep)
        with skeleton.block(index) as block:
            for batch, shape in enumerate(shapes):
                args, kwargs = skeleton.calls(*shape[:2])[index]
                after.put(batch, block(flow.get(batch, skeleton.device, last=True), *args, **kwargs))
        after.close()
        flow.path.unlink()
        flow = after
    return flow


@dataclass
class Scores:
    """Per target, of each model: −log p; and of both: KL, agreement, difference of the target's probability."""

    nll: list[list[Tensor]] = field(default_factory=lambda: [[], []])
    kl: list[Tensor] = field(default_factory=list)
    agree: list[Tensor] = field(default_factory=list)
    delta: list[Tensor] = field(default_factory=list)

    def add(self, logits: list[Tensor], targets: Tensor) -> None:
        """Logits (tokens, vocabulary) of each model for targets (tokens,)."""
        log_p = [one.float().log_softmax(-1) for one in logits]
        chosen = [one.gather(1, targets.unsqueeze(1)).squeeze(1) for one in log_p]
        for store, one in zip(self.nll, chosen, strict=False):
            store.append(-one.double().cpu())
        if len(log_p) > 1:
            compressed, dense = log_p
            self.kl.append((dense.exp() * (dense - compressed)).sum(-1).double().cpu())
            self.agree.append((dense.argmax(-1) == compressed.argmax(-1)).cpu())
            self.delta.append((chosen[0].exp() - chosen[1].exp()).double().cpu())

    def summary(self, model: int, windows: Windows) -> TextScore:
        """Perplexity and bits per byte of one model."""
        nll = torch.cat(self.nll[model])
        mean = float(nll.mean())
        bits = float(nll.sum()) / math.log(2) / windows.bytes if windows.bytes else None
        perplexity = math.exp(mean) if mean < 700 else math.inf
        return TextScore(perplexity=perplexity, bits_per_byte=bits, nll=mean)

    def divergence(self) -> Divergence:
        """KL(dense ‖ compressed) in nats and its quantiles over targets, top-1 agreement, RMS Δp."""
        kl = torch.cat(self.kl).clamp_min(0)
        quantile = torch.quantile(kl[:: max(1, len(kl) // 10_000_000)], torch.tensor([0.5, 0.99, 0.999]).double())
        return Divergence(
            kl_mean=float(kl.mean()),
            kl_median=float(quantile[0]),
            kl_p99=float(quantile[1]),
            kl_p999=float(quantile[2]),
            kl_max=float(kl.max()),
            top1_agreement=float(torch.cat(self.agree).double().mean()),
            rms_delta_p=float(torch.cat(self.delta).square().mean().sqrt()),
        )


def _score(models: list[Skeleton], windows: Windows, *, keep: bool) -> Scores:
    scores = Scores()
    with tempfile.TemporaryDirectory(prefix="compress-eval-") as folder:
        folders = [Path(folder, str(number)) for number in range(len(models))]
        for path in folders:
            path.mkdir()
        hidden = [last_hidden(m, windows.ids, path, keep=keep) for m, path in zip(models, folders, strict=True)]
        first = 0
        # No longer than a window: the skeleton gives the states positions, and learned ones end with the context.
        chunk = max(1, min(windows.ids.shape[1], LOGITS_AT_ONCE // _vocabulary(models[0])))
        with models[0].loaded(models[0].head), models[-1].loaded(models[-1].head):
            for batch, shape in enumerate(hidden[0].shapes):
                span = slice(first, first + shape[0])
                first += shape[0]
                # The hidden state before a target predicts it.
                targets = windows.ids[span, 1:][windows.targets[span, 1:]].to(models[0].device)
                states = [
                    h.get(batch, m.device)[:, :-1][windows.targets[span, 1:]]
                    for h, m in zip(hidden, models, strict=True)
                ]
                for start in range(0, len(targets), chunk):
                    part = slice(start, start + chunk)
                    logits = [m.logits(s[part].unsqueeze(0))[0] for m, s in zip(models, states, strict=True)]
                    scores.add(logits, targets[part])
    return scores
