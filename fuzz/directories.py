"""Targets that are parts of a model directory: headers, index, configuration, and the quantized formats."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch

import compress
from compress.architecture import architecture_for
from compress.checking import check_plan
from compress.checkpoint import INDEX, SINGLE, Checkpoint
from compress.export.reader import open_model
from compress.plan import load_plan, parse_plan
from compress.stream import Skeleton
from fuzz.target import PLAN, Target

if TYPE_CHECKING:
    from fuzz.choices import Choices


class Header(Target):
    """The header of a safetensors file."""

    name = "header"
    keys = ("__metadata__", "dtype", "shape", "data_offsets", "lm_head.weight")

    def change(self, choices: Choices) -> dict[Path, bytes]:
        return {self.model / SINGLE: self.header(self.model / SINGLE, choices)}

    def read(self) -> object:
        found = Checkpoint(Path("model"))
        return [found.read(name) for name in found.tensors], check_plan(load_plan("plan.toml"))


class Index(Target):
    """The index of several shards."""

    name = "index"
    keys = ("metadata", "weight_map", "lm_head.weight", "model.norm.weight")

    def prepare(self) -> None:
        from safetensors.torch import load_file, save_file

        tensors = load_file(self.model / SINGLE)
        (self.model / SINGLE).unlink()
        places = {name: f"{number % 2}.safetensors" for number, name in enumerate(sorted(tensors))}
        for file in sorted(set(places.values())):
            save_file({name: tensors[name] for name in tensors if places[name] == file}, self.model / file)
        (self.model / INDEX).write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": places}))
        shutil.copy(self.model / "0.safetensors", self.folder)  # outside the model directory

    def change(self, choices: Choices) -> dict[Path, bytes]:
        return {self.model / INDEX: self.json(self.model / INDEX, choices)}

    def read(self) -> object:
        return check_plan(load_plan("plan.toml"))


class Config(Target):
    """config.json, through what ``compress check`` does."""

    name = "config"
    keys = (
        "auto_map", "attn_implementation", "_attn_implementation", "experts_implementation", "num_labels", "id2label",
        "layer_types", "head_dim", "rope_parameters", "rope_scaling", "rope_theta", "quantization_config", "dtype",
        "torch_dtype", "text_config", "per_layer_config", "tie_word_embeddings", "pad_token_id", "sliding_window",
        "attention_bias", "mlp_bias", "pretraining_tp", "n_layer", "num_layers", "_name_or_path", "name_or_path",
        "architectures", "problem_type", "output_attentions", "gguf_file", "to_dict", "get_text_config",
        "attribute_map", "base_model_tp_plan", "is_encoder_decoder", "partial_rotary_factor", "initializer_range",
        "transformers_version",
    )  # fmt: skip

    def change(self, choices: Choices) -> dict[Path, bytes]:
        return {self.model / "config.json": self.json(self.model / "config.json", choices)}

    def read(self) -> object:
        return check_plan(load_plan("plan.toml"))


class Quantized(Target):
    """An emitted directory: its quantization_config and the headers of its tensors, through ``compress.load``."""

    form: ClassVar[str]
    passes: ClassVar[str]
    keys = (
        "quant_method", "version", "schemes", "modules", "shape", "dtype", "sparsity", "grid", "rank", "kind", "bits",
        "group_size", "symmetric", "scale_dtype", "scale_codes", "peak_dtype", "config_groups", "targets", "weights",
        "num_bits", "type", "strategy", "format", "ignore", "desc_act", "sym", "dynamic", "checkpoint_format",
        "temperature", "max_length", "pad_token_id", "__metadata__", "base_model_name_or_path", "rank_pattern",
    )  # fmt: skip

    def prepare(self) -> None:
        head, _, _ = PLAN.partition("[[pass]]")
        text = f'{head}{self.passes}\n[[export]]\nformat = "{self.form}"\n'
        compress.run(parse_plan(text, self.folder / "plan.toml"))
        self.output = self.folder / "out"
        shutil.copy(self.model / "evil.py", self.output)
        self.weights = self.output / SINGLE
        self.before = json.loads((self.output / "config.json").read_text())

    def change(self, choices: Choices) -> dict[Path, bytes]:
        if choices.below(4) == 1:
            return {self.weights: self.header(self.weights, choices)}
        path = self.output / "config.json"
        if choices.below(8) == 1:
            return {path: self.json(path, choices)}
        return {path: self.within(path, "quantization_config", choices)}

    def read(self) -> object:
        config, checkpoint = open_model(Path("out"))
        Skeleton(checkpoint, config, architecture_for(config.model_type))
        values: list[Any] = [checkpoint.read(name) for name in checkpoint.tensors]
        model = compress.load("out", device="cpu", kernels="decoded")
        with torch.no_grad():
            values.append(model(torch.ones(1, 4, dtype=torch.int64)).logits)
        return values


class Packed(Quantized):
    """The packed format: 2:4, integer and NormalFloat codes, and branches."""

    name, form = "packed", "packed"
    passes = """
[[pass]]
use = "sparsegpt"
pattern = "2:4"
[[pass]]
use = "rtn"
bits = 4
group_size = 16
except = "*.up_proj"
[[pass]]
use = "eora"
rank = 2
"""


class Gptq(Quantized):
    """The gptq format."""

    name, form = "gptq", "gptq"
    passes = '[[pass]]\nuse = "rtn"\nbits = 4\ngroup_size = 16\nsymmetric = false\n'


class CompressedTensors(Quantized):
    """The compressed-tensors format."""

    name, form = "compressed-tensors", "compressed-tensors"
    passes = '[[pass]]\nuse = "rtn"\nbits = 4\ngroup_size = 16\n[[pass.where]]\nmatch = "*.down_proj"\nbits = 8\n'


class Adapter(Quantized):
    """Branches in a PEFT adapter beside plain weights."""

    name, form = "adapter", "huggingface"
    passes = '[[pass]]\nuse = "wanda"\nsparsity = 0.5\n[[pass]]\nuse = "eora"\nrank = 2\n'

    def change(self, choices: Choices) -> dict[Path, bytes]:
        weights, config = (
            self.output / "adapter" / name for name in ("adapter_model.safetensors", "adapter_config.json")
        )
        if choices.below(2):
            return {weights: self.header(weights, choices)}
        return {config: self.json(config, choices)}
