"""Open a model directory that may be quantized: its codes appear as the plain weights that they stand for.

So whatever reads a dense model block by block, `compress eval` first of all, reads an emitted quantized one, too.
"""

from __future__ import annotations

import re
from dataclasses import replace
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from compress.architecture import architecture_for
from compress.checkpoint import DTYPE_NAMES, Checkpoint, TensorInfo, read_tensor
from compress.errors import ModelError
from compress.export.adapter import CONFIG, WEIGHTS, Branches
from compress.export.adapter import FOLDER as ADAPTER
from compress.export.formats import PackedFormat, Stored, known_formats
from compress.hub import load_config
from compress.kernels.pack import Layout
from compress.model_files import read_json

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor

    from compress.architecture import Architecture


def open_model(directory: Path, *, trust_remote_code: bool = False) -> tuple[Any, Checkpoint]:
    """Configuration and tensors of a dense or quantized model directory. Raises ModelError."""
    config = load_config(directory, trust_remote_code=trust_remote_code, quantized=True)
    quantization = read_json(directory / "config.json").get("quantization_config")
    architecture = architecture_for(config.model_type)
    checkpoint = Checkpoint(directory)
    if quantization:
        if not isinstance(quantization, dict):
            fix = "give an output of compress"
            raise ModelError('"quantization_config" is no object', where=str(directory / "config.json"), fix=fix)
        del config.quantization_config  # the skeleton is a plain model
        checkpoint = DecodedCheckpoint(directory, quantization, architecture)
    if any((directory / ADAPTER / name).is_file() for name in (CONFIG, WEIGHTS)):
        branches = Branches(directory / ADAPTER, transposed=bool(architecture.transposed))
        checkpoint = BranchedCheckpoint(checkpoint, branches, architecture)
    return config, checkpoint


class DecodedCheckpoint(Checkpoint):
    """A quantized checkpoint; `read` decodes what is stored as codes."""

    def __init__(self, directory: Path, config: dict[str, Any], architecture: Architecture) -> None:
        """Read and check every header, and put a weight in the place of each linear's tensors.

        Args:
            directory: of the model.
            config: its ``quantization_config``.
            architecture: says which linears are stored transposed.

        Raises:
            ModelError: the format is unknown, or tensors and configuration do not belong together.
        """
        super().__init__(directory)
        formats = {form.method: form for form in known_formats().values() if isinstance(form, PackedFormat)}
        method = config.get("quant_method")
        if not isinstance(method, str) or method not in formats:
            raise ModelError(
                f"the quantization method {method!r} is not read; those that are: {', '.join(formats)}",
                where=str(directory / "config.json"),
                fix="give an output of compress",
            )
        self.form = form = formats[method]
        try:
            wanted = form.modules(config)
        except (LookupError, TypeError, ValueError, AttributeError) as error:
            raise self._wrong("config.json", error) from None
        self.layouts: dict[str, Layout] = {}  # by module
        self._coded: dict[str, _Coded] = {}
        self._names: dict[str, str] = {}
        others = (info for name, info in self.tensors.items() if name.rpartition(".")[2] not in form.suffixes)
        plain = {info.torch_dtype for info in others if info.torch_dtype.is_floating_point}
        beside: dict[str, set[str]] = {}  # prefix → suffixes
        for prefix, _, suffix in (name.rpartition(".") for name in self.tensors):
            beside.setdefault(prefix, set()).add(suffix)
        for prefix in [prefix for prefix, found in beside.items() if found.intersection(form.markers)]:
            module = architecture.parameter_name(f"{prefix}.weight").removesuffix(".weight")
            transposed = module.endswith(tuple(f".{name}" for name in architecture.transposed))
            parts = {s: self.tensors.get(f"{prefix}.{s}") for s in (*form.suffixes, "weight")}
            infos = {suffix: info for suffix, info in parts.items() if info is not None}
            unknown = sorted(beside[prefix] - {*parts, "bias"})
            try:
                if unknown:
                    raise ValueError(f"{unknown[0]} is not read")
                found = form.stored(config, module, infos, plain, self._read)
            except (LookupError, TypeError, ValueError, AttributeError, ArithmeticError, re.error) as error:
                raise self._wrong(prefix, error) from None
            for info in infos.values():
                del self.tensors[info.name]
            name, value = f"{prefix}.weight", torch.float32 if found.branch else found.layout.dtype
            shape = (found.layout.out_features, found.layout.in_features)
            shape = shape[::-1] if transposed else shape
            first = next(iter(infos.values()))
            self.tensors[name] = replace(first, name=name, dtype=DTYPE_NAMES[value], shape=shape)
            self._coded[name] = _Coded(infos, found, transposed)
            self.layouts[module] = found.layout
            self._names[module] = name
        if absent := sorted(wanted - self.layouts.keys()):
            raise ModelError(
                f"quantization_config names {absent[0]}, but its packed tensors are missing",
                where=str(directory),
                fix="copy the whole directory again",
            )

    def _read(self, info: TensorInfo) -> Tensor:
        return read_tensor(self.directory / info.file, info)

    def read(self, name: str) -> Tensor:
        """One tensor; a weight that is stored as codes is decoded, and its branch added, in float32."""
        coded = self._coded.get(name)
        if coded is None:
            return super().read(name)
        parts = {suffix: self._read(info) for suffix, info in coded.infos.items()}
        try:
            weight = coded.stored.weight(parts)
            if coded.stored.branch:
                weight = weight.float() + coded.stored.branch(parts)
        except ValueError as error:
            raise self._wrong(name.removesuffix(".weight"), error) from None
        return weight.T.contiguous() if coded.transposed else weight

    def packed(self, module: str) -> dict[str, Tensor]:
        """The tensors of a linear's layout, by suffix."""
        name = self._names[module]
        coded = self._coded[name]
        try:
            return dict(coded.stored.packed({suffix: self._read(info) for suffix, info in coded.infos.items()}))
        except ValueError as error:
            raise self._wrong(name.removesuffix(".weight"), error) from None

    def _wrong(self, prefix: str, error: Exception) -> ModelError:
        said = f"there is no {error}" if isinstance(error, KeyError) else error
        return ModelError(
            f"{prefix}: tensors and quantization_config do not belong together: {said}",
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
        self.layouts = dict(base.layouts) if isinstance(base, DecodedCheckpoint) else {}
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
            self.layouts[module] = self._with_branch(module, base.tensors[name].torch_dtype)
            self.tensors[name] = replace(base.tensors[name], dtype="F32")

    def read(self, name: str) -> Tensor:
        """One tensor; a weight with a branch is the sum of both."""
        weight = self.base.read(name)
        if name not in self._branched:
            return weight
        module, transposed = self._branched[name]
        product = self.branches.product(module)
        return weight.float() + (product.T if transposed else product)

    def _with_branch(self, module: str, dtype: torch.dtype) -> Layout:
        """The layout of a linear with the branch of the adapter."""
        out, width = self.branches.shapes[module]
        layout = self.layouts.get(module, Layout(out, width, dtype))
        if layout.rank:
            raise ModelError(
                f"{module} has a branch among the weights and one in the adapter",
                where=str(self.branches.directory),
                fix="remove the folder; it is of another output",
            )
        return replace(layout, rank=self.branches.rank(module))

    def packed(self, module: str) -> dict[str, Tensor]:
        """The tensors of a linear's layout, by suffix."""
        names = {inner: (name, transposed) for name, (inner, transposed) in self._branched.items()}
        if isinstance(self.base, DecodedCheckpoint) and module in self.base.layouts:
            parts = self.base.packed(module)
        else:
            name, transposed = names[module]
            weight = self.base.read(name)
            parts = {"weight": weight.T.contiguous() if transposed else weight}
        if module in names:
            layout = self.layouts[module]
            up, down = self.branches.factors(module)
            parts |= {"low_rank_up": up.to(layout.dtype), "low_rank_down": down.to(layout.dtype)}
        return parts


class _Coded(NamedTuple):
    """A linear: its tensors by suffix, what they hold, and whether the plain weight would be (in, out)."""

    infos: dict[str, TensorInfo]
    stored: Stored
    transposed: bool
