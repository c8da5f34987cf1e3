"""What structured pruning leaves of a model: how many units, which ones, and the smaller checkpoint and config.json.

`Sizes` says how many: the lock knows them before a weight is read. `Kept` says which: the run finds them, and the
journal keeps them block by block. `CutTensors` cuts every tensor as it is written.
"""

from __future__ import annotations

import json
import re
import tempfile
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from compress.architecture import HETEROGENEOUS, is_heterogeneous, of_block
from compress.checkpoint import INDEX, Slot, index_text

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from torch import Tensor

    from compress.architecture import Architecture, Width
    from compress.checkpoint import Shard
    from compress.export.huggingface import FinalTensors
    from compress.lock import Linear, Lock
    from compress.stream import Skeleton

KEY = "per_layer_config"  # in config.json: transformers' name for what differs between blocks
PER_LAYER = ("layer_types",)  # lists in config.json with an entry for each block
UNITS = ("heads", "channels")  # what blocks may have different numbers of
Units = int | tuple[int, ...]  # of every block, or block by block where they differ


@dataclass(frozen=True)
class Sizes:
    """The widths of a model and its depth."""

    heads: Units  # attention heads; with grouped queries, KV heads with their query heads
    channels: Units  # of each MLP
    hidden: int  # of the residual stream
    blocks: int

    @classmethod
    def of(cls, architecture: Architecture, config: Any) -> Sizes:
        """Those of a model, by its configuration."""
        hidden, blocks = int(getattr(config, architecture.hidden.size)), int(config.num_hidden_layers)
        units: dict[str, Units] = {}
        for width in architecture.widths:
            if is_heterogeneous(config):
                units[width.name] = alike_or_not([width.count(of_block(config, block)) for block in range(blocks)])
            else:
                units[width.name] = width.count(config)
        return cls(units["heads"], units["channels"], hidden, blocks)

    @property
    def different(self) -> tuple[str, ...]:
        """The widths that differ between blocks."""
        return tuple(name for name in UNITS if not isinstance(getattr(self, name), int))

    @property
    def alike(self) -> bool:
        """Whether all blocks have the same widths."""
        return not self.different

    def at(self, name: str, block: int) -> int:
        """How many heads or channels a block has."""
        units: Units = getattr(self, name)
        return units if isinstance(units, int) else units[block]

    def total(self, name: str) -> int:
        """How many heads or channels all blocks have together."""
        return sum(self.at(name, block) for block in range(self.blocks))

    def shown(self) -> dict[str, Any]:
        """As JSON has it; of a width that differs between blocks what is known before the run: the total."""
        sizes = {name: getattr(self, name) for name in (*UNITS, "hidden", "blocks")}
        return {name: size if isinstance(size, int) else {"total": sum(size)} for name, size in sizes.items()}


def alike_or_not(units: Sequence[int]) -> Units:
    """One number where all blocks have the same."""
    return units[0] if len(set(units)) == 1 else tuple(units)


def head_size(architecture: Architecture, config: Any) -> int:
    """Features of one attention head."""
    width = width_named(architecture, "heads")
    given = getattr(config, width.unit_size, None) if width.unit_size else None
    return int(given or getattr(config, architecture.hidden.size) // config.num_attention_heads)


def width_named(architecture: Architecture, name: str) -> Width:
    """The width of a family's blocks by name."""
    return next(width for width in architecture.widths if width.name == name)


@dataclass
class Kept:
    """Which units are left; what is absent is left whole.

    Attributes:
        blocks: the blocks that stay, ascending.
        units: block → width → the units that stay, ascending, int64.
        hidden: the channels of the residual stream that stay, ascending, int64.
        gains: full name of a norm → what its output is multiplied by.
    """

    blocks: list[int]
    units: dict[int, dict[str, Tensor]] = field(default_factory=dict)
    hidden: Tensor | None = None
    gains: dict[str, float] = field(default_factory=dict)


def kept_keys(prefix: str, units: dict[str, Tensor]) -> dict[str, Tensor]:
    """Units that a block keeps, as the journal stores them."""
    return {f"{prefix}{name}:kept": index.to(torch.int64) for name, index in units.items()}


class Cutter:
    """Cuts the tensors of a model to what is left of it."""

    def __init__(self, skeleton: Skeleton, kept: Kept) -> None:
        """`skeleton`: of the model that is cut."""
        self.skeleton, self.kept = skeleton, kept
        self.architecture, self.config = skeleton.architecture, skeleton.config
        self._block = re.compile(rf"{re.escape(self.architecture.blocks)}\.(\d+)\.(.+)\.(weight|bias)")

    def __call__(self, name: str, tensor: Tensor) -> Tensor:
        """What is left of a parameter, by its full name in the module; as stored, and in the stored dtype."""
        for dim, index in self._indices(name, tuple(tensor.shape)):
            tensor = tensor.index_select(dim, index)
        return self._rescaled(name, tensor).contiguous()

    def _indices(self, name: str, shape: tuple[int, ...]) -> Iterator[tuple[int, Tensor]]:
        inside = self._block.fullmatch(name)
        if inside:
            block, module, kind = int(inside[1]), inside[2], inside[3]
            rows, columns = (1, 0) if module in self.architecture.transposed and kind == "weight" else (0, 1)
            for width in self.architecture.widths:
                units = self.kept.units.get(block, {}).get(width.name)
                if units is None:
                    continue
                count = width.count(self.config)
                if module in width.rows:
                    yield rows, width.unit_rows(module, count, shape[rows], self.config)[units].flatten().sort().values
                elif module in width.columns and kind == "weight":
                    yield columns, width.unit_columns(count, shape[columns])[units].flatten()
        if self.kept.hidden is not None:
            for dim in self.architecture.hidden_dims(name, shape, self.config):
                yield dim, self.kept.hidden

    def _rescaled(self, name: str, tensor: Tensor) -> Tensor:
        """Norms by their gains; an embedding that is multiplied by the root of a width by the root of the ratio."""
        gain, offset = self.kept.gains.get(name.rpartition(".")[0], 1.0), self._offset
        hidden, size = self.kept.hidden, self.architecture.hidden.size
        if hidden is not None and self.architecture.hidden.scaled_embedding:
            root = (getattr(self.config, size) / len(hidden)) ** 0.5
            tied = self.skeleton.tied  # the head then has the embedding's values, and the norm before it the inverse
            if name == self.skeleton.embedding or (tied and name == self.skeleton.head):
                gain, offset = root, 0.0
            elif tied and name == self._final_norm:
                gain /= root
        if gain == 1.0:
            return tensor
        return ((tensor.float() + offset) * gain - offset).to(tensor.dtype)

    @property
    def _offset(self) -> float:
        return next((one.offset for one in self.architecture.scales if one.norm), 0.0)

    @property
    def _final_norm(self) -> str:
        return final_norm(self.skeleton)


def final_norm(skeleton: Skeleton) -> str:
    """Full name of the weight of the norm in front of the head."""
    hidden = skeleton.architecture.hidden
    return next(name for name in skeleton.outside if hidden.outside.get(name) == (0,) and name.endswith("weight"))


class CutTensors:
    """The tensors of the smaller model, by the names that they will have in its files."""

    def __init__(self, whole: FinalTensors, kept: Kept) -> None:
        """`whole`: those of the model as the passes left it, in its full shapes."""
        self.whole, self.lock, self.left = whole, whole.lock, kept
        self._cut = Cutter(self.lock.skeleton, kept)
        self._names = {new: (name, stored) for name, stored, new in renamed(self.lock.skeleton, kept.blocks)}

    def config(self) -> dict[str, Any]:
        """config.json."""
        assert self.lock.left is not None
        return smaller_config(self.lock.skeleton, self.lock.left, self.left.blocks)

    def knows(self, name: str) -> bool:
        """Whether the model has a tensor of this name."""
        return name in self._names

    def mask(self, linear: Linear) -> Tensor | None:
        """There is none: structured pruning comes before masks."""
        return None

    def __getitem__(self, name: str) -> Tensor:
        found = self._names.get(name)
        if found is None:  # the model does not know it
            return self.whole[name]
        return self._cut(found[0], self.whole[found[1]])


def renamed(skeleton: Skeleton, blocks: list[int]) -> Iterator[tuple[str, str, str]]:
    """(full name, stored name, stored name in the smaller model) of what stays: blocks are numbered anew."""
    prefix = f"{skeleton.architecture.blocks}."
    places = {old: new for new, old in enumerate(blocks)}
    for name, stored in skeleton.stored.items():
        if not name.startswith(prefix):
            yield name, stored, stored
            continue
        number, _, rest = name.removeprefix(prefix).partition(".")
        if int(number) in places:
            head, _, _ = stored.rpartition(f"{number}.{rest}")
            yield name, stored, f"{head}{places[int(number)]}.{rest}"


def slots_after(skeleton: Skeleton, before: Sizes, after: Sizes, stored_order: list[str]) -> list[Slot]:
    """What the smaller model's files hold, in order."""
    hidden = torch.arange(after.hidden) if after.hidden < before.hidden else None
    blocks = list(range(after.blocks))
    units = {
        block: {name: torch.arange(n) for name in UNITS if (n := after.at(name, block)) < before.at(name, block)}
        for block in blocks
    }
    cut = Cutter(skeleton, Kept(blocks, units, hidden))
    new = {stored: (name, renamed) for name, stored, renamed in renamed(skeleton, blocks)}
    slots = []
    for stored in stored_order:
        info = skeleton.checkpoint.tensors[stored]
        if stored in new:
            name, renamed_to = new[stored]
            shape = tuple(cut(name, torch.empty(info.shape, device="meta")).shape)
            slots.append(Slot(renamed_to, info.dtype, shape))
        elif stored in skeleton.extra:
            slots.append(Slot(stored, info.dtype, info.shape))
    return slots


def config_values(architecture: Architecture, config: Any, before: Sizes, after: Sizes) -> dict[str, Any]:
    """The entries of config.json that other widths, the same in all blocks, and another depth change."""
    assert isinstance(before.heads, int)
    assert isinstance(after.heads, int)
    values: dict[str, Any] = {}
    heads, channels = width_named(architecture, "heads"), width_named(architecture, "channels")
    if (after.heads, after.hidden) != (before.heads, before.hidden):
        values[heads.units] = after.heads
        values |= {name: getattr(config, name) * after.heads // before.heads for name in heads.also}
        if heads.unit_size:
            values[heads.unit_size] = head_size(architecture, config)
    if after.channels != before.channels or channels.unset:
        values[channels.units] = after.channels
    if after.hidden != before.hidden:
        same = [name for name in architecture.hidden.also if getattr(config, name, None) == before.hidden]
        values |= dict.fromkeys((architecture.hidden.size, *same), after.hidden)
    if after.blocks != before.blocks:
        values["num_hidden_layers"] = after.blocks
    native = getattr(type(config), "attribute_map", {})
    return {native.get(name, name): value for name, value in values.items()}


def smaller_config(skeleton: Skeleton, after: Sizes, blocks: list[int]) -> dict[str, Any]:
    """config.json of the smaller model; `blocks`: the old ones that stay."""
    architecture, config = skeleton.architecture, skeleton.config
    before = Sizes.of(architecture, config)
    everywhere = replace(after, **{name: getattr(before, name) for name in after.different})
    raw = skeleton.config_json | config_values(architecture, config, before, everywhere)
    if not after.alike:
        raw = _per_layer(skeleton, raw, after)
    for name in PER_LAYER if after.blocks != before.blocks else ():
        values = getattr(config, name, None)
        if isinstance(values, (list, tuple)) and len(values) == before.blocks:
            raw[name] = [values[block] for block in blocks]
    return raw


def _per_layer(skeleton: Skeleton, raw: dict[str, Any], after: Sizes) -> dict[str, Any]:
    """`raw`, and for each block in what it differs: it may have another number of these units."""
    architecture, config = skeleton.architecture, skeleton.config
    before, own = Sizes.of(architecture, config), architecture.block_settings(type(config))
    layers, digits = {}, len(str(after.blocks - 1))  # as transformers writes them: they stand in order
    size = width_named(architecture, "heads").unit_size
    for block in range(after.blocks):
        mine = replace(before, **{name: after.at(name, block) for name in after.different})
        values = config_values(architecture, config, before, mine)
        if size in values:  # the size of a head does not follow from their number any more
            raw = raw | {size: values[size]}
        layers[str(block).zfill(digits)] = {n: v for n, v in values.items() if n in own and v != raw.get(n)}
    names = [f"Heterogeneous{name}" for name in raw.get("architectures") or []]
    model_type = {"model_type": HETEROGENEOUS + config.model_type, "architectures": names}
    return raw | model_type | {KEY: {block: values for block, values in layers.items() if values}}


def found_kept(lock: Lock, block_state: Callable[[int], dict[str, Tensor]]) -> Kept:
    """Which units a run has kept, from what the journal keeps of each block in the end."""
    assert lock.left is not None
    kept = Kept([])
    scores: list[Tensor] = []
    for block in range(lock.blocks):
        state, prefix = block_state(block), lock.skeleton.prefix(block)
        mine = {key.removeprefix(prefix).removesuffix(":kept"): state[key] for key in state if key.endswith(":kept")}
        stays = mine.pop("block", None)
        if stays is None or bool(stays):
            kept.blocks.append(block)
        if mine:
            kept.units[block] = mine
        if f"{prefix}hidden:score" in state:
            scores.append(state[f"{prefix}hidden:score"])
    if scores and lock.left.hidden < lock.sizes.hidden:
        kept.hidden = _hidden_kept(lock, torch.stack(scores).sum(0))
        for block in range(lock.blocks):
            prefix = lock.skeleton.prefix(block)
            for key, energy in block_state(block).items():
                if key.startswith(prefix) and key.endswith(":energy"):
                    # The norm divides by the root mean square of what is left: give its output the size it had.
                    share = float(energy[kept.hidden].sum() / energy.sum())
                    kept.gains[key.removesuffix(":energy")] = (share * len(energy) / len(kept.hidden)) ** 0.5
        last = f"{final_norm(lock.skeleton)}".removesuffix(".weight")
        if kept.gains:
            kept.gains[last] = list(kept.gains.values())[-1]
    return kept


def found_sizes(lock: Lock, block_state: Callable[[int], Mapping[str, Tensor]]) -> Sizes:
    """The sizes that a run has left, where only the run could tell how they differ between blocks."""
    assert lock.left is not None
    found: dict[str, Any] = {}
    for name in lock.left.different:
        keys = [f"{lock.skeleton.prefix(block)}{name}:kept" for block in range(lock.blocks)]
        found[name] = tuple(len(block_state(block)[key]) for block, key in enumerate(keys))
    return replace(lock.left, **found)


def _hidden_kept(lock: Lock, score: Tensor) -> Tensor:
    assert lock.left is not None
    return score.argsort(descending=True, stable=True)[: lock.left.hidden].sort().values


@contextmanager
def sketch(skeleton: Skeleton, after: Sizes, shards: tuple[Shard, ...]) -> Iterator[Path]:
    """A directory that has config.json and headers of a model still to be made, and no weights: its files are holes."""
    with tempfile.TemporaryDirectory(prefix="compress-check-") as held:
        directory = Path(held)
        config = smaller_config(skeleton, after, list(range(after.blocks)))
        (directory / "config.json").write_text(json.dumps(config), encoding="utf-8")
        index = index_text(list(shards))
        if index:
            (directory / INDEX).write_text(index, encoding="utf-8")
        for shard in shards:
            with (directory / shard.file).open("wb") as file:
                file.write(shard.header())
                file.truncate(shard.bytes)
        yield directory
