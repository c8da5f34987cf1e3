"""The code of the model card that loads the model: run as it stands, on what plans emit for tiny models."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

import pytest
import torch

import compress
from compress.passes import PERP, RTN, EoRA, LQLoRA, Wanda, Where, WidthPruning
from compress.plan import Export
from compress.usage import usage
from tests.conftest import tiny_directory
from tests.test_card import made_up

if TYPE_CHECKING:
    from pathlib import Path

    from compress.passes.base import Pass

IDS = torch.arange(4, 20)[None]
MIXED = (Where(match="*.down_proj", bits=8),)
NARROW = WidthPruning(score="wanda", channels=0.25, multiple=32, heterogeneous=True)
READERS = {"gptq": ("gptqmodel", "optimum"), "compressed-tensors": ("compressed_tensors",)}


def coarse(**settings: Any) -> RTN:
    return RTN(**{"bits": 4, "group_size": 32, "clip": "minmax"} | settings)


def card_of(folder: Path, form: str, passes: list[Pass], family: str = "llama") -> str:
    tiny_directory(folder / "model", family, blocks=2, dtype=torch.float16, intermediate_size=128)
    plan = compress.Plan(
        model=compress.Model(path=str(folder / "model")),
        calibration=compress.Calibration(source=str(folder / "text.txt"), samples=4, length=16),
        run=compress.Run(output=str(folder / "my tasks' [x]")),
        passes=passes,
        exports=[Export(format=form)],
    )
    compress.run(plan)
    return (folder / "my tasks' [x]" / "README.md").read_text()


CASES: dict[str, tuple[str, list[Any], str]] = {
    "plain": ("huggingface", [Wanda(sparsity=0.5)], "with plain `transformers`:"),
    "branches": ("huggingface", [EoRA(rank=2)], "model as it was before `eora`. Do not merge it."),
    "narrow": ("huggingface", [NARROW, EoRA(rank=2)], "`compress`, because blocks have different widths:"),
    "narrow codes": ("compressed-tensors", [NARROW, coarse()], "`compress`, because blocks have different widths:"),
    "nothing": ("gptq", [Wanda(sparsity=0.5)], "with plain `transformers`:"),
    "gptq": ("gptq", [coarse(), EoRA(rank=2)], "`transformers`, which needs `gptqmodel` and `optimum` for it:"),
    "asymmetric gptq": ("gptq", [coarse(symmetric=False)], "`gptqmodel` and `optimum` for it:"),
    "groups of 16": ("gptq", [coarse(group_size=16)], 'GPTQConfig(bits=4, backend="gptq_torch")'),
    "mixed gptq": ("gptq", [coarse(where=MIXED), EoRA(rank=2)], "does not read different grids in this format:"),
    "codes": ("compressed-tensors", [coarse()], "`transformers`, which needs `compressed-tensors` for it:"),
    "asymmetric": ("compressed-tensors", [coarse(symmetric=False)], "because it reads asymmetric grids only so:"),
    "codes and branches": ("compressed-tensors", [coarse(), EoRA(rank=2)], "PEFT takes weights only so:"),
    "mixed": ("compressed-tensors", [coarse(where=MIXED)], "`transformers`, which needs `compressed-tensors` for it:"),
    "mixed, asymmetric": ("compressed-tensors", [coarse(where=MIXED, symmetric=False)], "`compress`, because linears"),
    "mixed and branches": ("compressed-tensors", [coarse(where=MIXED), EoRA(rank=2)], "which this loads, too."),
    "packed": ("packed", [coarse()], "`transformers` and `compress`:"),
}


@pytest.mark.parametrize("name", CASES)
def test_the_code_runs(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And what it makes computes with the weights and branches that we read."""
    form, passes, says = CASES[name]
    text = card_of(tmp_path, form, passes)
    assert says in text
    blocks = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    assert len(blocks) == 1 + ("PeftModel" in text)
    for package in (*READERS.get(form, ()), *(["peft"] if len(blocks) > 1 else [])):
        pytest.importorskip(package, reason="install the extra: pip install '.[readers]'")
    monkeypatch.chdir(tmp_path)
    found: dict[str, Any] = {}
    with torch.compiler.set_stance("force_eager"), torch.no_grad():
        for block in blocks:
            exec(block, found)  # the code under test
        logits = found["model"](input_ids=IDS).logits.float()
        ours = compress.load(tmp_path / "my tasks' [x]", kernels="reference")(input_ids=IDS).logits.float()
    assert found["tokenizer"]("Ab").input_ids
    assert torch.allclose(logits, ours, rtol=0, atol=0.03 * float(ours.abs().max()))  # one of their kernels: bfloat16


def test_transposed_linears_are_for_gptqmodel(tmp_path: Path) -> None:
    text = card_of(tmp_path, "gptq", [coarse()], "gpt2")
    assert "GPTQModel.load(" in text
    assert "AutoModelForCausalLM" not in text


@pytest.mark.parametrize(
    ("passes", "before"),
    [
        ([EoRA(rank=2)], "eora"),
        ([coarse(), PERP(train=("low_rank",))], "perp"),
        ([EoRA(rank=2), PERP(train=("low_rank",), extend=True)], None),
        ([EoRA(rank=2), PERP(train=("norms", "low_rank"))], None),
        ([EoRA(rank=2), PERP(train=("norms",))], None),
        ([LQLoRA(rank=2)], None),
        ([LQLoRA(budget=4, choices_rank=(0, 2)), EoRA(rank=2)], None),
    ],
)
def test_what_the_model_is_without_its_branches(passes: list[Pass], before: str | None) -> None:
    plain = made_up()
    fields = [{"use": one.use(), "settings": one.settings()} for one in passes]
    steps = [plain.passes[0].model_copy(update=each) for each in fields]
    text = usage(made_up(output=plain.output.model_copy(update={"adapter": True}), passes=steps), {})
    said = (
        f"Without it this is the model as it was before `{before}`."
        if before
        else "Without it, what is left is no model that was measured."
    )
    assert said in text


@pytest.mark.parametrize("name", ["my tasks", 'a"b', "<b>", "```", "ümlaut", "back\\slash", "x\ny", "$(rm)`"])
def test_any_name_of_a_directory_is_given_as_it_is(name: str) -> None:
    text = usage(made_up(output=made_up().output.model_copy(update={"path": name})), {})
    literal = re.findall(r'AutoTokenizer.from_pretrained\((".*")\)', text)[0]
    assert eval(literal) == name  # the code under test
    assert not set(literal[1:-1]) & set('"<>`$')
