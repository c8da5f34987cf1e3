"""One block of the model at a time: the skeleton that stands in for the rest.

The skeleton is the model's own transformers class on the meta device, with its decoder blocks replaced by stubs. Run
once on a batch of the right shape, it hands each stub exactly the arguments that the real block would get (masks,
rotary embeddings, whatever the family has), so no list of keyword arguments is kept here. Rows are padded on the
right only: under causal attention no real token ever sees padding, so the arguments depend on the batch's shape alone.
"""

from __future__ import annotations

import hashlib
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from compress.checkpoint import Checkpoint, raw_bytes
from compress.errors import ModelError, RunError
from compress.hub import empty_model
from compress.model_files import read_json

if TYPE_CHECKING:
    from collections.abc import Iterator

    from compress.architecture import Architecture


class Call(NamedTuple):
    """The arguments of a decoder block after the hidden states."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]


class _Halted(Exception):
    """Ends a forward of the skeleton at its last stub."""


class _Stub(nn.Module):
    """Stands where a decoder block stood; other attributes (an attention type, say) are the real block's."""

    def __init__(self, block: nn.Module, skeleton: Skeleton, index: int) -> None:
        super().__init__()
        self.__dict__ |= {"block": block, "skeleton": skeleton, "index": index}

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.__dict__["block"], name)

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        skeleton: Skeleton = self.__dict__["skeleton"]
        return skeleton._arrive(self.__dict__["index"], hidden_states, args, kwargs)


class Skeleton:
    """The model without its blocks, and the map between the checkpoint's tensors and the module's parameters."""

    def __init__(
        self, checkpoint: Checkpoint, config: Any, architecture: Architecture, *, trust_remote_code: bool = False
    ) -> None:
        """Build the model on the meta device and match it with the checkpoint; no weight is read.

        Raises:
            ModelError: there is no such model, or a tensor is missing or has another shape than config.json says.
        """
        self.checkpoint, self.config, self.architecture = checkpoint, config, architecture
        self.config_json = read_json(checkpoint.directory / "config.json")  # as written; a sketch is soon gone
        self.model = empty_model(checkpoint, config, architecture, trust_remote_code=trust_remote_code)
        blocks = self.model.get_submodule(architecture.blocks)
        self.blocks: list[nn.Module] = list(blocks)
        self._match()
        for index, block in enumerate(self.blocks):
            blocks[index] = _Stub(block, self, index)
        self.replaced: dict[str, Tensor] = {}  # parameters outside blocks that have other values than the checkpoint's
        self._recorded: list[Call] = []
        self._first: Tensor | None = None
        self._inject: Tensor | None = None
        self._calls: dict[tuple[int, int], list[Call]] = {}
        self.device, self.dtype = torch.device("cpu"), torch.float32

    def _match(self) -> None:
        """Map every parameter to the stored tensor that fills it; what the model does not know is `extra`."""
        tensors = self.checkpoint.tensors
        self.shapes = {name: tuple(p.shape) for name, p in self.model.named_parameters(remove_duplicate=False)}
        self.shapes |= {n: tuple(b.shape) for n, b in self.model.named_buffers() if n in self.model.state_dict()}
        self.stored: dict[str, str] = {}
        self.extra: list[str] = []
        for stored in tensors:
            name = stored if stored in self.shapes else self.architecture.parameter_name(stored)
            if name in self.shapes:
                self.stored[name] = stored
            else:
                self.extra.append(stored)
        self.tied = bool(getattr(self.config, "tie_word_embeddings", False)) and self.architecture.tied is not None
        if self.tied:
            head, embedding = self.architecture.tied or ("", "")
            source = self.stored.get(embedding) or self.stored.get(head)
            if source:  # a file that holds both keeps both: transformers does not tie them when their values differ
                self.stored = {head: source, embedding: source} | self.stored
        where = str(self.checkpoint.directory)
        parameters = dict(self.model.named_parameters(remove_duplicate=False))
        missing = [name for name in parameters if name not in self.stored]
        if missing:
            raise ModelError(
                f"{len(missing)} tensors of the model are not in the checkpoint, {missing[0]} among them",
                where=where,
                fix="the checkpoint is incomplete, or config.json is of another model",
            )
        for name, stored in self.stored.items():
            if tensors[stored].shape != self.shapes[name]:
                raise ModelError(
                    f"{stored} is {list(tensors[stored].shape)}, but config.json makes it {list(self.shapes[name])}",
                    where=where,
                    fix="weights and config.json are of different models; copy both again",
                )
            if not tensors[stored].torch_dtype.is_floating_point and name in parameters:
                raise ModelError(
                    f"{stored} is stored as {tensors[stored].dtype}: the model is already quantized",
                    where=where,
                    fix="start from the original floating-point checkpoint",
                )

    # ----------------------------------------------------------------- names

    def prefix(self, index: int) -> str:
        """The module name of a block, with a dot: ``model.layers.3.``."""
        return f"{self.architecture.blocks}.{index}."

    def block_parameters(self, index: int) -> list[str]:
        """Full names of the parameters and stored buffers of one block."""
        return [name for name in self.stored if name.startswith(self.prefix(index))]

    @property
    def outside(self) -> list[str]:
        """Full names of the parameters that belong to no block."""
        return [name for name in self.stored if not name.startswith(f"{self.architecture.blocks}.")]

    @property
    def width(self) -> int:
        """The hidden size: features between blocks."""
        return int(getattr(self.config, self.architecture.hidden.size))

    @property
    def embedding(self) -> str:
        """Full name of the input embedding's weight."""
        module = self.model.get_input_embeddings()
        return next(f"{name}.weight" for name, m in self.model.named_modules() if m is module)

    @property
    def head(self) -> str:
        """Full name of the output head's weight."""
        return f"{self.architecture.head}.weight"

    # --------------------------------------------------------------- weights

    def to(self, device: torch.device, dtype: torch.dtype) -> Skeleton:
        """Choose where and in which dtype blocks compute, and load the small parts: norms and positions."""
        self.device, self.dtype = device, dtype
        for module_name, module in self.model.named_modules():
            if not isinstance(module, _Stub):
                self._make_buffers(module_name, module)
        self._load_small(self.outside)
        return self

    def replace(self, values: dict[str, Tensor]) -> None:
        """Have parameters outside blocks, by full name, other values than the checkpoint's, until the next call."""
        changed = [name for name in self.outside if name in self.replaced or name in values]
        self.replaced = values
        self._load_small(changed)

    def _load_small(self, names: list[str]) -> None:
        """Of parameters outside blocks, those that stay in memory."""
        for name in names:
            if name not in (self.embedding, self.head):
                self._load(name)

    def _make_buffers(self, module_name: str, module: nn.Module) -> None:
        """Buffers that no file stores, such as rotary frequencies, computed by the model's own initialization."""
        lacking = [name for name, buffer in module._buffers.items() if buffer is not None and buffer.is_meta]
        for name in lacking:
            module._buffers[name] = torch.empty_like(module.get_buffer(name), device=self.device)
        if lacking:
            self.model._init_weights(module)
        for name in lacking:
            full = f"{module_name}.{name}" if module_name else name
            if full in self.stored:
                module._buffers[name] = self.checkpoint.read(self.stored[full]).to(self.device)

    def _load(self, name: str, value: Tensor | None = None) -> None:
        """Fill one parameter, in the compute dtype, from `value` or the checkpoint."""
        parent, _, leaf = name.rpartition(".")
        module = self._module(parent)
        if leaf in module._parameters:
            value = self.replaced.get(name) if value is None else value
            tensor = self._checked(self.stored[name]) if value is None else value
            tensor = tensor.to(device=self.device, dtype=self.dtype)
            module._parameters[leaf] = nn.Parameter(tensor, requires_grad=False)

    def digest(self) -> str:
        """SHA-256 over all stored tensors, each read once. Raises RunError for NaN or infinity in a parameter."""
        digest = hashlib.sha256()
        for stored in sorted(self.checkpoint.tensors):
            digest.update(raw_bytes(self._checked(stored)))
        return digest.hexdigest()

    def _checked(self, stored: str) -> Tensor:
        tensor = self.checkpoint.read(stored)
        if stored not in self.extra and not bool(torch.isfinite(tensor).all()):
            raise RunError(
                f"{stored} holds NaN or infinity",
                where=str(self.checkpoint.directory),
                fix="repair or re-download the model; nothing was written",
            )
        return tensor

    def _module(self, name: str) -> nn.Module:
        """A submodule by full name; those of blocks are found behind their stubs."""
        if name.startswith(f"{self.architecture.blocks}."):
            index, _, rest = name.removeprefix(f"{self.architecture.blocks}.").partition(".")
            return self.blocks[int(index)].get_submodule(rest)
        module: nn.Module = self.model.get_submodule(name)
        return module

    def _unload(self, name: str) -> None:
        parent, _, leaf = name.rpartition(".")
        module = self._module(parent)
        if leaf in module._parameters:
            meta = torch.empty(self.shapes[name], device="meta")
            module._parameters[leaf] = nn.Parameter(meta, requires_grad=False)

    @contextmanager
    def loaded(self, *names: str) -> Iterator[None]:
        """Have some parameters in memory for a while."""
        try:
            for name in names:
                self._load(name)
            yield
        finally:
            for name in names:
                self._unload(name)

    @contextmanager
    def block(self, index: int, replaced: dict[str, Tensor] | None = None) -> Iterator[nn.Module]:
        """One decoder block with its weights, for a while.

        Args:
            index: which.
            replaced: values for some parameters (by full name), instead of the checkpoint's.
        """
        names = self.block_parameters(index)
        block = self.blocks[index]
        try:
            for module_name, module in block.named_modules():
                self._make_buffers(self.prefix(index) + module_name, module)
            for name in names:
                self._load(name, (replaced or {}).get(name))
            yield block
        finally:
            for name in names:
                self._unload(name)

    def expect(self, index: int) -> None:
        """Have the system read what a block will need, if there is such a block."""
        if index < len(self.blocks):
            self.checkpoint.expect(self.stored[name] for name in self.block_parameters(index))

    @contextmanager
    def dense_block(self, index: int) -> Iterator[nn.Module]:
        """One decoder block as the model came, for a while, whatever the block itself holds now."""
        block = self.blocks[index]
        held = dict(block.named_parameters())
        buffers = dict(block.named_buffers())
        try:
            with self.block(index) as dense:
                yield dense
        finally:
            for name, parameter in held.items():
                owner = block.get_submodule(name.rpartition(".")[0])
                owner._parameters[name.rpartition(".")[2]] = parameter
            for name, buffer in buffers.items():
                block.get_submodule(name.rpartition(".")[0])._buffers[name.rpartition(".")[2]] = buffer

    # -------------------------------------------------------------- forwards

    def _arrive(self, index: int, hidden: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        if self._inject is not None:
            return self._inject
        if index == 0:
            self._first = hidden
        self._recorded.append(Call(args, kwargs))
        if index == len(self.blocks) - 1:
            raise _Halted
        return hidden

    def _record(self, **inputs: Tensor) -> tuple[Tensor, list[Call]]:
        self._recorded = []
        with suppress(_Halted):
            self.model(**inputs, use_cache=False)
        recorded, self._recorded = self._recorded, []
        hidden, self._first = self._first, None
        assert hidden is not None
        return hidden, recorded

    def embed(self, ids: Tensor) -> Tensor:
        """The first block's input, (rows, length, hidden), of token ids (rows, length). Needs the embedding loaded."""
        hidden, _ = self._record(input_ids=ids.to(self.device))
        return hidden

    def calls(self, rows: int, length: int) -> list[Call]:
        """What each block is called with, after the hidden states, for a batch of this shape."""
        shape = (rows, length)
        if shape not in self._calls:
            _, self._calls[shape] = self._record(inputs_embeds=self._blank(rows, length))
        return self._calls[shape]

    def logits(self, hidden: Tensor) -> Tensor:
        """Logits (rows, length, vocabulary) of the last block's output (rows, length, hidden).

        Needs the head loaded.
        """
        self._inject = hidden.to(self.device, self.dtype)
        try:
            output = self.model(inputs_embeds=self._blank(*hidden.shape[:2]), use_cache=False)
        finally:
            self._inject = None
        logits: Tensor = output.logits
        return logits

    def _blank(self, rows: int, length: int) -> Tensor:
        width = self.model.get_input_embeddings().embedding_dim
        return torch.zeros(rows, length, width, device=self.device, dtype=self.dtype)
