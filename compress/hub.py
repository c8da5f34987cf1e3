"""Find a model: a local directory, or a hub id through huggingface_hub; and read its configuration with care."""

from __future__ import annotations

import copy
import hashlib
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compress.architecture import architecture_for
from compress.errors import ModelError, PlanError, nearest
from compress.model_files import check_directory, read_json

if TYPE_CHECKING:
    from compress.architecture import Architecture
    from compress.checkpoint import Checkpoint
    from compress.plan import Model

# Keys of config.json that have transformers make a list of this length as it reads them, and the longest that we let it
# make: the deepest public models have fewer than 200 blocks.
COUNTS = ("num_hidden_layers", "num_layers", "n_layer", "num_labels")
MAX_COUNT = 4096
# Keys that name an implementation, which transformers would fetch from the hub.
KERNELS = (
    "attn_implementation",
    "_attn_implementation",
    "experts_implementation",
    "_experts_implementation",
)


def find_model(model: Model, folder: Path, where: str) -> Path:
    """The local directory of a plan's model; a hub id is downloaded, or found in the hub's cache.

    Args:
        model: path or hub id.
        folder: what a relative path is relative to.
        where: names the setting in messages.

    Raises:
        PlanError: there is no such directory and the hub does not give it.
    """
    path = model.path
    try:
        local = folder / Path(path).expanduser()
        is_directory, is_file = local.is_dir(), local.is_file()
    except (OSError, RuntimeError) as error:  # a name that is too long, or the home of nobody
        fix = "give a directory or a hub id such as org/name"
        raise PlanError(f'"{path[:100]}" cannot be looked for: {reason(error)}', where=where, fix=fix) from None
    if is_directory:
        return local
    if is_file:
        raise PlanError(f'"{path}" is a file', where=where, fix="give the directory that holds config.json")
    if path.count("/") != 1 or path.startswith((".", "/", "~")):
        others = [p.name for p in local.parent.iterdir() if p.is_dir()] if local.parent.is_dir() else []
        hint = nearest(local.name, others)
        fix = "give a directory or a hub id such as org/name"
        raise PlanError(f'no directory "{local}"{hint}', where=where, fix=fix)
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    wanted = ["*.json", "*.safetensors", "tokenizer*", "*.model", "*.txt", "*.jinja", "LICENSE*"]
    if model.trust_remote_code:
        wanted.append("*.py")
    try:
        return Path(snapshot_download(path, revision=model.revision, allow_patterns=wanted))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        others = [p.name for p in local.parent.iterdir() if p.is_dir()] if local.parent.is_dir() else []
        hint = nearest(local.name, others)
        raise PlanError(
            f'"{path}" is neither a local directory{hint} nor a model the hub gives: {reason(error)}',
            where=where,
            fix="check the name, log in, or download the model and give its directory",
        ) from None


def load_config(directory: Path, *, trust_remote_code: bool, quantized: bool = False) -> Any:
    """The transformers configuration of a local model; `quantized`: it may be one already. Raises ModelError."""
    from transformers import AutoConfig
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    check_directory(directory)
    raw = read_json(directory / "config.json")
    where = str(directory / "config.json")
    model_type = raw.get("model_type")
    if not isinstance(model_type, str):
        raise ModelError('"model_type" is missing', where=where, fix="give a transformers model")
    if raw.get("quantization_config") and not quantized:
        raise ModelError("the model is already quantized", where=where, fix="start from the original checkpoint")
    if raw.get("auto_map") and model_type not in CONFIG_MAPPING and not trust_remote_code:
        raise ModelError(
            f'"{model_type}" is defined by Python code that comes with the model, which the plan does not permit',
            where=where,
            fix="read that code, then set trust_remote_code = true under [model]",
        )
    architecture_for(model_type)
    _check_values(raw, where)
    try:
        config = AutoConfig.from_pretrained(directory, trust_remote_code=trust_remote_code, local_files_only=True)
        config.return_dict = True  # else forwards return tuples
        return config
    except Exception as error:  # transformers raises many kinds for a wrong configuration
        raise ModelError(f"transformers refuses it: {reason(error)}", where=where, fix="correct config.json") from None


def _check_values(raw: dict[str, Any], where: str) -> None:
    """Refuse what would have transformers make huge lists, fail late or fetch native code, before it is read."""
    for key in COUNTS:
        value = raw.get(key)
        if isinstance(value, (int, float)) and value > MAX_COUNT:
            raise ModelError(
                f'"{key}" is {value}; at most {MAX_COUNT} are read', where=where, fix="correct config.json"
            )
    spread = raw.get("initializer_range")
    if isinstance(spread, (int, float)) and not 0 <= spread < math.inf:  # of weights that are drawn and then replaced
        problem = f'"initializer_range" is {spread}, no standard deviation'
        raise ModelError(problem, where=where, fix="correct config.json")
    for key in KERNELS:
        if raw.get(key) not in (None, "eager", "sdpa"):
            fix = f'remove "{key}"; compress computes with torch alone'
            raise ModelError(f'"{key}" asks for kernels of another package', where=where, fix=fix)


def empty_model(checkpoint: Checkpoint, config: Any, architecture: Architecture, *, trust_remote_code: bool) -> Any:
    """The transformers model of a configuration, without weights: all parameters on the meta device.

    Raises:
        ModelError: transformers cannot build it, or not with as many blocks as the checkpoint has.
    """
    import torch
    from transformers import AutoModelForCausalLM

    where = str(checkpoint.directory / "config.json")
    blocks, stored = getattr(config, "num_hidden_layers", None), len(checkpoint.tensors)
    needed = len(architecture.linears)
    if isinstance(blocks, int) and not 0 < blocks * needed <= stored:  # before a hostile number of blocks is built
        problem = f"{blocks} blocks do not match the {stored} stored tensors: a block has {needed} at least"
        fix = "weights and config.json are of different models; copy both again"
        raise ModelError(problem, where=where, fix=fix)
    try:
        with torch.device("meta"):
            # A copy: the constructor writes choices such as the attention implementation into its configuration.
            return AutoModelForCausalLM.from_config(
                copy.deepcopy(config), dtype=torch.float32, trust_remote_code=trust_remote_code
            ).eval()
    except Exception as error:  # transformers and torch raise many kinds for a wrong configuration
        problem = f"the model cannot be built from it: {type(error).__name__}: {reason(error)}"
        raise ModelError(problem, where=where, fix="correct config.json") from None


def reason(error: BaseException) -> str:
    """The first line of what an error of another package says."""
    text = str(error).strip()
    return text.splitlines()[0][:500] if text else type(error).__name__


def config_digest(directory: Path) -> str:
    """SHA-256 of config.json."""
    return hashlib.sha256((directory / "config.json").read_bytes()).hexdigest()
