"""Tiny random models of every family, for tests: a forward takes a few milliseconds.

Every parameter, norms and biases too, has values that a test can see: zero biases and unit norms would hide the loss
or the mix-up of either.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch.overrides import TorchFunctionMode
from transformers import AutoConfig, AutoModelForCausalLM

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

VOCABULARY = 64
WINDOW = 8  # of sliding attention; longer inputs see masks that differ between blocks
FAMILIES: list[str] = [
    "llama",
    "mistral",
    "qwen2",
    "qwen3",
    "gemma2",
    "gemma3_text",
    "phi3",
    "opt",
    "gpt_neox",
    "gpt2",
]
GROUPED: list[str] = [family for family in FAMILIES if family not in ("opt", "gpt_neox", "gpt2")]


def tiny_config(family: str, *, tied: bool, gqa: bool, blocks: int = 3, **overrides: Any) -> PretrainedConfig:
    """Width 32, 4 heads (2 KV heads with `gqa`, where the family has groups), MLP 48, vocabulary 64, positions 64.

    `overrides` are further settings of the family's configuration.
    """
    mixed = ["full_attention" if block % 2 else "sliding_attention" for block in range(blocks)]
    sliding = {"sliding_window": WINDOW}
    special: dict[str, dict[str, Any]] = {
        "llama": {},
        "mistral": sliding,
        "phi3": sliding,
        "qwen2": {**sliding, "use_sliding_window": True, "layer_types": mixed},
        "qwen3": {**sliding, "use_sliding_window": True, "layer_types": mixed, "head_dim": 16},
        "gemma2": {**sliding, "layer_types": mixed, "head_dim": 16, "query_pre_attn_scalar": 16},
        "gemma3_text": {**sliding, "layer_types": mixed, "head_dim": 16, "query_pre_attn_scalar": 16},
        "opt": {"ffn_dim": 48},
        "gpt_neox": {},
        "gpt2": {},  # n_inner stays None: 4 * 32
    }
    settings: dict[str, Any] = {
        "vocab_size": VOCABULARY,
        "hidden_size": 32,
        "num_hidden_layers": blocks,
        "num_attention_heads": 4,
        "max_position_embeddings": 64,
        "tie_word_embeddings": tied,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    if family in GROUPED:
        settings["num_key_value_heads"] = 2 if gqa else 4
    if family not in ("opt", "gpt2"):
        settings["intermediate_size"] = 48
    return AutoConfig.for_model(family, **{**settings, **special[family], **overrides})


def tiny_model(
    family: str,
    *,
    tied: bool,
    gqa: bool,
    blocks: int = 3,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    **overrides: Any,
) -> PreTrainedModel:
    """A model in eval mode; the same `seed` gives the same values, rounded to `dtype`, on every machine."""
    config = tiny_config(family, tied=tied, gqa=gqa, blocks=blocks, **overrides)
    with torch.random.fork_rng(devices=[]):
        # Built in its dtype, not converted: .to(bfloat16) would also round RoPE's buffers, which loading does not.
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            if parameter.ndim > 1:
                parameter.copy_(noise * 0.25)  # about 1/sqrt(fan in): the blocks weigh as much as the stream
            else:
                parameter.copy_(parameter.double() + noise * 0.25)  # norms around 1, biases around 0
    return model.eval()


def save_tiny(directory: str | Path, family: str, *, max_shard_size: int | str | None = None, **settings: Any) -> Path:
    """Save `tiny_model(family, **settings)` as safetensors into `directory`, without a tokenizer."""
    sharding = {} if max_shard_size is None else {"max_shard_size": max_shard_size}
    tiny_model(family, **settings).save_pretrained(directory, **sharding)
    return Path(directory)


class Float64(TorchFunctionMode):
    """A context in which a float64 model computes in float64 throughout.

    transformers casts norms, RoPE and soft-max to float32 whatever the dtype of the model, which leaves noise of 1e-7
    in a comparison that should be exact.
    """

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is torch.Tensor.float:
            function = torch.Tensor.double
        args = tuple(torch.float64 if value is torch.float32 else value for value in args)
        kwargs = {key: torch.float64 if value is torch.float32 else value for key, value in (kwargs or {}).items()}
        return function(*args, **kwargs)
