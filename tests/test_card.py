"""The model card: what it states, and what it must never state. Every number here is made up."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

import pytest
from huggingface_hub import ModelCard

from compress.card import write_card
from compress.passes import DepthPruning, LoRAPrune, LQLoRA, Pass, WidthPruning
from compress.report import Report

if TYPE_CHECKING:
    from pathlib import Path


def made_up(**changes: Any) -> Report:
    """A made-up run; its times, memory, machine and paths must not reach the card."""
    fields: dict[str, Any] = {
        "compress_version": "0.1.0",
        "model": {
            "path": "/home/someone/models/tiny-llama",
            "architecture": "LlamaForCausalLM",
            "parameters": 4_198_656,
            "bytes": 8_400_112,
        },
        "output": {
            "path": "tiny-llama-2of4",
            "bytes": 8_400_112,
            "parameters": 4_198_656,
            "nonzero_parameters": 2_625_792,
            "linear_sparsity": 0.5,
        },
        "environment": {
            "python": "3.11.9",
            "torch": "2.13.0+cpu",
            "transformers": "5.23.0",
            "device": "cpu",
            "threads": 2,
            "platform": "Linux-6.1-x86_64",
        },
        "calibration": {
            "source": "/home/someone/data/wiki.jsonl",
            "samples": 128,
            "length": 256,
            "tokens": 32_768,
            "digest": "9f2c" * 16,
        },
        "passes": [
            {
                "index": 0,
                "use": "sparsegpt",
                "settings": {"pattern": "2:4"},
                "linears": 28,
                "seconds": 17.31,
                "relative_error": 0.0731,
                "error_kind": "gram",
                "sparsity": 0.5,
            }
        ],
        "evaluation": [
            {
                "text": "/home/someone/data/test.txt",
                "window": 256,
                "stride": 256,
                "windows": 64,
                "tokens": 16_320,
                "dense": {"perplexity": 133.884, "bits_per_byte": 1.7425, "nll": 4.897},
                "compressed": {"perplexity": 141.027, "bits_per_byte": 1.7611, "nll": 4.949},
                "divergence": {
                    "kl_mean": 0.0217,
                    "kl_median": 0.0112,
                    "kl_p99": 0.154,
                    "kl_p999": 0.491,
                    "kl_max": 2.318,
                    "top1_agreement": 0.8803,
                    "rms_delta_p": 0.041,
                },
            }
        ],
        "phases": {"sweep": 17.31, "evaluate": 9.64},
        "peak_memory_bytes": 655_360_000,
        "estimated_memory_bytes": 700_448_768,
        "warnings": ["gptq: linears have different grids, which transformers does not read in this format"],
        "plan_toml": '[model]\npath = "/home/someone/models/tiny-llama"\n',
        "verified": {"tensors": 39, "bytes": 8_398_848},
    }
    return Report.model_validate(fields | changes)


def card(directory: Path, report: Report, base_model: str = "EleutherAI/pythia-70m", license: str | None = None) -> str:
    write_card(report, directory, base_model, license)
    return (directory / "README.md").read_text(encoding="utf-8")


def test_the_header_is_what_the_hub_reads(tmp_path: Path) -> None:
    card(tmp_path, made_up(), license="apache-2.0")
    data = ModelCard.load(tmp_path / "README.md").data
    assert data.base_model == "EleutherAI/pythia-70m"
    assert data.license == "apache-2.0"
    assert data.library_name == "transformers"
    assert data.pipeline_tag == "text-generation"
    assert data.tags == ["compress", "pruning", "sparsegpt"]
    assert "base_model_relation" not in data.to_dict()


@pytest.mark.parametrize(
    "one",
    [WidthPruning(channels=0.25), DepthPruning(blocks=1), LoRAPrune(channels=0.5)],
    ids=lambda one: one.use(),
)
def test_every_way_to_prune_is_pruning(one: Pass, tmp_path: Path) -> None:
    step = made_up().passes[0].model_copy(update={"use": one.use(), "settings": one.settings()})
    card(tmp_path, made_up(passes=(step,)))
    assert ModelCard.load(tmp_path / "README.md").data.tags == ["compress", "pruning", one.use()]


@pytest.mark.parametrize(("kind", "of"), [("gram", "output"), ("diagonal", "output"), ("weight", "weights")])
def test_an_error_is_of_what_was_compared(kind: str, of: str, tmp_path: Path) -> None:
    step = made_up().passes[0].model_copy(update={"relative_error": 0.25, "error_kind": kind})
    assert f"mean relative error of the {of} 0.25" in card(tmp_path, made_up(passes=(step,)))


def test_a_quantized_model_says_so(tmp_path: Path) -> None:
    step = made_up().passes[0].model_copy(update={"use": "gptq", "settings": {"bits": 4, "group_size": 128}})
    text = card(tmp_path, made_up(passes=(step,)))
    data = ModelCard.load(tmp_path / "README.md").data
    assert data.tags == ["compress", "quantization", "gptq"]
    assert data.to_dict()["base_model_relation"] == "quantized"
    assert "license" not in data.to_dict()
    assert "gptq (bits 4, group size 128)" in text


def test_bits_under_a_budget_are_quantization_too(tmp_path: Path) -> None:
    one = LQLoRA(budget=4.25)
    step = made_up().passes[0].model_copy(update={"use": one.use(), "settings": one.settings()})
    card(tmp_path, made_up(passes=(step,)))
    data = ModelCard.load(tmp_path / "README.md").data
    assert data.tags == ["compress", "quantization", "lqlora"]
    assert data.to_dict()["base_model_relation"] == "quantized"


def test_the_card_states_method_results_use_and_limits(tmp_path: Path) -> None:
    text = card(tmp_path, made_up())
    expected = ["`sparsegpt (pattern 2:4)` on 28 linear layers: 50.00 % pruned", "39 tensors", "compress plan.toml"]
    expected += ["| perplexity, test.txt | 133.884 | 141.027 | +5.34 % |", "AutoModelForCausalLM.from_pretrained("]
    expected += ["`test.txt`: window 256, stride 256, 64 windows, 16,320 targets, one tokenizer call", "`wiki.jsonl`"]
    expected += ["| test.txt | 0.0217 | 0.0112 | 0.154 | 0.491 | 2.318 | 88.03 % |", "The zeros are stored"]
    for part in expected:
        assert part in text, part


def test_the_card_of_a_packed_output_imports_compress(tmp_path: Path) -> None:
    plain = made_up()
    output = plain.output.model_copy(update={"format": "packed"})
    assert "import compress" not in card(tmp_path, plain)
    (tmp_path / "config.json").write_text('{"quantization_config": {"quant_method": "compress"}}')
    assert "import compress  # transformers then knows" in card(tmp_path, made_up(output=output))


def test_the_card_is_the_same_whatever_the_machine(tmp_path: Path) -> None:
    first = card(tmp_path, made_up())
    elsewhere = {
        "model": made_up().model.model_copy(update={"path": "/mnt/other/tiny-llama"}),
        "environment": made_up().environment.model_copy(update={"device": "cuda", "threads": 64, "torch": "2.12.1"}),
        "passes": [made_up().passes[0].model_copy(update={"seconds": 1.5})],
        "phases": {"sweep": 1.5},
        "peak_memory_bytes": 1,
        "estimated_memory_bytes": 2,
        "resumed": 3,
        "plan_toml": "",
    }
    assert card(tmp_path, made_up(**elsewhere)) == first


@pytest.mark.parametrize(
    "base_model", ["/home/someone/models/tiny-llama", "./models/tiny-llama", "../tiny-llama/", r"C:\models\tiny-llama"]
)
def test_no_path_of_this_machine_is_in_the_card(tmp_path: Path, base_model: str) -> None:
    text = card(tmp_path, made_up(), base_model)
    assert "tiny-llama" in text
    assert "base_model" not in text
    assert not re.search(r"(?<![\w.`])(/|\.{1,2}/|[A-Z]:\\)\w", text)
    for private in ("someone", "home", "models/", "models\\", "17.3", "9.6", "625.00", "Linux", "2.13"):
        assert private not in text, private


def test_a_local_directory_named_like_a_hub_id_is_local(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "secret-project" / "model").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    text = card(tmp_path, made_up(), "secret-project/model")
    assert "secret-project" not in text


def test_hostile_names_stay_text(tmp_path: Path) -> None:
    hostile = '`|<script>alert(1)</script>\n---\n# "x'
    lines = (made_up().evaluation[0].model_copy(update={"text": hostile}),)
    output = made_up().output.model_copy(update={"path": hostile})
    text = card(tmp_path, made_up(evaluation=lines, output=output), hostile)
    outside_code = re.sub(r"`[^`\n]*`", "", text.replace("\\`", ""))
    assert "<script>" not in outside_code.replace("\\<", "")
    assert text.count("\n---\n") == 1
    assert text.count("\n# ") == 1


def test_the_card_lists_the_warnings_of_the_run(tmp_path: Path) -> None:
    text = card(tmp_path, made_up(warnings=("gptq: some warning", "2 stored tensors: <b>.weight")))
    assert "The run warned:\n\n- gptq: some warning\n- 2 stored tensors: \\<b\\>.weight\n" in text
    assert "warned" not in card(tmp_path, made_up(warnings=()))


def test_a_model_that_was_not_evaluated_says_so(tmp_path: Path) -> None:
    text = card(tmp_path, made_up(evaluation=(), passes=(), calibration=None))
    assert "The quality of this model was not measured." in text
    assert "No pass changed the weights." in text
