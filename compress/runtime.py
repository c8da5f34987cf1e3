"""Load an emitted directory to run it: packed weights stay packed, and each linear gets the fastest kernel there is.

Whatever the format, linears that are stored as codes, as 2:4 or with a branch become `PackedLinear` modules: codes of
`gptq` and `compressed-tensors` are taken into the packed format first, branches of an adapter stay beside the weight.
All else is transformers' own. The model says which kernel each linear got, and why, in `model.compress_kernels`.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

import torch

from compress.architecture import architecture_for
from compress.errors import CompressError, ModelError, PlanError, nearest
from compress.export.packed import FLOATS, VERSION, read_scheme, write_scheme
from compress.export.reader import BranchedCheckpoint, DecodedCheckpoint, open_model
from compress.hub import find_model, reason
from compress.kernels.choose import Kernels, choose
from compress.plan import Model
from compress.stream import Skeleton

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

    from compress.architecture import Architecture
    from compress.checkpoint import Checkpoint
    from compress.kernels.pack import Layout

DEVICES = ("cpu", "cuda")


def load(
    directory: str | Path,
    *,
    device: str | torch.device = "auto",
    dtype: str | torch.dtype = "auto",
    kernels: Kernels = "auto",
    trust_remote_code: bool = False,
) -> PreTrainedModel:
    """The causal language model of a directory, in evaluation mode, without gradients.

    Args:
        directory: an output of compress in any of its formats, or any other model in safetensors; a hub id, too.
        device: where to run it; "auto" is CUDA where there is one.
        dtype: of activations and plain weights: float16, bfloat16 or float32; "auto" is the checkpoint's.
        kernels: "auto" takes the fastest of each linear for few rows; "both" keeps a plain weight beside it for many,
            where that is faster; "portable" takes no instruction of one vendor; "decoded" decodes all weights now, and
            "reference" in every call, which is slow and there to compare with.
        trust_remote_code: run Python code that comes with the model.

    Returns:
        a transformers model. `compress_kernels` of it has, for each packed linear, "kernel" and "why".

    Raises:
        PlanError: there is no such directory, device, dtype or choice of kernels.
        ModelError: files are missing or damaged, or tensors and configuration do not belong together.
    """
    from transformers import GenerationConfig

    folder, where = _find(directory, trust_remote_code), check_device(device, "compress.load")
    check_kernels(kernels)
    config, checkpoint = open_model(folder, trust_remote_code=trust_remote_code)
    chosen = _dtype(dtype, config, checkpoint, "compress.load")
    skeleton = Skeleton(checkpoint, config, architecture_for(config.model_type), trust_remote_code=trust_remote_code)
    layouts = _layouts(checkpoint)
    if layouts:
        schemes = [write_scheme(layout, [name]) for name, layout in layouts.items()]
        settings = {"kernels": kernels, "device": str(where)}
        config.quantization_config = {"quant_method": "compress", "version": VERSION, "schemes": schemes} | settings
    state = _tensors(checkpoint, skeleton)
    try:
        # Not the Auto class: it takes no tensors without a name to find them by.
        model = type(skeleton.model).from_pretrained(None, config=config, state_dict=state, dtype=chosen)
        model.config.name_or_path = str(folder)
        if (folder / "generation_config.json").is_file():
            model.generation_config = GenerationConfig.from_pretrained(folder, local_files_only=True)
    except CompressError:
        raise
    except Exception as error:  # transformers raises many kinds for a wrong configuration
        problem = f"transformers cannot load it: {type(error).__name__}: {reason(error)}"
        fix = "correct config.json and generation_config.json"
        raise ModelError(problem, where=str(folder), fix=fix) from None
    model.compress_kernels = getattr(model, "compress_kernels", {})
    loaded: PreTrainedModel = model.requires_grad_(False).to(where)
    return loaded


def explain(
    directory: str | Path, layer: str, *, device: str | torch.device = "auto", dtype: str | torch.dtype = "auto"
) -> dict[str, Any]:
    """How a linear of a directory is stored, which kernel `load` would give it, and why. Reads no weight.

    Raises:
        PlanError: there is no such directory, linear, device or dtype.
        ModelError: files are missing or damaged.
    """
    folder, where = _find(directory, trust_remote_code=False), check_device(device, "--device")
    config, checkpoint = open_model(folder)
    chosen = _dtype(dtype, config, checkpoint, "--dtype")
    layouts = _layouts(checkpoint)
    if layer not in layouts:
        raise _not_packed(layer, layouts, checkpoint, architecture_for(config.model_type), str(folder))
    choice = choose(layouts[layer], where, chosen)
    scheme = write_scheme(layouts[layer], [layer])
    stored = {key: scheme[key] for key in ("shape", "dtype", "sparsity", "grid", "rank")}
    run = {"device": str(where), "runs_in": str(chosen).removeprefix("torch.")}
    return {"name": layer, **stored, **run, "kernel": choice.kernel.name, "why": choice.why}


def _not_packed(
    layer: str, layouts: dict[str, Layout], checkpoint: Checkpoint, architecture: Architecture, where: str
) -> PlanError:
    """What is wrong with the name of a layer that no kernel is chosen for."""
    ends = ("lm_head.weight", *(f".{one}.weight" for one in architecture.linears))
    named = [*layouts, *(name.removesuffix(".weight") for name in checkpoint.tensors if name.endswith(ends))]
    if layer not in named:
        fix = f"layers are named like {named[0]}" if named else "give a model"
        return PlanError(f'no linear "{layer}"{nearest(layer, named)}', where=where, fix=fix)
    like = f"packed ones are named like {next(iter(layouts))}" if layouts else "the directory has no packed ones"
    return PlanError(
        f'"{layer}" is no packed linear: it has plain weights', where=where, fix=f"give a packed one; {like}"
    )


def check_device(device: str | torch.device, where: str) -> torch.device:
    """The device, "auto" resolved. Raises PlanError for one that is not there or that no kernel runs on."""
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        found = torch.device(device)
    except (RuntimeError, TypeError):
        raise PlanError(f'there is no device "{device}"', where=where, fix='"cpu", "cuda" or "auto"') from None
    if found.type not in DEVICES:
        raise PlanError(f"packed weights do not run on {found.type}", where=where, fix=f"one of {', '.join(DEVICES)}")
    if found.type == "cuda" and (found.index or 0) >= torch.cuda.device_count():
        raise PlanError(f"torch sees no device {found}", where=where, fix='device = "cpu", or install torch for CUDA')
    return found


def check_dtype(dtype: str | torch.dtype, where: str) -> torch.dtype:
    """The dtype. Raises PlanError for one that no kernel takes."""
    found = FLOATS.get(dtype.removeprefix("torch.")) if isinstance(dtype, str) else dtype
    if found not in FLOATS.values():
        raise PlanError(f"there are no kernels for {dtype}", where=where, fix=f"dtype: one of {', '.join(FLOATS)}")
    assert found is not None
    return found


def check_kernels(kernels: str) -> None:
    """Raises PlanError for an unknown choice."""
    if kernels not in get_args(Kernels):
        known = ", ".join(f'"{one}"' for one in get_args(Kernels))
        raise PlanError(f'there are no kernels "{kernels}"', where="compress.load", fix=f"kernels: one of {known}")


def packed_layouts(config: dict[str, Any], model_type: str, directory: Path | None) -> dict[str, Layout]:
    """Module → layout, by a ``quantization_config`` of the packed format.

    Args:
        config: it.
        model_type: of the model.
        directory: whose tensors must be of these layouts; None where they are known to be.

    Raises:
        ModelError: they are not.
    """
    if directory is not None:
        return DecodedCheckpoint(directory, config, architecture_for(model_type)).layouts
    return {name: read_scheme(scheme) for scheme in config["schemes"] for name in scheme["modules"]}


def _find(directory: str | Path, trust_remote_code: bool) -> Path:
    if not str(directory):
        raise PlanError("no directory is given", where="compress.load", fix="give a directory or a hub id")
    model = Model(path=str(directory), trust_remote_code=trust_remote_code)
    return find_model(model, Path(), "compress.load")


def _dtype(dtype: str | torch.dtype, config: Any, checkpoint: Checkpoint, where: str) -> torch.dtype:
    """`dtype`, which was given there, or that of the checkpoint."""
    if dtype != "auto":
        return check_dtype(dtype, where)
    if isinstance(config.dtype, torch.dtype):
        return check_dtype(config.dtype, "config.json")
    floats = (info.torch_dtype for info in checkpoint.tensors.values() if info.torch_dtype.is_floating_point)
    return check_dtype(next(floats, torch.float32), str(checkpoint.directory))


def _layouts(checkpoint: Checkpoint) -> dict[str, Layout]:
    return checkpoint.layouts if isinstance(checkpoint, (DecodedCheckpoint, BranchedCheckpoint)) else {}


def _tensors(checkpoint: Checkpoint, skeleton: Skeleton) -> dict[str, Tensor]:
    """All tensors by their names in the model; those of packed linears as their layouts have them."""
    layouts = _layouts(checkpoint)
    state: dict[str, Tensor] = {}
    names = {stored: name for name, stored in skeleton.stored.items()}  # of a tied tensor that of the embedding
    for stored, name in names.items():
        module = name.rpartition(".")[0]
        if name == f"{module}.weight" and module in layouts:
            assert isinstance(checkpoint, (DecodedCheckpoint, BranchedCheckpoint))
            state |= {f"{module}.{suffix}": part for suffix, part in checkpoint.packed(module).items()}
        else:
            state[name] = checkpoint.read(stored)
    # By name alone, for transformers to report: it knows what older checkpoints have and nobody needs.
    return state | {name: torch.empty(checkpoint.tensors[name].shape, device="meta") for name in skeleton.extra}
