"""Find a model: a local directory, or a hub id through huggingface_hub; and read its configuration with care."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compress.architecture import architecture_for
from compress.checkpoint import read_json
from compress.errors import ModelError, PlanError, nearest

if TYPE_CHECKING:
    from compress.plan import Model


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
    local = folder / Path(path).expanduser()
    if local.is_dir():
        return local
    if local.is_file():
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
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        others = [p.name for p in local.parent.iterdir() if p.is_dir()] if local.parent.is_dir() else []
        hint = nearest(local.name, others)
        raise PlanError(
            f'"{path}" is neither a local directory{hint} nor a model the hub gives: {reason}',
            where=where,
            fix="check the name, log in, or download the model and give its directory",
        ) from None


def load_config(directory: Path, *, trust_remote_code: bool, quantized: bool = False) -> Any:
    """The transformers configuration of a local model; `quantized`: it may be one already. Raises ModelError."""
    from transformers import AutoConfig
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

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
    try:
        return AutoConfig.from_pretrained(directory, trust_remote_code=trust_remote_code, local_files_only=True)
    except Exception as error:  # transformers raises many kinds for a wrong configuration
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ModelError(f"transformers refuses it: {reason}", where=where, fix="correct config.json") from None


def config_digest(directory: Path) -> str:
    """SHA-256 of config.json."""
    return hashlib.sha256((directory / "config.json").read_bytes()).hexdigest()
