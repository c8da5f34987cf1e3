"""Packing, the equality of a prefix's tokens with the full text's, byte lengths, and the token set on disk."""

from __future__ import annotations

import errno
import json
import logging
import random
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from tokenizers import Tokenizer
from transformers import AutoTokenizer, ByT5Tokenizer, PreTrainedTokenizerFast

from compress.calibration import tokens as tokens_module
from compress.calibration.sources import texts
from compress.calibration.tokens import TokenSet, build, eval_stream
from compress.errors import PlanError, RunError
from compress.plan import Calibration

if TYPE_CHECKING:
    from collections.abc import Callable

REFERENCE = Path(__file__).parents[2] / "examples" / "reference"
TEMPLATE = "{% for m in messages %}<s>{{ m['role'] }}: {{ m['content'] }}</s>{% endfor %}"
WORDS = ["the", "a", "of", "Paris", "1234567", "x", "naïve", "東京", "😀", "can't", ":-)", "..."]


def load_tokenizer(pre_tokenizer: bool = True, appends_eos: bool = False) -> Any:
    """The reference tokenizer; without its word splitting (as in Llama 2), or appending an end token."""
    described = json.loads((REFERENCE / "tokenizer.json").read_text())
    if not pre_tokenizer:
        described["pre_tokenizer"]["use_regex"] = False
    if appends_eos:
        described["post_processor"]["single"].append({"SpecialToken": {"id": "</s>", "type_id": 0}})
        described["post_processor"]["special_tokens"]["</s>"] = {"id": "</s>", "ids": [1], "tokens": ["</s>"]}
    backend = Tokenizer.from_str(json.dumps(described))
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>", model_max_length=256)


TOKENIZERS: dict[str, Callable[[], Any]] = {
    "words": load_tokenizer,
    "no words": lambda: load_tokenizer(pre_tokenizer=False),
    "appends eos": lambda: load_tokenizer(appends_eos=True),
    "slow": ByT5Tokenizer,
}


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(REFERENCE)


def some_text(seed: int, words: int) -> str:
    draw = random.Random(seed)
    gaps = [" ", " ", " ", "  ", "\n", "\n\n", "\t", "   \n  ", "", " " * 40]
    return "".join(draw.choice(WORDS) * draw.choice([1, 1, 1, 5]) + draw.choice(gaps) for _ in range(words))


def ids_of(tokenizer: Any, text: str, special_tokens: bool = True) -> list[int]:
    return list(tokenizer(text, add_special_tokens=special_tokens, verbose=False)["input_ids"])


def settings(**options: Any) -> Calibration:
    return Calibration(**({"source": "data.txt", "samples": 4, "length": 16} | options))


# --- windows ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("special_tokens", [True, False])
def test_first_windows_are_the_beginning_of_the_token_stream(tokenizer: Any, special_tokens: bool) -> None:
    text = some_text(0, 3000)
    built = build(settings(selection="first", special_tokens=special_tokens), tokenizer, text, "[calibration]")
    assert built.ids.shape == built.mask.shape == (4, 16)
    assert built.ids.flatten().tolist() == ids_of(tokenizer, text, special_tokens)[:64]
    assert built.mask.all()
    assert built.tokens == 64


@pytest.mark.parametrize("kind", ["words", "no words", "appends eos", "slow"])
@pytest.mark.parametrize("seed", range(6))
def test_a_prefix_gives_the_tokens_of_the_full_text(kind: str, seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every count up to the whole text, with a first guess so small that the prefix is grown and cut anywhere."""
    monkeypatch.setattr(tokens_module, "CHARACTERS_PER_TOKEN", 1)
    monkeypatch.setattr(tokens_module, "CHUNK", 37 + seed)
    tokenizer = TOKENIZERS[kind]()
    text = some_text(seed, 600)
    full = ids_of(tokenizer, text)
    for count in [1, 2, *range(50 + seed, len(full), 151), len(full) - 1, len(full), len(full) + 5]:
        assert tokens_module._first_tokens(iter([text]), tokenizer, count, True) == full[:count], count


@pytest.mark.parametrize("kind", ["words", "no words", "appends eos", "slow"])
def test_settled_tokens_do_not_depend_on_the_cut(kind: str) -> None:
    """Cut at 150 places: settled tokens begin the full tokenization, where the prefix's own tokens often do not."""
    tokenizer = TOKENIZERS[kind]()
    text = some_text(11, 800)
    full = ids_of(tokenizer, text)
    unsettled = 0
    for cut in range(1500, 1650):
        settled = tokens_module._settled(tokenizer, text[:cut], True)
        assert settled == full[: len(settled)], cut
        assert len(settled) > 200
        plain = ids_of(tokenizer, text[:cut])
        unsettled += plain != full[: len(plain)]
    assert unsettled > 10


@pytest.mark.parametrize("text", ["x" * 5000, " " * 5000, "7" * 5000, "東" * 5000, "\n" * 5000, "ab " + " " * 5000])
def test_text_without_words_is_still_exact(text: str, tokenizer: Any) -> None:
    full = ids_of(tokenizer, text)
    for count in (1, 100, len(full) // 2, len(full)):
        assert tokens_module._first_tokens(iter([text]), tokenizer, count, True) == full[:count]


def test_only_a_prefix_of_the_source_is_read(tokenizer: Any) -> None:
    taken = 0

    def endless() -> Any:
        nonlocal taken
        while True:
            taken += 1
            yield "A document of a few words.\n"

    built = build(settings(selection="first"), tokenizer, endless(), "[calibration]")
    assert built.tokens == 64
    assert taken < 100


def test_a_text_file_is_taken_verbatim_and_rows_are_joined(tmp_path: Path, tokenizer: Any) -> None:
    content = " one\n\n\n\n  two \n \nthree" * 20
    (tmp_path / "a.txt").write_text(content)
    (tmp_path / "a.jsonl").write_text('{"text": "one "}\n{"text": ""}\n' * 60)
    for name, text in (("a.txt", content), ("a.jsonl", "\n\n".join(["one ", ""] * 60))):
        documents = texts(str(tmp_path / name), default_split="train")
        built = build(settings(selection="first"), tokenizer, documents, "[calibration]")
        assert built.ids.flatten().tolist() == ids_of(tokenizer, text)[:64]


def test_random_windows_take_whole_documents_in_the_order_of_the_seed(tokenizer: Any) -> None:
    documents = [f"Document {i} says little." for i in range(40)]
    first, again, other = (build(settings(seed=seed), tokenizer, documents, "[calibration]") for seed in (0, 0, 1))
    assert first.digest == again.digest != other.digest
    shuffled = list(documents)
    random.Random(0).shuffle(shuffled)
    assert first.ids.flatten().tolist() == ids_of(tokenizer, "\n\n".join(shuffled))[:64]


def test_a_text_a_list_and_a_file_give_the_same_random_windows(tmp_path: Path, tokenizer: Any) -> None:
    parts = [f"Paragraph {i} says little." for i in range(40)]
    (tmp_path / "a.txt").write_text("\n\n".join(parts))
    sources = ("\n\n".join(parts), parts, texts(str(tmp_path / "a.txt"), default_split="train"))
    assert len({build(settings(), tokenizer, source, "[calibration]").digest for source in sources}) == 1


def test_blank_documents_leave_no_gap_in_random_windows(tokenizer: Any) -> None:
    plain = build(settings(samples=1), tokenizer, ["word " * 30], "[calibration]")
    assert torch.equal(build(settings(samples=1), tokenizer, ["", " \n", "word " * 30], "[c]").ids, plain.ids)


# --- documents --------------------------------------------------------------------------------------------------------


def test_documents_are_truncated_padded_and_masked(tokenizer: Any) -> None:
    documents = ["short", "", "a longer document " * 20, " \n", "end"]
    wanted = settings(packing="documents", selection="first", samples=3)
    built = build(wanted, tokenizer, documents, "[calibration]")
    expected = [ids_of(tokenizer, text)[:16] for text in ("short", "a longer document " * 20, "end")]
    assert [row[keep].tolist() for row, keep in zip(built.ids, built.mask, strict=True)] == expected
    assert built.mask.sum(1).tolist() == [len(row) for row in expected]
    assert (built.ids[~built.mask] == tokenizer.eos_token_id).all()
    assert built.mask[0].tolist() == sorted(built.mask[0].tolist(), reverse=True)
    assert built.tokens == sum(map(len, expected))


def test_documents_in_random_order_follow_the_seed(tokenizer: Any) -> None:
    documents = [f"Document {i}" for i in range(20)]
    sets = [
        build(settings(packing="documents", seed=seed), tokenizer, documents, "[calibration]") for seed in (0, 0, 1)
    ]
    assert sets[0].digest == sets[1].digest != sets[2].digest


def test_chat_goes_through_the_template_which_writes_the_special_tokens() -> None:
    tokenizer = load_tokenizer()
    tokenizer.chat_template = TEMPLATE
    chat = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
    wanted = settings(packing="documents", selection="first", samples=1, length=32)
    built = build(wanted, tokenizer, [chat], "[calibration]")
    row = built.ids[0][built.mask[0]].tolist()
    assert row == ids_of(tokenizer, "<s>user: Hi</s><s>assistant: Hello</s>", special_tokens=False)
    assert row.count(tokenizer.bos_token_id) == 2

    wrapped = build(wanted.model_copy(update={"chat_template": True}), tokenizer, ["Hi"], "[calibration]")
    assert tokenizer.decode(wrapped.ids[0][wrapped.mask[0]]) == "<s>user: Hi</s>"

    stream = build(settings(selection="first", samples=1), tokenizer, [chat] * 9, "[calibration]")
    rendered = "<s>user: Hi</s><s>assistant: Hello</s>" * 9
    assert stream.ids[0].tolist() == ids_of(tokenizer, rendered, special_tokens=False)[:16]


def test_a_missing_or_failing_template_is_explained(tokenizer: Any) -> None:
    chat = [{"role": "user", "content": "Hi"}]
    for options in ({}, {"packing": "documents"}, {"chat_template": True}):
        with pytest.raises(PlanError, match=r"no chat template") as caught:
            build(settings(**options), tokenizer, ["Hi"] if "chat_template" in options else [chat], "[calibration]")
        assert caught.value.fix
        assert caught.value.where == "[calibration]"
    failing = load_tokenizer()
    failing.chat_template = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(PlanError, match=r"refuses a conversation of 1 messages \(user\): roles must alternate"):
        build(settings(), failing, [chat], "[calibration]")


# --- too little -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("selection", ["first", "random"])
def test_too_few_tokens_are_counted(tokenizer: Any, selection: str) -> None:
    text = "only a few words"
    with pytest.raises(PlanError) as caught:
        build(settings(selection=selection), tokenizer, text, "plan.toml:3: [calibration]")
    count = len(ids_of(tokenizer, text))
    assert str(caught.value) == (
        f"plan.toml:3: [calibration]: asked for 4 × 16 = 64 tokens, data.txt has {count} tokens\n"
        "fix: give more text, or a smaller samples or length"
    )


@pytest.mark.parametrize("packing", ["windows", "documents"])
@pytest.mark.parametrize("source", ["", [], ["", " "]])
def test_nothing_is_too_little(tokenizer: Any, packing: str, source: Any) -> None:
    with pytest.raises(PlanError, match=r"asked for 4 .* data.txt has [01] "):
        build(settings(packing=packing), tokenizer, source, "[calibration]")


def test_too_few_documents_are_counted(tokenizer: Any) -> None:
    with pytest.raises(PlanError, match=r"asked for 4 documents .*data.txt has 2 documents that are not empty"):
        build(settings(packing="documents"), tokenizer, ["a", "", "b"], "[calibration]")


# --- the evaluation stream --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["words", "no words", "appends eos", "slow"])
@pytest.mark.parametrize("text", ["", " ", "plain", "naïve 東京 😀 </s> done \n\n ", some_text(7, 400)])
def test_byte_lengths_sum_to_the_bytes_of_the_text(kind: str, text: str) -> None:
    tokenizer = TOKENIZERS[kind]()
    ids, lengths = eval_stream(text, tokenizer)
    assert ids.dtype == lengths.dtype == torch.int64
    assert ids.tolist() == ids_of(tokenizer, text)
    assert ids.shape == lengths.shape
    assert (lengths >= 0).all()
    if kind != "slow" or "</s>" not in text:  # a slow tokenizer decodes its special tokens to nothing
        assert lengths.sum() == len(text.encode())


def test_byte_lengths_are_those_of_the_tokens() -> None:
    tokenizer = load_tokenizer()
    ids, lengths = eval_stream("a naïve 😀", tokenizer)
    pieces = tokenizer.convert_ids_to_tokens(ids.tolist())
    assert pieces == ["<s>", "a", "Ġn", "a", "Ã", "¯", "ve", "Ġ", "ð", "Ł", "ĺ", "Ģ"]
    assert lengths.tolist() == [0, 1, 2, 1, 2, 0, 2, 1, 4, 0, 0, 0]
    without = eval_stream("a naïve 😀", tokenizer, special_tokens=False)
    assert without[0].tolist() == ids.tolist()[1:]
    assert without[1].tolist() == lengths.tolist()[1:]


def test_an_appended_end_token_covers_nothing() -> None:
    lengths = eval_stream("plain text", load_tokenizer(appends_eos=True))[1]
    assert lengths[0] == lengths[-1] == 0
    assert lengths.sum() == 10


def test_a_tokenizer_that_trims_white_space_still_covers_every_byte() -> None:
    described = json.loads((REFERENCE / "tokenizer.json").read_text())
    described["normalizer"] = {"type": "Strip", "strip_left": True, "strip_right": True}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(described)), bos_token="<s>")
    lengths = eval_stream("  one two \n", tokenizer)[1]
    assert lengths.sum() == 11
    assert lengths[0] == 0


def test_long_text_raises_no_warning(caplog: pytest.LogCaptureFixture) -> None:
    tokenizer = load_tokenizer()  # a new one: the warning comes once per tokenizer
    text = some_text(3, 2000)
    transformers_log = logging.getLogger("transformers")
    transformers_log.addHandler(caplog.handler)
    try:
        eval_stream(text, tokenizer)
        build(settings(length=128), tokenizer, text, "[calibration]")
    finally:
        transformers_log.removeHandler(caplog.handler)
    assert not caplog.records


# --- the token set ----------------------------------------------------------------------------------------------------


def test_digest_depends_on_ids_mask_and_shape() -> None:
    ids, mask = torch.arange(6).view(2, 3), torch.ones(2, 3, dtype=torch.bool)
    other_mask = mask.clone()
    other_mask[1, 2] = False
    variants = [(ids, mask), (ids + 1, mask), (ids, other_mask), (ids.view(3, 2), mask.view(3, 2))]
    assert len({TokenSet(*variant).digest for variant in variants}) == 4
    assert TokenSet(ids.t().contiguous().t(), mask).digest == TokenSet(ids, mask).digest
    # Pinned: journals written by one version of the package are read by the next.
    assert TokenSet(ids, mask).digest == "c6cc69feb62c6244c92af683a1038f4ff36fd640ac65158ae740052673d2ec77"


@pytest.mark.parametrize(
    ("ids", "mask"),
    [
        (torch.zeros(2, 3, dtype=torch.int64), torch.ones(3, 2, dtype=torch.bool)),
        (torch.zeros(6, dtype=torch.int64), torch.ones(6, dtype=torch.bool)),
        (torch.zeros(2, 3), torch.ones(2, 3, dtype=torch.bool)),
        (torch.zeros(2, 3, dtype=torch.int64), torch.ones(2, 3)),
    ],
)
def test_other_shapes_and_types_are_refused(ids: torch.Tensor, mask: torch.Tensor) -> None:
    with pytest.raises(ValueError, match="must be"):
        TokenSet(ids, mask)


def test_a_full_disk_is_an_error_of_the_disk(tmp_path: Path) -> None:
    """Which the run says in words; safetensors' own would end it with a traceback."""
    (tmp_path / "tokens.safetensors.partial").symlink_to("/dev/full")
    with pytest.raises(OSError, match="No space left") as found:
        TokenSet(torch.zeros(2, 3, dtype=torch.int64), torch.ones(2, 3, dtype=torch.bool)).save(
            tmp_path / "tokens.safetensors"
        )
    assert found.value.errno == errno.ENOSPC


def test_saved_tokens_are_read_back(tmp_path: Path) -> None:
    stored = TokenSet(torch.arange(6).view(3, 2).t(), torch.tensor([[True, True, False]] * 2))
    stored.save(tmp_path / "tokens.safetensors")
    loaded = TokenSet.load(tmp_path / "tokens.safetensors")
    assert torch.equal(loaded.ids, stored.ids)
    assert torch.equal(loaded.mask, stored.mask)
    assert loaded.digest == stored.digest
    assert [path.name for path in tmp_path.iterdir()] == ["tokens.safetensors"]


@pytest.mark.parametrize("damage", ["missing", "truncated", "changed"])
def test_a_damaged_file_is_refused(tmp_path: Path, damage: str) -> None:
    path = tmp_path / "tokens.safetensors"
    if damage != "missing":
        TokenSet(torch.arange(6).view(2, 3), torch.ones(2, 3, dtype=torch.bool)).save(path)
        content = bytearray(path.read_bytes())
        content[-20] ^= 1
        path.write_bytes(bytes(content[:-5] if damage == "truncated" else content))
    with pytest.raises(RunError, match="calibration tokens"):
        TokenSet.load(path)
