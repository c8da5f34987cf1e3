r"""Prune and quantize a model directory with llm-compressor and print one JSON line: the other side of our benchmarks.

It runs with the interpreter of an environment that has llm-compressor and imports nothing of this package:

    PEER/bin/python benchmarks/llmcompressor_run.py --model DIR --text FILE --steps sparsegpt:2:4,gptq:4 --output DIR

The conditions are those of the peers' table: calibration on the first samples × length tokens of the text, one
tokenizer call without special tokens, sequences in order, one at a time; the linears of the decoder blocks and nothing
else; the compression call timed alone. The weights are saved as float16, so one evaluator scores every tool.

The line's memory is resident memory in MiB: `import_rss_mib` when the imports are done, `peak_rss_mib` the highest from
the process's start to the end of the compression call, `peak_rss_with_save_mib` the highest with saving included.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import resource
import sys
import time
from pathlib import Path


def arguments() -> argparse.Namespace:
    """Read the command line; it is read before the imports because torch takes its threads from the environment."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="directory of the dense model and its tokenizer")
    parser.add_argument("--text", type=Path, required=True, help="calibration text, UTF-8")
    parser.add_argument(
        "--steps",
        required=True,
        help="wanda or sparsegpt with N:M (N zeros in each group of M) or a fraction of zeros, rtn or gptq with bits "
        "(symmetric, groups of 128), separated by commas, such as sparsegpt:2:4,gptq:4",
    )
    parser.add_argument("--samples", type=int, default=128, help="calibration sequences")
    parser.add_argument("--length", type=int, default=256, help="tokens of a sequence")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--dtype", default="float32", help="of the computation: float32, bfloat16, float16 or auto")
    parser.add_argument("--output", type=Path, required=True, help="directory for the pruned model")
    given = parser.parse_args()
    given.steps = [tuple(step.split(":", 1)) for step in given.steps.split(",")]
    pattern = next((target for _, target in given.steps if ":" in target), "0:0")
    given.zeros_per_group, given.group = map(int, pattern.split(":"))
    return given


options = arguments()
for variable in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ[variable] = str(options.threads)
os.environ |= {"TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1"}

# llm-compressor logs to the standard output, where only our line may stand.
with contextlib.redirect_stdout(sys.stderr):
    import llmcompressor
    import torch
    from datasets import Dataset
    from llmcompressor import oneshot
    from llmcompressor.modifiers.pruning import SparseGPTModifier, WandaPruningModifier
    from llmcompressor.modifiers.quantization import GPTQModifier, QuantizationModifier
    from llmcompressor.pipelines.cache import IntermediatesCache
    from loguru import logger
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging as transformers_logging

    transformers_logging.set_verbosity_error()
    # Warnings stay (a Hessian that cannot be inverted is one); its progress and per-layer metrics go.
    logger.remove()
    logger.add(sys.stderr, level="WARNING", filter=lambda record: record["level"].name != "METRIC")


def resident_mib() -> float:
    """Return the process's resident memory now, in MiB (Linux)."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


def peak_mib() -> float:
    """Return the process's highest resident memory so far, in MiB (Linux counts in KiB)."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10


def leave_unpinned() -> None:
    """Turn off page-locking of the cached activations where there is no accelerator to copy them to.

    Monkeypatch. `IntermediatesCache.pin_memory` calls `Tensor.pin_memory`, which raises on a machine without an
    accelerator. Page-locking only speeds up copies to a device, so skipping it changes no result. In 0.14.0.1 the one
    caller is AWQ, so Wanda and SparseGPT run without the patch too; it is kept for the versions where they do not.
    """
    if not torch.accelerator.is_available():
        IntermediatesCache.pin_memory = lambda *_args, **_keywords: None


def calibration_tokens(tokenizer, text: Path, count: int) -> list[int]:
    """Return the first `count` tokens of a text.

    Only a head of the text is tokenized, whole lines long, because the encoding of megabytes of text would outweigh a
    small model in the peak memory. 64 tokens beyond `count` keep the head's cut out of what is returned.
    """
    lines = text.read_text(encoding="utf-8").splitlines(keepends=True)
    characters, whole = 8 * count, sum(map(len, lines))
    while True:
        head, size = [], 0
        for line in lines:
            if size >= characters:
                break
            head.append(line)
            size += len(line)
        tokens = tokenizer("".join(head), add_special_tokens=False)["input_ids"]
        if len(tokens) >= count + 64 or (size == whole and len(tokens) >= count):
            return tokens[:count]
        if size == whole:
            sys.exit(f"{text}: {len(tokens)} tokens, but --samples x --length asks for {count}; give a longer text")
        characters *= 2


def block_linears(model: torch.nn.Module) -> dict[str, torch.nn.Linear]:
    """Return the linears inside the decoder blocks, without embeddings and output head."""
    return {name: module for name, module in model.model.layers.named_modules() if isinstance(module, torch.nn.Linear)}


def count_zeros(linears: dict[str, torch.nn.Linear], zeros: int, group: int) -> tuple[float, float | None]:
    """Return the fraction of zero weights, and that of the groups with fewer than `zeros` (None without a pattern)."""
    zero = weights = broken = groups = 0
    for linear in linears.values():
        is_zero = linear.weight == 0  # (out, in)
        zero += int(is_zero.sum())
        weights += is_zero.numel()
        if group:
            whole = is_zero[:, : is_zero.shape[1] // group * group]
            per_group = whole.reshape(-1, group).sum(dim=1)  # (out · in / group,)
            broken += int((per_group < zeros).sum())
            groups += per_group.numel()
    return zero / weights, broken / groups if group else None


def modifier_of(method: str, target: str):
    """Return the tool's modifier for a step."""
    if method in ("wanda", "sparsegpt"):
        zeros, _, group = target.partition(":")
        # The tool takes the fraction of zeros from the pattern; N:M fixes it.
        return {"wanda": WandaPruningModifier, "sparsegpt": SparseGPTModifier}[method](
            sparsity=int(zeros) / int(group) if group else float(target),
            mask_structure=target if group else "0:0",
            targets=["Linear"],
            ignore=["re:.*lm_head"],
        )
    weights = {"num_bits": int(target), "type": "int", "symmetric": True, "strategy": "group", "group_size": 128}
    groups = {"group_0": {"targets": ["Linear"], "weights": weights}}
    return {"rtn": QuantizationModifier, "gptq": GPTQModifier}[method](config_groups=groups, ignore=["re:.*lm_head"])


def main() -> None:
    """Compress, count, save, print."""
    import_rss = resident_mib()
    torch.set_num_threads(options.threads)
    leave_unpinned()

    tokenizer = AutoTokenizer.from_pretrained(options.model)
    tokens = calibration_tokens(tokenizer, options.text, options.samples * options.length)
    sequences = [tokens[i : i + options.length] for i in range(0, len(tokens), options.length)]
    dtype = options.dtype if options.dtype == "auto" else getattr(torch, options.dtype)
    model = AutoModelForCausalLM.from_pretrained(options.model, dtype=dtype).eval()

    dataset = Dataset.from_dict({"input_ids": sequences, "attention_mask": [[1] * options.length] * options.samples})

    start = time.perf_counter()
    for method, target in options.steps:
        oneshot(
            model=model,
            tokenizer=tokenizer,
            dataset=dataset,
            recipe=modifier_of(method, target),
            num_calibration_samples=options.samples,
            max_seq_length=options.length,
            shuffle_calibration_samples=False,
        )
    seconds = time.perf_counter() - start
    peak_rss = peak_mib()

    model.to(torch.float16)  # what is saved is what is counted
    zeros, broken = count_zeros(block_linears(model), options.zeros_per_group, options.group)
    model.save_pretrained(options.output, save_compressed=False)
    tokenizer.save_pretrained(options.output)
    # What is saved are the values of the codes: the evaluator takes it as a plain model.
    path = options.output / "config.json"
    config = json.loads(path.read_text())
    config.pop("quantization_config", None)
    path.write_text(json.dumps(config))

    line = {
        "tool": "llm-compressor",
        "version": llmcompressor.__version__,
        "steps": [":".join(step) for step in options.steps],
        "seconds": round(seconds, 3),
        "peak_rss_mib": round(peak_rss, 1),
        "peak_rss_with_save_mib": round(peak_mib(), 1),
        "import_rss_mib": round(import_rss, 1),
        "zeros": round(zeros, 6),
        "broken_groups": broken,
    }
    print(json.dumps(line), file=sys.__stdout__, flush=True)


if __name__ == "__main__":
    with contextlib.redirect_stdout(sys.stderr):
        main()
