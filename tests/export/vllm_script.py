"""Load model directories in vLLM and print what it computes; test_vllm.py runs it with the Python of vLLM.

Standard input: ``{"models": [[directory, dtype], ...], "prompts": [[token, ...], ...]}``. The last line of standard
output: ``{directory: {"logprobs": [[...], ...], "written": [[token, ...], ...]}}``, where ``logprobs`` are those of
each prompt's tokens from the second on, and ``written`` 8 greedy tokens after it; or ``{directory: {"error": "..."}}``.
"""

from __future__ import annotations

import gc
import json
import sys
from typing import Any

from vllm import LLM, SamplingParams
from vllm.distributed import cleanup_dist_env_and_memory


def compute(directory: str, dtype: str, prompts: list[list[int]]) -> dict[str, Any]:
    model = LLM(model=directory, dtype=dtype, enforce_eager=True, max_model_len=256, seed=0)
    settings = SamplingParams(max_tokens=8, temperature=0, prompt_logprobs=0, ignore_eos=True)
    found = model.generate([{"prompt_token_ids": prompt} for prompt in prompts], settings, use_tqdm=False)
    logprobs = [
        [entry[token].logprob for token, entry in zip(one.prompt_token_ids[1:], one.prompt_logprobs[1:], strict=True)]
        for one in found
    ]
    return {"logprobs": logprobs, "written": [list(one.outputs[0].token_ids) for one in found]}


def main() -> None:
    task = json.load(sys.stdin)
    results: dict[str, Any] = {}
    for directory, dtype in task["models"]:
        try:
            results[directory] = compute(directory, dtype, task["prompts"])
        except Exception as error:  # whatever vLLM raises is the result
            results[directory] = {"error": f"{type(error).__name__}: {error}"}
        gc.collect()
        cleanup_dist_env_and_memory()
    print(json.dumps(results))


if __name__ == "__main__":
    main()
