r"""Write a Llama checkpoint with random weights, of any size, to measure memory on.

    python benchmarks/memory_model.py --output DIR --tokenizer MODEL_DIR --hidden 2048 --intermediate 5632 --blocks 22 \
        --vocab 4096 --heads 32 --kv-heads 4

A claim that compression needs less memory than the model must be measured on a model larger than the memory allowed,
and then the writer may not need the model's memory either: it draws block after block and holds one tensor at a time,
whatever `--shard-bytes` is. The files are those of `save_pretrained`: config.json, numbered safetensors shards, an
index, and the tokenizer's files copied from `--tokenizer`.

Weights are normal with standard deviation 0.02, norms are one, as transformers initializes Llama. The two projections
that write to the residual stream are scaled by 1/√(2·blocks) (GPT-2's initialization; Radford et al., 2019), so that
activations stay in float16's range at any depth. Every tensor has its own seed, drawn from `--seed` and its name: the
same arguments give the same weights whatever the shard size and the number of threads.
"""

from __future__ import annotations

import argparse
import json
import shutil
import zlib
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from transformers import GenerationConfig, LlamaConfig

if TYPE_CHECKING:
    from collections.abc import Iterator

STANDARD_DEVIATION = 0.02  # LlamaConfig's initializer_range
TOKENIZER_FILES = (
    "added_tokens.json",
    "chat_template.jinja",
    "merges.txt",
    "special_tokens_map.json",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "vocab.json",
)


def arguments() -> argparse.Namespace:
    """Read and check the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="directory to write; it must be new or empty")
    parser.add_argument("--tokenizer", type=Path, required=True, help="directory whose tokenizer files are copied")
    parser.add_argument("--hidden", type=int, required=True)
    parser.add_argument("--intermediate", type=int, required=True)
    parser.add_argument("--blocks", type=int, required=True)
    parser.add_argument("--vocab", type=int, required=True, help="at least the tokenizer's")
    parser.add_argument("--heads", type=int, required=True)
    parser.add_argument("--kv-heads", type=int, help="as many as --heads when absent")
    parser.add_argument("--context", type=int, default=2048, help="max_position_embeddings")
    parser.add_argument("--untied", action="store_true", help="give the output head a matrix of its own")
    parser.add_argument("--dtype", choices=["float16", "bfloat16", "float32"], default="float16")
    parser.add_argument("--shard-bytes", type=int, default=2**28, help="highest size of a shard's tensors (256 MiB)")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    given.kv_heads = given.kv_heads or given.heads
    if given.hidden % given.heads or (given.hidden // given.heads) % 2:
        parser.error(f"--hidden {given.hidden}: must be --heads {given.heads} times an even head size")
    if given.heads % given.kv_heads:
        parser.error(f"--heads {given.heads}: must be a multiple of --kv-heads {given.kv_heads}")
    if given.output.exists() and (not given.output.is_dir() or any(given.output.iterdir())):
        parser.error(f"--output {given.output}: exists and is not an empty directory; give another or remove it")
    if not (given.tokenizer / "tokenizer_config.json").is_file():
        parser.error(f"--tokenizer {given.tokenizer}: no tokenizer_config.json there")
    tokens = tokenizer_size(given.tokenizer)
    if tokens > given.vocab:
        parser.error(f"--vocab {given.vocab}: the tokenizer at {given.tokenizer} has {tokens} tokens")
    return given


def tokenizer_size(directory: Path) -> int:
    """Return the highest token number of a tokenizer.json plus one, or 0 where there is no such file to read."""
    path = directory / "tokenizer.json"
    if not path.is_file():
        return 0
    content = json.loads(path.read_text(encoding="utf-8"))
    vocabulary = content["model"]["vocab"]
    # Unigram models list [token, score] pairs; all others map a token to its number.
    numbers = vocabulary.values() if isinstance(vocabulary, dict) else range(len(vocabulary))
    return 1 + max([*numbers, *(token["id"] for token in content.get("added_tokens", []))])


def make_config(options: argparse.Namespace) -> LlamaConfig:
    """Return the model's config; the special tokens are those of the tokenizer's directory if it is a model's."""
    source = options.tokenizer / "config.json"
    ids = json.loads(source.read_text(encoding="utf-8")) if source.is_file() else {}
    return LlamaConfig(
        architectures=["LlamaForCausalLM"],
        vocab_size=options.vocab,
        hidden_size=options.hidden,
        intermediate_size=options.intermediate,
        num_hidden_layers=options.blocks,
        num_attention_heads=options.heads,
        num_key_value_heads=options.kv_heads,
        max_position_embeddings=options.context,
        initializer_range=STANDARD_DEVIATION,
        tie_word_embeddings=not options.untied,
        bos_token_id=ids.get("bos_token_id"),
        eos_token_id=ids.get("eos_token_id"),
        pad_token_id=ids.get("pad_token_id"),
        dtype=options.dtype,
    )


def shapes(config: LlamaConfig) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Yield every tensor's name and shape, a linear's as (out, in), in the order of the data's flow."""
    hidden, inner = config.hidden_size, config.intermediate_size
    head = hidden // config.num_attention_heads
    keys = head * config.num_key_value_heads
    yield "model.embed_tokens.weight", (config.vocab_size, hidden)
    for block in range(config.num_hidden_layers):
        prefix = f"model.layers.{block}."
        yield prefix + "input_layernorm.weight", (hidden,)
        yield prefix + "self_attn.q_proj.weight", (hidden, hidden)
        yield prefix + "self_attn.k_proj.weight", (keys, hidden)
        yield prefix + "self_attn.v_proj.weight", (keys, hidden)
        yield prefix + "self_attn.o_proj.weight", (hidden, hidden)
        yield prefix + "post_attention_layernorm.weight", (hidden,)
        yield prefix + "mlp.gate_proj.weight", (inner, hidden)
        yield prefix + "mlp.up_proj.weight", (inner, hidden)
        yield prefix + "mlp.down_proj.weight", (hidden, inner)
    yield "model.norm.weight", (hidden,)
    if not config.tie_word_embeddings:
        yield "lm_head.weight", (config.vocab_size, hidden)


def draw(name: str, shape: tuple[int, ...], blocks: int, dtype: torch.dtype, seed: int) -> torch.Tensor:
    """Return a tensor's weights: ones for a norm, otherwise normal, as the module's docstring says."""
    if len(shape) == 1:
        return torch.ones(shape, dtype=dtype)
    scale = STANDARD_DEVIATION
    if name.endswith(("o_proj.weight", "down_proj.weight")):
        scale /= (2 * blocks) ** 0.5
    generator = torch.Generator().manual_seed(seed << 32 | zlib.crc32(name.encode()))
    weight = torch.empty(shape, dtype=dtype)
    # Row slices of a million float32 weights or so: the draw never needs the tensor in float32.
    step = max(1, 2**20 // shape[1])
    for start in range(0, shape[0], step):
        part = weight[start : start + step]
        part.copy_(torch.randn(part.shape, generator=generator) * scale)
    return weight


def plan_shards(config: LlamaConfig, bytes_per_weight: int, highest: int) -> list[list[tuple[str, tuple[int, ...]]]]:
    """Fill shards in order up to `highest` bytes; a tensor larger than that has a shard to itself."""
    shards: list[list[tuple[str, tuple[int, ...]]]] = [[]]
    size = 0
    for name, shape in shapes(config):
        tensor = bytes_per_weight * torch.Size(shape).numel()
        if shards[-1] and size + tensor > highest:
            shards.append([])
            size = 0
        shards[-1].append((name, shape))
        size += tensor
    return shards


def write_shard(path: Path, shard: list[tuple[str, tuple[int, ...]]], options: argparse.Namespace) -> None:
    """Draw and write a shard's tensors one after the other.

    safetensors' `save_file` wants all of them in memory, so the format is written here: the header's length (8 bytes,
    little-endian), the header (JSON, padded with spaces to a multiple of 8), the tensors' bytes, row-major.
    """
    dtype = getattr(torch, options.dtype)
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, shape in shard:
        start, end = end, end + dtype.itemsize * torch.Size(shape).numel()
        kind = {"float16": "F16", "bfloat16": "BF16", "float32": "F32"}[options.dtype]
        header[name] = {"dtype": kind, "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name, shape in shard:
            weight = draw(name, shape, options.blocks, dtype, options.seed)
            file.write(weight.view(torch.uint8).numpy().data)


def main() -> None:
    """Write the checkpoint, shard by shard."""
    options = arguments()
    config, dtype = make_config(options), getattr(torch, options.dtype)
    options.output.mkdir(parents=True, exist_ok=True)
    config.save_pretrained(options.output)
    GenerationConfig.from_model_config(config).save_pretrained(options.output)
    for name in TOKENIZER_FILES:
        if (options.tokenizer / name).is_file():
            shutil.copyfile(options.tokenizer / name, options.output / name)

    shards = plan_shards(config, dtype.itemsize, options.shard_bytes)
    files: dict[str, str] = {}
    weights = 0
    for number, shard in enumerate(shards, start=1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        write_shard(options.output / file, shard, options)
        files |= {name: file for name, _ in shard}
        weights += sum(torch.Size(shape).numel() for _, shape in shard)
    total = weights * dtype.itemsize
    index = {"metadata": {"total_parameters": weights, "total_size": total}, "weight_map": files}
    text = json.dumps(index, indent=2, sort_keys=True) + "\n"
    (options.output / "model.safetensors.index.json").write_text(text, encoding="utf-8")
    print(f"{options.output}: {weights:,} weights, {total / 2**20:,.0f} MiB of {options.dtype}, {len(shards)} shards")


if __name__ == "__main__":
    main()
