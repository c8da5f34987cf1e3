"""Open a model directory that may be quantized: its codes appear as the plain weights that they stand for.

So whatever reads a dense model block by block, `compress eval` first of all, reads an emitted quantized one, too.
"""

from __future__ import annotations

import math
import re
from dataclasses import replace
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from compress.architecture import architecture_for
from compress.checkpoint import DTYPE_NAMES, Checkpoint, TensorInfo, read_json, read_tensor
from compress.errors import ModelError
from compress.export.adapter import CONFIG, WEIGHTS, Branches
from compress.export.adapter import FOLDER as ADAPTER
from compress.export.formats import PackedFormat, known_formats
from compress.hub import load_config

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor

    from compress.architecture import Architecture
    from compress.grid import GridSpec

SCALES = ("F16", "BF16", "F32")  # the dtypes that scales may have


def open_model(directory: Path, *, trust_remote_code: bool = False) -> tuple[Any, Checkpoint]:
    """Configuration and tensors of a dense or quantized model directory. Raises ModelError."""
    config = load_config(directory, trust_remote_code=trust_remote_code, quantized=True)
    quantization = read_json(directory / "config.json").get("quantization_config")
    architecture = architecture_for(config.model_type)
    checkpoint = Checkpoint(directory)
    if quantization:
        del config.quantization_config  # the skeleton is a plain model
        dtype = config.dtype if isinstance(config.dtype, torch.dtype) else None
        checkpoint = DecodedCheckpoint(directory, quantization, architecture, dtype)
    if any((directory / ADAPTER / name).is_file() for name in (CONFIG, WEIGHTS)):
        branches = Branches(directory / ADAPTER, transposed=bool(architecture.transposed))
        checkpoint = BranchedCheckpoint(checkpoint, branches, architecture)
    return config, checkpoint


class DecodedCheckpoint(Checkpoint):
    """A quantized checkpoint; `read` decodes what is stored as codes."""

    def __init__(
        self, directory: Path, config: dict[str, Any], architecture: Architecture, dtype: torch.dtype | None
    ) -> None:
        """Read and check every header, and put a weight in the place of each linear's tensors.

        Args:
            directory: of the model.
            config: its ``quantization_config``.
            architecture: says which linears are stored transposed.
            dtype: of the weights, where scales are stored in a smaller one.

        Raises:
            ModelError: the format is unknown, or tensors and configuration do not belong together.
        """
        super().__init__(directory)
        formats = {name: form for name, form in known_formats().items() if isinstance(form, PackedFormat)}
        method = config.get("quant_method")
        if not isinstance(method, str) or method not in formats:
            raise ModelError(
                f"the quantization method {method!r} is not read; those that are: {', '.join(formats)}",
                where=str(directory / "config.json"),
                fix="give an output of compress",
            )
        self.form = formats[method]
        self._coded: dict[str, _Coded] = {}
        if dtype is None:  # the configuration leaves it open: as what is not quantized
            plain = (info for name, info in self.tensors.items() if name.rpartition(".")[2] not in self.form.suffixes)
            dtype = next((info.torch_dtype for info in plain if info.torch_dtype.is_floating_point), None)
        marker = f".{self.form.marker}"
        for prefix in [name.removesuffix(marker) for name in self.tensors if name.endswith(marker)]:
            module = architecture.parameter_name(f"{prefix}.weight").removesuffix(".weight")
            transposed = module.endswith(tuple(f".{name}" for name in architecture.transposed))
            parts = {s: self.tensors.get(f"{prefix}.{s}") for s in self.form.suffixes}
            infos = {suffix: info for suffix, info in parts.items() if info is not None}
            try:
                spec = self.form.read_spec(config, module)
                out, width = self._shape(infos, spec)
                if f"{prefix}.weight" in self.tensors:
                    raise ValueError("there is a plain weight beside the codes")
            except (LookupError, TypeError, ValueError, AttributeError, ArithmeticError, re.error) as error:
                raise self._wrong(prefix, error) from None
            scale = infos[self.form.scales].torch_dtype
            for info in infos.values():
                del self.tensors[info.name]
            name, value = f"{prefix}.weight", torch.promote_types(scale, dtype) if dtype else scale
            shape = (width, out) if transposed else (out, width)
            self.tensors[name] = replace(infos[self.form.marker], name=name, dtype=DTYPE_NAMES[value], shape=shape)
            self._coded[name] = _Coded(infos, spec, transposed)

    def _shape(self, infos: dict[str, TensorInfo], spec: GridSpec) -> tuple[int, int]:
        """(out, in) of a linear, whose tensors must have the shapes that follow from it. Raises ValueError."""
        where = infos[self.form.shapes]
        shape = read_tensor(self.directory / where.file, where) if math.prod(where.shape) == 2 else None
        out, width = self.form.read_shape({suffix: info.shape for suffix, info in infos.items()}, shape)
        if spec.bits not in (2, 3, 4, 8) or spec.group_size < -1 or spec.group_size == 0 or width % spec.width(width):
            raise ValueError(
                f"there is no grid of {spec.bits} bits with groups of {spec.group_size} for {width} inputs"
            )
        parts = self.form.parts(out, width, spec)
        odd = sorted(infos.keys() ^ parts.keys())
        if odd:
            raise ValueError(f"{odd[0]} is {'surplus' if odd[0] in infos else 'missing'}")
        for suffix, (dtype, wanted) in parts.items():
            found = infos[suffix]
            if found.shape != wanted or found.dtype not in ((dtype,) if dtype else SCALES):
                raise ValueError(
                    f"{suffix} is {found.dtype} {list(found.shape)}, not {dtype or 'scales'} {list(wanted)}"
                )
        return out, width

    def read(self, name: str) -> Tensor:
        """One tensor; a weight that is stored as codes is decoded."""
        coded = self._coded.get(name)
        if coded is None:
            return super().read(name)
        parts = {suffix: read_tensor(self.directory / info.file, info) for suffix, info in coded.infos.items()}
        try:
            grid = self.form.decode(parts, coded.spec)
        except ValueError as error:
            raise self._wrong(name.removesuffix(".weight"), error) from None
        dtype = self.tensors[name].torch_dtype
        weight = grid.dequantize(dtype).to(dtype)
        return weight.T.contiguous() if coded.transposed else weight

    def _wrong(self, prefix: str, error: Exception) -> ModelError:
        return ModelError(
            f"{prefix}: tensors and quantization_config do not belong together: {error}",
            where=str(self.directory),
            fix="copy the directory again; formats are read as compress writes them",
        )


class BranchedCheckpoint(Checkpoint):
    """A checkpoint whose linears have low-rank branches: their weights are read as ``W + up · down``, in float32.

    The model computes the branch beside the weight; the sum is the same function up to float32 rounding.
    """

    def __init__(self, base: Checkpoint, branches: Branches, architecture: Architecture) -> None:
        """Put the branches of an adapter on a checkpoint. Raises ModelError when one has no linear."""
        self.base, self.branches, self.directory = base, branches, base.directory
        self.tensors, self.sizes = dict(base.tensors), base.sizes
        modules = {architecture.parameter_name(name).removesuffix(".weight"): name for name in base.tensors}
        self._branched: dict[str, tuple[str, bool]] = {}
        for module in branches.shapes:
            if module not in modules:
                raise ModelError(
                    f"the adapter has a branch for {module}, which the model lacks",
                    where=str(branches.directory),
                    fix="copy the whole output again",
                )
            name = modules[module]
            transposed = module.endswith(tuple(f".{linear}" for linear in architecture.transposed))
            shape = base.tensors[name].shape
            branches.check(module, shape[::-1] if transposed else shape)
            self._branched[name] = (module, transposed)
            self.tensors[name] = replace(base.tensors[name], dtype="F32")

    def read(self, name: str) -> Tensor:
        """One tensor; a weight with a branch is the sum of both."""
        weight = self.base.read(name)
        if name not in self._branched:
            return weight
        module, transposed = self._branched[name]
        product = self.branches.product(module)
        return weight.float() + (product.T if transposed else product)


class _Coded(NamedTuple):
    """How a linear is stored: its tensors by suffix, its grid, and whether the plain weight would be (in, out)."""

    infos: dict[str, TensorInfo]
    spec: GridSpec
    transposed: bool
