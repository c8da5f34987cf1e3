"""Text to tokens: calibration sets of fixed shape, and the token stream of an evaluation text.

Two packings. "windows" cuts one token stream into consecutive windows without padding, as SparseGPT, Wanda and GPTQ
calibrate on web text and as perplexity is measured. "documents" keeps one document per row and pads on the right; the
mask keeps padding out of every statistic (decision D6).
"""

from __future__ import annotations

import hashlib
import os
import random
from dataclasses import dataclass
from itertools import accumulate, chain, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from compress.calibration.sources import SEPARATOR, Document, Documents, TextFile, paragraphs
from compress.calibration.tokenizer import call, render
from compress.errors import PlanError, RunError

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from torch import Tensor
    from transformers import PreTrainedTokenizerBase

    from compress.plan import Calibration

CHARACTERS_PER_TOKEN = 4  # first guess for English under a large vocabulary; a wrong guess costs another doubling
CHUNK = 1 << 16  # characters taken from a source at a time
MARGIN_CHARACTERS, MARGIN_WORDS = 256, 8  # distance between the two cuts that must agree, see `_settled`


@dataclass(frozen=True, eq=False)
class TokenSet:
    """Calibration tokens: `ids` int64 (samples, length) and `mask` bool (samples, length), True = a real token.

    Raises ValueError for other shapes or types.
    """

    ids: Tensor
    mask: Tensor

    def __post_init__(self) -> None:
        """Check shapes and types."""
        if self.ids.ndim != 2 or self.ids.shape != self.mask.shape:
            raise ValueError(f"ids {tuple(self.ids.shape)} and mask {tuple(self.mask.shape)} must be (samples, length)")
        if self.ids.dtype != torch.int64 or self.mask.dtype != torch.bool:
            raise ValueError(f"ids must be int64 and mask bool, not {self.ids.dtype} and {self.mask.dtype}")

    @property
    def tokens(self) -> int:
        """The number of real tokens."""
        return int(self.mask.sum())

    def check_targets(self, some: Tensor | None = None, what: str = "calibration sample") -> None:
        """Raises RunError where no token of (these) samples follows another: a loss would be the mean of nothing."""
        mask = self.mask if some is None else self.mask[some]
        if not bool(mask[:, 1:].any()):
            fix = 'give longer texts, or packing = "windows"'
            raise RunError(f"no {what} has a token that could be predicted", where="[calibration]", fix=fix)

    @property
    def digest(self) -> str:
        """The sha256, in hex, of shape, ids (little-endian int64) and mask (bytes); equal sets, equal digests."""
        digest = hashlib.sha256(repr((tuple(self.ids.shape), tuple(self.mask.shape))).encode())
        digest.update(self.ids.cpu().numpy().astype("<i8").tobytes())
        digest.update(self.mask.cpu().numpy().astype("u1").tobytes())
        return digest.hexdigest()

    def save(self, path: str | Path) -> None:
        """Write a safetensors file that carries the digest; a crash leaves the old file or none. Raises OSError."""
        path = Path(path)
        partial = path.with_name(path.name + ".partial")
        tensors = {"ids": self.ids.cpu().contiguous(), "mask": self.mask.cpu().contiguous()}
        with partial.open("wb") as file:  # save_file has its own error for a full disk
            file.write(save(tensors, metadata={"digest": self.digest}))
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)

    @classmethod
    def load(cls, path: str | Path) -> TokenSet:
        """Read what `save` wrote. Raises RunError where the file is missing or not what was written."""
        try:
            with safe_open(path, framework="pt") as file:
                tokens = cls(file.get_tensor("ids"), file.get_tensor("mask"))
                digest = (file.metadata() or {}).get("digest")
        except (OSError, SafetensorError, ValueError) as error:
            raise RunError(f"cannot read calibration tokens: {error}", where=str(path)) from error
        if tokens.digest != digest:
            raise RunError(
                "calibration tokens differ from their digest", where=str(path), fix="delete the file and run again"
            )
        return tokens


def build(
    settings: Calibration,
    tokenizer: PreTrainedTokenizerBase,
    documents_or_text: Iterable[Document] | str,
    where: str,
) -> TokenSet:
    """The calibration set that `settings` describes, ids and mask of shape (settings.samples, settings.length).

    With selection "first" everything is taken in its stored order (a text or .txt file verbatim), with "random" in an
    order drawn from `settings.seed`. Documents in chat form pass through the tokenizer's chat template, which writes
    the special tokens itself; plain text gets the tokenizer's own where `settings.special_tokens`. Blank documents are
    skipped, except in the verbatim stream of selection "first". `where` names the table of the plan in errors.

    Raises PlanError for too little text, a missing or failing chat template, and whatever reading the source raises.
    """
    if settings.packing == "windows":
        return _windows(settings, tokenizer, documents_or_text, where)
    return _rows(settings, tokenizer, documents_or_text, where)


def eval_stream(text: str, tokenizer: PreTrainedTokenizerBase, special_tokens: bool = True) -> tuple[Tensor, Tensor]:
    """All tokens of `text` from one tokenizer call: ids and byte_lengths, both int64 (tokens,).

    byte_lengths[i] counts the UTF-8 bytes of `text` that token i is the first to cover; special tokens that the
    tokenizer adds cover none. The lengths sum to the bytes of the whole text: what a tokenizer skips (trimmed white
    space) counts with the next token, at the end with the last. A character that is split over several tokens counts
    with the first of them.

    A slow tokenizer tells no offsets; there each token gets its share of the bytes in proportion to its own decoded
    length. The sum is then still exact, a single token's length an estimate.
    """
    total = len(text.encode())
    if not tokenizer.is_fast:
        ids = _encode(tokenizer, text, special_tokens)
        widths = [len(tokenizer.decode([token], skip_special_tokens=True).encode()) for token in ids]
        ends = np.fromiter(accumulate(widths), np.int64, len(widths))
        ends = ends * total // max(1, sum(widths))
    else:
        encoding = call(tokenizer, text, special_tokens, return_offsets_mapping=True)
        ids = encoding["input_ids"]
        offsets = np.asarray(encoding["offset_mapping"], dtype=np.int64).reshape(-1, 2)  # (tokens, 2) characters
        ends = _byte_positions(text)[np.maximum.accumulate(offsets[:, 1])]  # added tokens have the offset (0, 0)
        if len(ends) and ends[-1]:
            ends[int(np.flatnonzero(offsets[:, 1])[-1]) :] = total
    return torch.tensor(ids, dtype=torch.int64), torch.from_numpy(np.diff(ends, prepend=0))


def _byte_positions(text: str) -> np.ndarray[Any, np.dtype[np.int64]]:
    """The byte at which each character of `text` starts in UTF-8, and the end: (characters + 1,)."""
    code_points = np.frombuffer(text.encode("utf-32-le"), dtype="<u4")
    widths = 1 + (code_points >= 0x80).astype(np.int64) + (code_points >= 0x800) + (code_points >= 0x10000)
    return np.concatenate([np.zeros(1, np.int64), np.cumsum(widths, dtype=np.int64)])


def _windows(
    settings: Calibration, tokenizer: PreTrainedTokenizerBase, source: Iterable[Document] | str, where: str
) -> TokenSet:
    wanted = settings.samples * settings.length
    pieces, special_tokens = _pieces(settings, tokenizer, source, where)
    ids = _first_tokens(pieces, tokenizer, wanted, special_tokens)
    if len(ids) < wanted:
        raise _too_little(settings, f"{len(ids)} tokens", where)
    shaped = torch.tensor(ids, dtype=torch.int64).view(settings.samples, settings.length)
    return TokenSet(shaped, torch.ones_like(shaped, dtype=torch.bool))


def _rows(
    settings: Calibration, tokenizer: PreTrainedTokenizerBase, source: Iterable[Document] | str, where: str
) -> TokenSet:
    def tokenized() -> Iterator[list[int]]:
        for text, templated in _rendered(settings, tokenizer, source, where):
            ids = _encode(tokenizer, text, settings.special_tokens and not templated)[: settings.length]
            if text.strip() and ids:
                yield ids

    rows = list(islice(tokenized(), settings.samples))
    if len(rows) < settings.samples:
        raise _too_little(settings, f"{len(rows)} documents that are not empty", where)
    candidates = (tokenizer.pad_token_id, tokenizer.eos_token_id, 0)
    padding = next(token for token in candidates if token is not None)
    ids = torch.full((settings.samples, settings.length), padding, dtype=torch.int64)
    mask = torch.zeros_like(ids, dtype=torch.bool)
    for sample, row in enumerate(rows):
        ids[sample, : len(row)] = torch.tensor(row, dtype=torch.int64)
        mask[sample, : len(row)] = True
    return TokenSet(ids, mask)


def _pieces(
    settings: Calibration, tokenizer: PreTrainedTokenizerBase, source: Iterable[Document] | str, where: str
) -> tuple[Iterator[str], bool]:
    """Pieces whose concatenation is the text to tokenize, and whether the tokenizer adds its special tokens."""
    if settings.selection == "first" and not settings.chat_template and isinstance(source, str | TextFile):
        return iter([source if isinstance(source, str) else source.whole_text()]), settings.special_tokens
    rendered = _rendered(settings, tokenizer, source, where)
    first = next(rendered, None)
    if first is None:
        return iter(()), settings.special_tokens
    text, templated = first
    # A template writes its own delimiters: a blank line between conversations is a text the model never saw.
    separator = "" if templated else SEPARATOR
    others = (separator + other for other, _ in rendered)
    return chain([text], others), settings.special_tokens and not templated


def _rendered(
    settings: Calibration, tokenizer: PreTrainedTokenizerBase, source: Iterable[Document] | str, where: str
) -> Iterator[tuple[str, bool]]:
    """Yield each document as text in the order of the settings, and whether a chat template wrote it."""
    for document in _ordered(settings, paragraphs(source) if isinstance(source, str) else source):
        if isinstance(document, list):
            yield _templated(tokenizer, document, where), True
        elif settings.chat_template:
            if document.strip():
                yield _templated(tokenizer, [{"role": "user", "content": document}], where), True
        elif settings.selection == "first" or document.strip():
            yield document, False


def _ordered(settings: Calibration, documents: Iterable[Document]) -> Iterator[Document]:
    if settings.selection == "first":
        return iter(documents)
    if isinstance(documents, Documents):
        return documents.shuffled(settings.seed)
    shuffled = list(documents)
    random.Random(settings.seed).shuffle(shuffled)
    return iter(shuffled)


def _templated(tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, Any]], where: str) -> str:
    if not getattr(tokenizer, "chat_template", None):
        raise PlanError(
            "the tokenizer has no chat template, and the documents are chat messages",
            where=where,
            fix="name a column of plain text and leave chat_template false, or add chat_template.jinja to the model",
        )
    return render(tokenizer, messages, where)


def _first_tokens(
    pieces: Iterator[str], tokenizer: PreTrainedTokenizerBase, count: int, special_tokens: bool
) -> list[int]:
    """The first `count` tokens of the tokenization of all pieces joined; all of them where they are fewer.

    Tokenizes a prefix, doubled until it holds enough tokens that no further text can change.
    """
    chunks = (piece[at : at + CHUNK] for piece in pieces for at in range(0, len(piece), CHUNK))
    text, wanted = "", count * CHARACTERS_PER_TOKEN + 4 * MARGIN_CHARACTERS
    while True:
        parts, size = [text], len(text)
        while size < wanted and (chunk := next(chunks, None)) is not None:
            parts.append(chunk)
            size += len(chunk)
        text = "".join(parts)
        if size < wanted:  # that was all the text there is
            return _encode(tokenizer, text, special_tokens)[:count]
        ids = _settled(tokenizer, text, special_tokens)
        if len(ids) >= count:
            return ids[:count]
        wanted *= 2


def _settled(tokenizer: PreTrainedTokenizerBase, text: str, special_tokens: bool) -> list[int]:
    """The tokens of `text` that stay whatever text follows.

    A cut changes tokens near it: a word is cut in half, an end token is appended, a digit run is grouped anew. We cut
    twice, the second time `MARGIN_WORDS` words and `MARGIN_CHARACTERS` characters earlier, and keep what both
    tokenizations share: what that much more text did not change, more text after it will not. Text without white space
    has no second cut, settles nothing and is read to its end.
    """
    cut = len(text) - MARGIN_CHARACTERS
    for _ in range(MARGIN_WORDS):
        cut = max(text.rfind(" ", 0, cut), text.rfind("\n", 0, cut), 0)
        while cut > 0 and text[cut - 1].isspace():
            cut -= 1
    if cut <= 0:
        return []
    longer = _encode(tokenizer, text, special_tokens)
    shorter = _encode(tokenizer, text[:cut], special_tokens)
    common = min(len(longer), len(shorter))
    different = np.flatnonzero(np.asarray(longer[:common]) != np.asarray(shorter[:common]))
    return shorter[: int(different[0]) if different.size else common]


def _encode(tokenizer: PreTrainedTokenizerBase, text: str, special_tokens: bool) -> list[int]:
    return list(call(tokenizer, text, special_tokens)["input_ids"])


def _too_little(settings: Calibration, found: str, where: str) -> PlanError:
    asked = f"{settings.samples} × {settings.length} = {settings.samples * settings.length} tokens"
    if settings.packing == "documents":
        asked = f"{settings.samples} documents (of at most {settings.length} tokens)"
    return PlanError(
        f"asked for {asked}, {settings.source} has {found}",
        where=where,
        fix="give more text, or a smaller samples or length",
    )
