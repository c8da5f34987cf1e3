"""The part of the model card that says how to load the model, by what was emitted.

docs/deploy.md says who reads what; tests/test_usage.py runs this code on each kind of output.
"""

from __future__ import annotations

import re
from itertools import dropwhile
from typing import TYPE_CHECKING, Any, NamedTuple

from compress.architecture import architecture_for, known_model_types

if TYPE_CHECKING:
    from compress.report import PassSummary, Report


class Loading(NamedTuple):
    """What loads a model: how a sentence calls it, and the lines that import and make `model`."""

    reader: str
    imports: str
    model: str  # with {name} where the literal of the directory goes
    branches: bool = False  # whether it loads the branches, too


def usage(report: Report, config: dict[str, Any]) -> str:
    """The section of the card; `config`: config.json of the output."""
    loading, name = _loading(report, config), _literal(report.output.path)
    text = f"""## Use

The directory loads with {loading.reader}:

```python
{loading.imports}

{loading.model.format(name=name)}
tokenizer = AutoTokenizer.from_pretrained({name})
```"""
    return text + _adapter(report, loading) if report.output.adapter else text


def _adapter(report: Report, loading: Loading) -> str:
    """Where the branches are, how they are loaded, and what the model is without them."""
    text = "\n\nLow-rank branches that make up for what was lost are beside the weights, as a PEFT adapter"
    if loading.branches:
        return f"{text}, which this loads, too. {_without(report.passes)}"
    return f"""{text}. {_without(report.passes)} Do not merge it.

```python
from peft import PeftModel

model = PeftModel.from_pretrained(model, {_literal(report.output.path + "/adapter")})
```"""


def _loading(report: Report, config: dict[str, Any]) -> Loading:
    """What loads an output, the commonest of its readers."""
    found = config.get("quantization_config") or {}
    method, different = found.get("quant_method"), report.output.heterogeneous
    if method == "gptq":
        return _of_gptq(found, config, different=different)
    if method == "compressed-tensors":
        return _of_compressed_tensors(found, different=different, adapter=report.output.adapter)
    if method:
        return _transformers("`transformers` and `compress`", knows="the format")
    if different:
        return _transformers("`transformers` and `compress`, because blocks have different widths", knows="the model")
    return _transformers("plain `transformers`")


def _of_gptq(found: dict[str, Any], config: dict[str, Any], *, different: bool) -> Loading:
    """Transformers builds all layers alike and takes no transposed ones; GPTQModel does, but splits those of Phi-3."""
    mixed = any(rule.startswith("+:") for rule in found.get("dynamic", {}))
    family = config.get("model_type")
    transposed = family in known_model_types() and bool(architecture_for(family).transposed)
    if different or (mixed and family == "phi3"):
        return _compress("blocks have different widths" if different else "linears have different grids")
    if mixed or transposed:
        why = "different grids" if mixed else "transposed linears"
        reader = f"`gptqmodel`, not with `transformers`, which does not read {why} in this format"
        imports = "from gptqmodel import GPTQModel\nfrom transformers import AutoTokenizer"
        return Loading(reader, imports, "model = GPTQModel.load({name}).model")
    reader = "`transformers`, which needs `gptqmodel` and `optimum` for it"
    if found["bits"] == 4 and found["group_size"] == 16:  # on a CPU the kernel for 4 bits takes groups from 32 on
        return _transformers(reader, options='GPTQConfig(bits=4, backend="gptq_torch")')
    return _transformers(reader)


def _of_compressed_tensors(found: dict[str, Any], *, different: bool, adapter: bool) -> Loading:
    """Decoded while loading where transformers or PEFT needs that, which is right with one grid only."""
    grids = [group["weights"] for group in found["config_groups"].values()]
    asymmetric = any(not grid["symmetric"] for grid in grids)
    if different:
        return _compress("blocks have different widths")
    if len(grids) > 1 and (asymmetric or adapter):
        return _compress("linears have different grids" + (", asymmetric ones among them" if asymmetric else ""))
    reader = "`transformers`, which needs `compressed-tensors` for it"
    if not (asymmetric or adapter):
        return _transformers(reader)
    why = "it reads asymmetric grids" if asymmetric else "PEFT takes weights"
    reader += f" and decodes while loading, because {why} only so"
    return _transformers(reader, options="CompressedTensorsConfig(dequantize=True)")


def _transformers(reader: str, *, knows: str = "", options: str = "") -> Loading:
    """`knows`: what transformers knows after importing compress; `options`: the quantization_config."""
    first = f"import compress  # transformers then knows {knows}\n" if knows else ""
    names = sorted(["AutoModelForCausalLM", "AutoTokenizer", *([options.partition("(")[0]] if options else [])])
    given = f"options = {options}\n" if options else ""
    model = f'{given}model = AutoModelForCausalLM.from_pretrained({{name}}, dtype="auto"'
    model += ", quantization_config=options)" if options else ")"
    return Loading(reader, f"{first}from transformers import {', '.join(names)}", model)


def _compress(why: str) -> Loading:
    imports = "import compress\nfrom transformers import AutoTokenizer"
    return Loading(f"`compress`, because {why}", imports, "model = compress.load({name})", branches=True)


def _without(passes: tuple[PassSummary, ...]) -> str:
    """What the weights are without the branches: what they were, if since the first nothing but branches changed."""
    since = list(dropwhile(lambda step: not (step.settings.get("rank") or step.settings.get("choices_rank")), passes))
    if since and all(_only_branches(step) for step in since):
        return f"Without it this is the model as it was before `{since[0].use}`."
    return "Without it, what is left is no model that was measured."


def _only_branches(step: PassSummary) -> bool:
    alone = step.settings.get("train") == ["low_rank"] and step.settings.get("variant") == "lora"
    return step.use == "eora" or (step.use == "perp" and alone and not step.settings.get("extend"))


def _literal(name: str) -> str:
    """A directory's name as a literal of Python in which nothing is markup."""
    escaped = re.sub(r"[^\w .,/()+=@~-]", lambda found: f"\\U{ord(found[0]):08x}", name)
    return f'"{escaped}"'
