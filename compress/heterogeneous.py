"""Models whose blocks have different widths: their configuration, and how transformers builds them.

Of the families here, transformers (5.17 to 5.23) reads ``per_layer_config``, its own key for settings that differ
between layers, and then builds no model from it. So each family gets a second model type, ``heterogeneous_llama``
beside ``llama``, whose config.json has that key and whose class builds each block by the family's own block class, from
the configuration of that block. `compress.registration` has AutoConfig know these types, by the function that
transformers has for it. Without compress they are unknown, and no reader takes such a model for another.
"""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING, Any

import torch
from huggingface_hub.dataclasses import strict
from transformers.models.auto.configuration_auto import CONFIG_MAPPING, CONFIG_MAPPING_NAMES, AutoConfig

from compress.architecture import HETEROGENEOUS, architecture_for, known_model_types, of_block
from compress.errors import ModelError
from compress.structure import KEY

if TYPE_CHECKING:
    from compress.architecture import Architecture


def register_types() -> None:
    """Have AutoConfig know the model types; what stands for their classes imports nothing until one is read."""
    for model_type in known_model_types():

        def read(values: dict[str, Any], model_type: str = model_type, **options: Any) -> Any:
            return config_class(model_type).from_dict(values, **options)

        name = HETEROGENEOUS + model_type
        stands_in = {"model_type": name, "from_dict": staticmethod(read)}
        AutoConfig.register(name, type(_named(CONFIG_MAPPING_NAMES[model_type]), (), stands_in))


def __getattr__(name: str) -> Any:
    """The classes by their names, as pickle looks for them: they are made when they are first asked for."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    for model_type in known_model_types():
        if name == _named(CONFIG_MAPPING_NAMES[model_type]):
            return config_class(model_type)
        if name == _named(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[model_type]):
            return MODEL_FOR_CAUSAL_LM_MAPPING[config_class(model_type)]
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def _named(name: str) -> str:
    return f"Heterogeneous{name}"


@cache
def config_class(model_type: str) -> Any:
    """The configuration of a family's models with different blocks; `model_type`: that of the family."""
    from transformers import AutoModelForCausalLM
    from transformers.conversion_mapping import (
        get_checkpoint_conversion_mapping,
        register_checkpoint_conversion_mapping,
    )

    base, architecture = CONFIG_MAPPING[model_type], architecture_for(model_type)
    settings = architecture.block_settings(base)

    def __post_init__(self: Any, **given: Any) -> None:  # noqa: N807
        _check_layers(given.get(KEY), settings)
        base.__post_init__(self, **given)

    def unasked(self: Any) -> None:
        """A family's own checks ask for the one number of heads that all blocks have."""

    made: dict[str, Any] = {"model_type": HETEROGENEOUS + model_type, "__module__": __name__}
    # Without what differs there is no such model; older transformers would make one to compare with, for its log.
    made |= {"__post_init__": __post_init__, "has_no_defaults_at_init": True}
    made |= {name: unasked for name in vars(base) if name.startswith("validate_")}
    kind: Any = strict(type(_named(base.__name__), (base,), made))
    model = model_class(kind, base, architecture)
    AutoModelForCausalLM.register(kind, model)
    names = {model_type: kind.model_type, model.__base__.__name__: model.__name__}
    for known, ours in names.items():  # what checkpoints call otherwise, such as the head of GPT-NeoX
        if renamings := get_checkpoint_conversion_mapping(known):
            register_checkpoint_conversion_mapping(ours, renamings)
    return kind


def _check_layers(layers: Any, known: set[str]) -> None:
    """Refuse settings of blocks that no block of this family would follow. Raises ModelError."""
    fix = "give a model whose blocks differ in heads and channels only, as compress writes it"
    if not isinstance(layers, dict) or not all(isinstance(values, dict) for values in layers.values()):
        raise ModelError(f'"{KEY}" does not map blocks to settings', where="config.json", fix=fix)
    for values in layers.values():
        for name, value in values.items():
            if name not in known:
                problem = f'"{KEY}" has "{name}"; blocks may differ in {", ".join(sorted(known))}'
                raise ModelError(problem, where="config.json", fix=fix)
            if not isinstance(value, int) or value < 1:
                problem = f'"{KEY}" has "{name}": {value!r}; a positive integer is needed'
                raise ModelError(problem, where="config.json", fix=fix)


def model_class(kind: Any, base_config: Any, architecture: Architecture) -> Any:
    """The model of a configuration class: of the family's own, with blocks of their own widths."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

    base = MODEL_FOR_CAUSAL_LM_MAPPING[base_config]

    def __init__(self: Any, config: Any, *args: Any, **kwargs: Any) -> None:  # noqa: N807
        base.__init__(self, of_block(config, 0), *args, **kwargs)
        _diversify(self, config, architecture)

    made = {"__init__": __init__, "__module__": __name__, "config_class": kind}
    return type(_named(base.__name__), (base,), made)


def _diversify(model: Any, config: Any, architecture: Architecture) -> None:
    """Give a model that has the widths of its first block everywhere those that `config` says."""
    from transformers import PreTrainedModel

    config._attn_implementation = model.config._attn_implementation  # chosen as the model was built
    blocks = model.get_submodule(architecture.blocks)
    for number, old in enumerate(blocks):
        if number:
            with torch.device(next(old.parameters()).device):
                blocks[number] = type(old)(of_block(config, number), number)
    for module in model.modules():
        if isinstance(module, PreTrainedModel):
            module.config = config


register_types()
