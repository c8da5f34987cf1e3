"""Perplexity, bits per byte and divergence against plain computations with the whole model in 64 bits."""

from __future__ import annotations

import math
import shutil
from typing import TYPE_CHECKING, Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from compress.calibration.tokens import eval_stream
from compress.errors import PlanError
from compress.evals.perplexity import Windows, evaluate
from compress.plan import Evaluate
from tests.conftest import REFERENCE, some_text, tiny_directory
from tests.models import FAMILIES, Float64

if TYPE_CHECKING:
    from pathlib import Path

Scored = dict[str, Any]


@torch.no_grad()
def log_probabilities(directory: Path, window: torch.Tensor) -> torch.Tensor:
    """(window − 1, vocabulary) float64: of the token that follows each but the last."""
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float64).eval()
    with Float64():
        return model(window.unsqueeze(0), use_cache=False).logits[0, :-1].double().log_softmax(-1)


def plain(directories: list[Path], ids: list[int], window: int, stride: int, limit: int | None) -> Scored:
    """Window by window, target by target; a target is scored once, by the first window that can."""
    nll: list[list[float]] = [[] for _ in directories]
    kl, agree, delta, targets = [], [], [], []
    end, count, begin = 0, 0, 0
    while begin + window <= len(ids) and count != limit:
        piece = torch.tensor(ids[begin : begin + window])
        log_p = [log_probabilities(directory, piece) for directory in directories]
        for place in range(max(begin + 1, end), begin + window):
            row = [one[place - begin - 1] for one in log_p]
            targets.append(place)
            for store, one in zip(nll, row, strict=True):
                store.append(-float(one[ids[place]]))
            compressed, dense = row[0], row[-1]
            kl.append(float((dense.exp() * (dense - compressed)).sum()))
            agree.append(float(dense.argmax() == compressed.argmax()))
            delta.append(float(compressed[ids[place]].exp() - dense[ids[place]].exp()))
        end, begin, count = begin + window, begin + stride, count + 1
    return {"nll": nll, "kl": kl, "agree": agree, "delta": delta, "targets": targets, "windows": count}


def mean(values: list[float]) -> float:
    return math.fsum(values) / len(values)


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "held-out.txt"
    path.write_text(some_text(420, seed=8))
    return path


def ids_of(directory: Path, text: Path) -> list[int]:
    return list(AutoTokenizer.from_pretrained(directory)(text.read_text())["input_ids"])


@pytest.mark.parametrize(
    ("window", "stride", "limit"),
    [
        (24, None, None),
        (24, 24, 3),
        (24, 8, None),
        (24, 1, 9),
        (24, 23, None),
        (64, 32, None),
        (2, None, 7),
        (24, 5, 1),
    ],
)
def test_perplexity_is_that_of_explicit_windows(
    tmp_path: Path, text: Path, window: int, stride: int | None, limit: int | None
) -> None:
    model = tiny_directory(tmp_path / "model", "llama")
    settings = Evaluate(perplexity=str(text), window=window, stride=stride, windows=limit, divergence=False)
    (line,) = evaluate(model, settings)
    ids = ids_of(model, text)
    wanted = plain([model], ids, window, stride or window, limit)
    assert (line.window, line.stride, line.windows) == (window, stride or window, wanted["windows"])
    assert line.tokens == len(wanted["targets"])
    assert line.compressed.nll == pytest.approx(mean(wanted["nll"][0]), rel=1e-6)
    assert line.compressed.perplexity == pytest.approx(math.exp(mean(wanted["nll"][0])), rel=1e-5)
    assert line.dense is None
    assert line.divergence is None
    if limit is None and stride is None:
        assert line.windows == len(ids) // window
        assert line.tokens == line.windows * (window - 1)
    if limit is None and stride is not None:  # every token that any window reaches is a target once, but the first
        assert line.tokens == window - 1 + (line.windows - 1) * stride


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("keep", [True, False])
def test_every_family_and_batches_longer_than_the_context(tmp_path: Path, text: Path, family: str, keep: bool) -> None:
    """Several windows are one batch; models with learned positions have none beyond their context."""
    model = tiny_directory(tmp_path / "model", family, dtype=torch.float16)
    (line,) = evaluate(model, Evaluate(perplexity=str(text), window=64, stride=32), keep=keep)
    wanted = plain([model], ids_of(model, text), 64, 32, None)
    assert line.windows * 63 > 128
    assert line.compressed.nll == pytest.approx(mean(wanted["nll"][0]), rel=2e-6)


def test_the_default_window_is_the_context(tmp_path: Path, text: Path) -> None:
    model = tiny_directory(tmp_path / "model", "llama")
    (line,) = evaluate(model, Evaluate(perplexity=str(text)))
    assert (line.window, line.stride) == (64, 64)
    assert line.text == "held-out.txt"
    windows = len(ids_of(model, text)) // 64
    assert line.convention == f"window 64, stride 64, {windows} windows, {windows * 63} targets, one tokenizer call"


def test_divergence_to_the_dense_model(tmp_path: Path, text: Path) -> None:
    dense = tiny_directory(tmp_path / "dense", "llama")
    model = tiny_directory(tmp_path / "model", "llama")
    tensors = AutoModelForCausalLM.from_pretrained(model)
    with torch.no_grad():
        for parameter in tensors.model.layers.parameters():
            parameter.mul_(1.15)
    tensors.save_pretrained(model)
    (line,) = evaluate(model, Evaluate(perplexity=str(text), window=32, stride=16), dense=dense)
    wanted = plain([model, dense], ids_of(model, text), 32, 16, None)
    assert line.compressed.nll == pytest.approx(mean(wanted["nll"][0]), rel=1e-6)
    assert line.dense is not None
    assert line.dense.nll == pytest.approx(mean(wanted["nll"][1]), rel=1e-6)
    found, kl = line.divergence, torch.tensor(wanted["kl"], dtype=torch.float64)
    assert found is not None
    assert float(kl.min()) >= 0
    assert found.kl_mean == pytest.approx(float(kl.mean()), rel=1e-4)
    for share, value in ((0.5, found.kl_median), (0.99, found.kl_p99), (0.999, found.kl_p999), (1.0, found.kl_max)):
        assert value == pytest.approx(float(kl.quantile(share)), rel=1e-3), share
    assert found.top1_agreement == pytest.approx(mean(wanted["agree"]))
    assert 0 < found.top1_agreement < 1
    assert found.rms_delta_p == pytest.approx(math.sqrt(mean([d * d for d in wanted["delta"]])), rel=1e-4)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_model_does_not_diverge_from_itself(tmp_path: Path, text: Path, family: str) -> None:
    model = tiny_directory(tmp_path / "model", family)
    (line,) = evaluate(model, Evaluate(perplexity=str(text), window=32), dense=model)
    assert line.compressed == line.dense
    assert line.divergence is not None
    assert line.divergence.model_dump() == {
        "kl_mean": 0.0,
        "kl_median": 0.0,
        "kl_p99": 0.0,
        "kl_p999": 0.0,
        "kl_max": 0.0,
        "top1_agreement": 1.0,
        "rms_delta_p": 0.0,
    }


def test_a_dense_model_that_reads_other_tokens_is_refused(tmp_path: Path, text: Path) -> None:
    model, settings = tiny_directory(tmp_path / "model", "llama"), Evaluate(perplexity=str(text), window=32)
    other = shutil.copytree(model, tmp_path / "other")
    tokenizer = other / "tokenizer.json"
    tokenizer.write_text(tokenizer.read_text().replace('"a"', '"z "').replace('"b"', '"a"').replace('"z "', '"b"'))
    with pytest.raises(PlanError, match="its tokenizer differs from the dense model's"):
        evaluate(model, settings, dense=other)
    larger = tiny_directory(tmp_path / "larger", "llama", vocab_size=80)
    with pytest.raises(PlanError, match="its vocabulary has 64 tokens, the dense model's 80"):
        evaluate(model, settings, dense=larger)
    tokenizer.write_text((model / "tokenizer.json").read_text().replace('"a": ', '"a": 9'))
    with pytest.raises(PlanError, match=r"the tokenizer makes token 9\d+, but the model has 64"):
        evaluate(other, settings)


# --- bits per byte ----------------------------------------------------------------------------------------------------


def test_bits_per_byte_of_a_text_that_one_window_covers(tmp_path: Path) -> None:
    """Every byte is some target's: −log₂ p of the whole text over its UTF-8 bytes."""
    text = tmp_path / "text.txt"
    text.write_text("The café — naïve 東京 and 😀 — costs 12 €.\n\nA second paragraph.\n")
    ids = ids_of(REFERENCE, text)
    assert ids[0] == 0  # <s>, so that the first token of the text is a target
    (line,) = evaluate(REFERENCE, Evaluate(perplexity=str(text), window=len(ids)))
    wanted = plain([REFERENCE], ids, len(ids), len(ids), None)["nll"][0]
    bits = math.fsum(wanted) / math.log(2) / len(text.read_bytes())
    assert line.tokens == len(ids) - 1
    assert line.compressed.bits_per_byte == pytest.approx(bits, rel=1e-5)


@pytest.mark.parametrize("stride", [9, 24])
def test_bits_per_byte_counts_the_bytes_of_its_targets(tmp_path: Path, text: Path, stride: int) -> None:
    model = tiny_directory(tmp_path / "model", "llama")
    (line,) = evaluate(model, Evaluate(perplexity=str(text), window=24, stride=stride))
    ids = ids_of(model, text)
    wanted = plain([model], ids, 24, stride, None)
    # One token is one character of one byte here, and <s> is the first.
    assert len(ids) == 1 + len(text.read_bytes())
    bits = math.fsum(wanted["nll"][0]) / math.log(2) / len(wanted["targets"])
    assert line.compressed.bits_per_byte == pytest.approx(bits, rel=1e-6)


# --- conventions ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("special_tokens", "perplexity"), [(False, 45.414), (True, 45.343)])
def test_the_reference_model_on_prose(assets: Path, special_tokens: bool, perplexity: float) -> None:
    """assets/README.md: 45.4 on the first 64 windows of prose-test; that is without <s> in front."""
    text = str(assets / "text" / "prose-test.txt")
    (line,) = evaluate(REFERENCE, Evaluate(perplexity=text, windows=64, special_tokens=special_tokens))
    assert (line.window, line.stride, line.windows, line.tokens) == (256, 256, 64, 64 * 255)
    assert line.compressed.perplexity == pytest.approx(perplexity, abs=0.002)


@pytest.mark.slow
def test_other_conventions_give_other_numbers(assets: Path, tmp_path: Path) -> None:
    """EVALS.md: a window, a BOS or the joining of rows moves the number by more than most compression does."""
    content = (assets / "text" / "prose-test.txt").read_text()[:60_000]
    (tmp_path / "text.txt").write_text(content)
    (tmp_path / "joined.txt").write_text(content.replace("\n\n", "\n"))
    settings: dict[str, dict[str, Any]] = {
        "standard": {},
        "half window": {"window": 128},
        "stride": {"stride": 128},
        "no bos": {"special_tokens": False},
    }
    found = {}
    for name, more in settings.items():
        (line,) = evaluate(REFERENCE, Evaluate(**{"perplexity": str(tmp_path / "text.txt"), "window": 256} | more))
        found[name] = line.compressed.perplexity
    (line,) = evaluate(REFERENCE, Evaluate(perplexity=str(tmp_path / "joined.txt"), window=256))
    found["joined"] = line.compressed.perplexity
    assert None not in found.values()
    assert found["stride"] < found["standard"] < found["half window"]
    assert found["joined"] != pytest.approx(found["standard"], rel=1e-3)
    assert found["no bos"] != found["standard"]


def test_special_tokens_are_a_choice(tmp_path: Path, text: Path) -> None:
    model = tiny_directory(tmp_path / "model", "llama")
    (line,) = evaluate(model, Evaluate(perplexity=str(text), window=24, special_tokens=False))
    wanted = plain([model], ids_of(model, text)[1:], 24, 24, None)
    assert line.compressed.nll == pytest.approx(mean(wanted["nll"][0]), rel=1e-6)


def test_several_texts_are_several_lines(tmp_path: Path, text: Path) -> None:
    model = tiny_directory(tmp_path / "model", "llama")
    other = tmp_path / "other.txt"
    other.write_text(some_text(200, seed=1))
    settings = Evaluate(perplexity=("other.txt", str(text)), window=32)
    both = evaluate(model, settings, folder=tmp_path)
    assert [line.text for line in both] == ["other.txt", "held-out.txt"]
    assert both[1] == evaluate(model, Evaluate(perplexity=str(text), window=32))[0]


def test_windows_score_each_reachable_target_once() -> None:
    for tokens in (5, 6, 17, 40):
        for window in (2, 3, 5):
            for stride in range(1, window + 1):
                windows = Windows.cut(torch.arange(tokens), torch.ones(tokens).long(), window, stride, None, "text")
                scored = windows.ids[windows.targets].tolist()
                reached = set(windows.ids[:, 1:].flatten().tolist())
                assert scored == sorted(reached)
                assert int(windows.ids[-1, -1]) > tokens - 1 - stride
                assert windows.bytes == len(scored)


def test_the_byte_lengths_sum_to_the_text(text: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(REFERENCE)
    _, lengths = eval_stream(text.read_text(), tokenizer)
    assert int(lengths.sum()) == len(text.read_bytes())


# --- refusals ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [5, 22])
def test_a_text_shorter_than_a_window_is_refused(tmp_path: Path, size: int) -> None:
    model = tiny_directory(tmp_path / "model", "llama")
    (tmp_path / "short.txt").write_text("a" * size)
    with pytest.raises(PlanError, match=f"{size + 1} tokens, fewer than one window of 24"):
        evaluate(model, Evaluate(perplexity=str(tmp_path / "short.txt"), window=24))
    (tmp_path / "short.txt").write_text("a" * 23)
    assert evaluate(model, Evaluate(perplexity=str(tmp_path / "short.txt"), window=24))[0].windows == 1


def test_a_window_beyond_the_context_is_refused(tmp_path: Path, text: Path) -> None:
    model = tiny_directory(tmp_path / "model", "llama")
    with pytest.raises(PlanError, match="window 65 is more than the model's context of 64"):
        evaluate(model, Evaluate(perplexity=str(text), window=65))


def test_a_stride_beyond_the_default_window_is_refused(tmp_path: Path, text: Path) -> None:
    model = tiny_directory(tmp_path / "model", "llama")
    with pytest.raises(PlanError, match="stride 100 skips tokens of window 64"):
        evaluate(model, Evaluate(perplexity=str(text), stride=100))


def test_a_missing_text_is_refused(tmp_path: Path) -> None:
    model = tiny_directory(tmp_path / "model", "llama")
    with pytest.raises(PlanError, match=r"missing\.txt"):
        evaluate(model, Evaluate(perplexity=str(tmp_path / "missing.txt"), window=24))


def test_temporary_files_are_removed(tmp_path: Path, text: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_directory(tmp_path / "model", "llama")
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "temporary"))
    (tmp_path / "temporary").mkdir()
    evaluate(model, Evaluate(perplexity=str(text), window=24), keep=False)
    assert list((tmp_path / "temporary").iterdir()) == []
