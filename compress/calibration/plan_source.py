"""The calibration set and the evaluation texts that a plan names."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from compress.calibration.self_generated import generate
from compress.calibration.sources import file_digest, is_file, texts
from compress.calibration.tokenizer import load_tokenizer
from compress.calibration.tokens import TokenSet, build
from compress.errors import ModelError, PlanError
from compress.export.adapter import CONFIG as ADAPTER_CONFIG
from compress.hub import reason

if TYPE_CHECKING:
    from compress.lock import Lock

SELF = "self"


def located(source: str, folder: Path) -> str:
    """A source as it can be opened: a file is looked for from `folder` on, a dataset's name stays."""
    path = folder / Path(source).expanduser()
    if path.is_dir():  # a dataset in a local directory
        return str(path)
    return str(path) if is_file(str(path)) and (path.exists() or is_file(source)) else source


def source_digest(lock: Lock) -> str:
    """What identifies the calibration data before it is read: a file's SHA-256, else the name of the source.

    Texts of their own that passes train on count, too.
    """
    settings = lock.plan.calibration
    if settings is None or not lock.calibrated:
        return "none"
    sources = [settings.source, *(text for one in lock.plan.passes if (text := one.text()))]
    places = [located(source, lock.plan.folder) for source in sources]
    digests = [
        file_digest(place) if source != SELF and is_file(place) else source
        for source, place in zip(sources, places, strict=True)
    ]
    return " ".join(digests)


def make_tokens(lock: Lock, device: torch.device, text: str | None = None) -> TokenSet:
    """The calibration set of the plan, or another `text` cut in the same way.

    Raises:
        PlanError: there is too little text, or the tokenizer is not the model's.
    """
    tokens = _tokens(lock, device, text)
    vocabulary = lock.skeleton.model.get_input_embeddings().num_embeddings
    if int(tokens.ids.max()) >= vocabulary:
        raise PlanError(
            f"the tokenizer makes token {int(tokens.ids.max())}, but the model has {vocabulary}",
            where=str(lock.directory),
            fix="tokenizer and model do not belong together; copy both again",
        )
    return tokens


def _tokens(lock: Lock, device: torch.device, text: str | None) -> TokenSet:
    settings = lock.plan.calibration
    assert settings is not None
    if text is not None:
        settings = settings.model_copy(update={"source": text, "name": None, "split": None, "column": None})
    tokenizer = load_tokenizer(lock.directory, trust_remote_code=lock.plan.model.trust_remote_code)
    if settings.source == SELF:
        return _sampled(lock, tokenizer, device)
    documents = texts(
        located(settings.source, lock.plan.folder),
        name=settings.name,
        split=settings.split,
        column=settings.column,
        default_split="train",
    )
    return build(settings, tokenizer, documents, lock.plan.source.where(("calibration",)))


def _sampled(lock: Lock, tokenizer: Any, device: torch.device) -> TokenSet:
    """Text sampled from the whole model, which is loaded for it and let go; the estimate counts that."""
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    settings = lock.plan.calibration
    assert settings is not None
    if (lock.directory / ADAPTER_CONFIG).exists():  # with peft, transformers would load the base that it names instead
        fix = "give the directory of a whole model, or another calibration source"
        raise ModelError(f"holds {ADAPTER_CONFIG}, an adapter of another model", where=str(lock.directory), fix=fix)
    logging.disable_progress_bar()
    try:
        model = AutoModelForCausalLM.from_pretrained(
            lock.directory,
            dtype=torch.float32 if device.type == "cpu" else "auto",
            trust_remote_code=lock.plan.model.trust_remote_code,
            local_files_only=True,
            use_safetensors=True,
        )
    except (OSError, ValueError, TypeError, AttributeError, LookupError) as error:
        problem = f"transformers cannot load it: {type(error).__name__}: {reason(error)}"
        fix = "correct config.json and generation_config.json, or give a text as the source"
        raise ModelError(problem, where=str(lock.directory), fix=fix) from None
    model = model.to(device)
    return generate(model, tokenizer, samples=settings.samples, length=settings.length, seed=settings.seed)
