"""Load and call a tokenizer that may come from anybody.

A tokenizer.json is a program: a chain of replacements can make gigabytes of a line, a regular expression can take years
for it, and native code that panics ends the process. What can be told from the file is refused here; what cannot is
bounded in time.
"""

from __future__ import annotations

import base64
from typing import TYPE_CHECKING, Any

from compress.errors import ModelError, PlanError
from compress.hub import reason
from compress.limits import GIB, within
from compress.model_files import check_directory, read_json

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from transformers import PreTrainedTokenizerBase

LOADING, LOADING_MEMORY = 600.0, 8 * GIB  # seconds and bytes; a vocabulary of 262,144 words takes 2 s and 1 GiB
MAX_GROWTH = 100  # how many times as long as its text a normalized text may be; NFKD makes at most 18 of 1
MAX_AFFIX = 64  # characters in front of or behind parts of words
SECONDS, CHARACTERS_PER_SECOND = 60.0, 10_000  # slow tokenizers in Python manage 50,000
TEMPLATE_SECONDS, TEMPLATE_MEMORY = 60.0, 2 * GIB  # for one conversation


def load_tokenizer(directory: Path, *, trust_remote_code: bool = False) -> Any:
    """The tokenizer of a model directory. Raises ModelError."""
    from transformers import AutoTokenizer

    def load() -> Any:
        if path.is_file():
            _check_program(path)
        return AutoTokenizer.from_pretrained(directory, local_files_only=True, trust_remote_code=trust_remote_code)

    check_directory(directory)
    path = directory / "tokenizer.json"
    try:
        return within(load, seconds=LOADING, memory=LOADING_MEMORY)
    except Exception as error:  # transformers raises many kinds for a missing or damaged tokenizer
        fix = "copy tokenizer.json and tokenizer_config.json of the model"
        raise ModelError(f"no usable tokenizer: {reason(error)}", where=str(directory), fix=fix) from None


def _check_program(path: Path) -> None:
    """Refuse a tokenizer.json that makes texts much longer. Raises ModelError."""
    fix, growth = "copy the tokenizer of the original model", 1
    for step in _steps(read_json(path)):
        growth *= max(1, _replacement(step))
        for key in ("prepend", "continuing_subword_prefix", "end_of_word_suffix", "replacement"):
            affix = step.get(key)
            if isinstance(affix, str) and len(affix) > MAX_AFFIX:
                raise ModelError(f'"{key}" has {len(affix):,} characters', where=str(path), fix=fix)
        if growth > MAX_GROWTH:
            raise ModelError("its replacements can make a text 100 times as long", where=str(path), fix=fix)


def _replacement(step: dict[str, Any]) -> int:
    """The longest text that a step puts in the place of one character; 0 for none.

    Whatever its "type" is: tokenizers goes by the other keys where it knows none of that name.
    """
    content, charsmap = step.get("content"), step.get("precompiled_charsmap")
    longest = len(content) if isinstance(content, str) else 0
    if isinstance(charsmap, str):  # of SentencePiece: the size of a trie, the trie, and what it leads to, each with NUL
        blob = base64.b64decode(charsmap)
        trie = int.from_bytes(blob[:4], "little")
        longest = max(longest, *map(len, blob[4 + trie :].split(b"\0")))
    return longest


def _steps(tokenizer: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Every object of the parts that a text runs through, nested ones too; vocabularies are left out."""
    waiting = [tokenizer.get(part) for part in ("normalizer", "pre_tokenizer", "model", "decoder")]
    while waiting:
        one = waiting.pop()
        if isinstance(one, dict):
            yield one
            waiting += [value for key, value in one.items() if key not in ("vocab", "merges")]
        elif isinstance(one, list):
            waiting += one


def call(tokenizer: PreTrainedTokenizerBase, text: str, special_tokens: bool, **options: Any) -> Any:
    """What the tokenizer makes of a text. Raises ModelError where it fails, or takes far too long."""

    def tokenize() -> Any:
        # verbose=False: a text longer than model_max_length is meant here, and cut into windows afterwards.
        return tokenizer(
            text,
            add_special_tokens=special_tokens,
            padding=False,
            truncation=False,
            return_attention_mask=False,
            verbose=False,
            **options,
        )

    return guarded(tokenizer, tokenize, len(text))


def guarded(tokenizer: PreTrainedTokenizerBase, function: Callable[[], Any], characters: int) -> Any:
    """The result of a function that calls the tokenizer on so many characters. Raises ModelError."""
    try:
        return within(function, seconds=SECONDS + characters / CHARACTERS_PER_SECOND)
    except Exception as error:  # tokenizers raise plain Exception
        raise ModelError(
            f"the tokenizer fails on a text of {characters:,} characters: {reason(error)}",
            where=str(tokenizer.name_or_path),
            fix="copy tokenizer.json and tokenizer_config.json of the model",
        ) from None


def render(tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, Any]], where: str) -> str:
    """One conversation as text, by the tokenizer's chat template. Raises PlanError where that fails."""
    try:
        return within(
            lambda: str(tokenizer.apply_chat_template(messages, tokenize=False)),
            seconds=TEMPLATE_SECONDS,
            memory=TEMPLATE_MEMORY,
        )
    except Exception as error:  # a template is a program: it can fail in any way
        roles = ", ".join(str(message.get("role")) for message in messages[:20])
        raise PlanError(
            f"the chat template refuses a conversation of {len(messages)} messages ({roles[:200]}): {reason(error)}",
            where=where,
            fix="repair or remove such conversations, or name a column of plain text",
        ) from None
