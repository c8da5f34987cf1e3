"""Model families as data: where the blocks are, which linears share an input, which widths are coupled.

A family is one file in ``architectures/``, about 40 lines of TOML; no code knows a family by name. The names in it
are those of the loaded ``*ForCausalLM`` module. Everywhere a linear is thought of as ``(out_features, in_features)``:
its *rows* are outputs, its *columns* inputs, even where the file stores it the other way (``transposed``).
"""

from __future__ import annotations

import re
import tomllib
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from pydantic import Field, model_validator

from compress.errors import ModelError, nearest
from compress.settings import Settings

if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import Self

FOLDER = Path(__file__).parent / "architectures"
HETEROGENEOUS = "heterogeneous_"  # before the model type of models whose blocks have different widths


def _number(config: object, attribute: str) -> int:
    """The positive integer `attribute` of a model's configuration."""
    value = getattr(config, attribute, None)
    if not isinstance(value, int) or value < 1:
        raise ModelError(
            f'"{attribute}" is {value!r}; a positive integer is needed',
            where="config.json",
            fix=f'set "{attribute}" in the model\'s config.json',
        )
    return value


def is_heterogeneous(config: Any) -> bool:
    """Whether each block of a model has widths of its own, by its configuration (see `compress.heterogeneous`)."""
    return str(config.model_type).startswith(HETEROGENEOUS)


def of_block(config: Any, block: int) -> Any:
    """The configuration of one block."""
    return config.per_layer_config[block] if is_heterogeneous(config) else config


class Width(Settings):
    """One width inside a block: units that can move, or go, together without changing what the block computes.

    ``heads``: a unit is a whole attention head; with grouped queries, a KV head with all of its query heads, because
    they read the same keys. A head moves as a whole: RoPE pairs the channels inside it, and q_norm and k_norm
    (of size head_dim, one for all heads) are untouched. ``channels``: a unit is one channel of the MLP.
    """

    name: Literal["heads", "channels"]
    units: str  # the attribute of the configuration that counts the units
    unset: tuple[int, str] | None = None  # (factor, attribute): the count where `units` is None
    also: tuple[str, ...] = ()  # attributes that count something in proportion to the units, such as query heads
    unit_size: str | None = None  # attribute for the size of a head; None where that is hidden size / heads
    rows: dict[str, tuple[str | int, ...]]  # linear -> relative sizes of the segments concatenated in its output
    columns: tuple[str, ...]  # linears that read the units, evenly and in order

    def count(self, config: object) -> int:
        """How many units each block of the model has."""
        if self.unset and getattr(config, self.units, None) is None:
            factor, attribute = self.unset
            return factor * _number(config, attribute)
        return _number(config, self.units)

    def unit_rows(self, linear: str, units: int, out_features: int, config: object) -> torch.Tensor:
        """The output rows of `linear` that belong to each unit; its bias has the same ones.

        Returns int64 ``(units, out_features // units)``; together the entries are each row once. A linear of several
        segments (a fused qkv or gate_up) gives each unit its rows of the first segment, then of the second, ...
        """
        return torch.cat(self.unit_segments(linear, units, out_features, config), dim=1)

    def unit_segments(self, linear: str, units: int, out_features: int, config: object) -> list[torch.Tensor]:
        """`unit_rows` for each segment alone: int64 ``(units, rows per unit)``."""
        sizes = [size if isinstance(size, int) else _number(config, size) for size in self.rows[linear]]
        whole = self._divide(out_features, sum(sizes), linear)
        rows, start = [], 0
        for size in sizes:
            segment = size * whole
            rows.append(start + torch.arange(segment).view(units, self._divide(segment, units, linear)))
            start += segment
        return rows

    def unit_columns(self, units: int, in_features: int) -> torch.Tensor:
        """The input columns, of each linear in ``columns``, that belong to each unit.

        Returns int64 ``(units, in_features // units)``.
        """
        return torch.arange(in_features).view(units, self._divide(in_features, units, ", ".join(self.columns)))

    def _divide(self, features: int, parts: int, linear: str) -> int:
        if features % parts:
            raise ModelError(
                f"{features} features do not split evenly into {parts} parts ({self.name})",
                where=linear,
                fix="the weights do not match config.json; check that both are of the same model",
            )
        return features // parts


class Scaling(Settings):
    """Linears whose input can be scaled by channel, because what precedes them can take the inverse.

    ``by`` is a norm (``norm = true``: its weight, and its bias, multiply each channel) or a linear whose rows are the
    channels; the segment of its output in `width` that holds them, where it has several. Query heads that share a KV
    head read the same rows of the value projection: their columns share a scale.
    """

    inputs: tuple[str, ...]
    by: str
    norm: bool = False
    offset: float = 0.0  # the norm multiplies by weight + offset
    width: Literal["heads", "channels"] | None = None
    segment: int = 0
    only_if: dict[str, Any] = Field(default_factory=dict)  # attributes of the configuration that must have these values

    def applies(self, config: object) -> bool:
        """Whether a model of this configuration computes it so."""
        return all(getattr(config, name, None) == value for name, value in self.only_if.items())


class Hidden(Settings):
    """The width of the residual stream, which every block reads and writes; `Architecture.hidden_dims` applies it."""

    size: str = "hidden_size"
    also: tuple[str, ...] = ()  # attributes that may have the same value, and then are the same width
    rms: bool = False  # norms divide by the root mean square, so that their scale depends on the width
    scaled_embedding: bool = False  # the embedding is multiplied by the root of the width as it is read
    reads: tuple[str, ...]  # linears of a block whose columns are the stream
    writes: tuple[str, ...]  # linears of a block whose rows are
    vectors: tuple[str, ...]  # norms of a block, weight and bias of this size
    # Full parameter name -> its dimensions of this size. A parameter that the model lacks, or a dimension that has
    # another size (the embedding of opt-350m is narrower than its blocks), does not take part.
    outside: dict[str, tuple[int, ...]]


class Architecture(Settings):
    """One model family, as read from its file. Names of linears are relative to their block."""

    model_types: tuple[str, ...]  # the values of config.model_type served
    blocks: str  # the ModuleList of decoder blocks
    base_prefix: str  # what checkpoints of the bare base model leave out in front of names
    renamed: dict[str, str] = Field(default_factory=dict)  # prefix of a name in checkpoints -> prefix in the module
    subsets: tuple[tuple[str, ...], ...]  # linears that receive the identical input, in the order they run
    head: str
    transposed: tuple[str, ...] = ()  # linears stored as (in, out)
    tied: tuple[str, str] | None = None  # (head, input embedding): one tensor if config.tie_word_embeddings
    widths: tuple[Width, ...]
    scales: tuple[Scaling, ...] = ()
    hidden: Hidden

    @property
    def linears(self) -> tuple[str, ...]:
        """Every linear of a block, in the order in which the block runs them."""
        return tuple(linear for subset in self.subsets for linear in subset)

    def block_settings(self, kind: type[Any]) -> set[str]:
        """The settings in which blocks may differ, as config.json names them; `kind`: the configuration's class."""
        native = getattr(kind, "attribute_map", {})
        return {native.get(name, name) for width in self.widths for name in (width.units, *width.also)}

    @model_validator(mode="after")
    def _closed(self) -> Self:
        named = [*self.transposed, *self.hidden.reads, *self.hidden.writes]
        named += [linear for width in self.widths for linear in (*width.rows, *width.columns)]
        named += [linear for one in self.scales for linear in (*one.inputs, *(() if one.norm else (one.by,)))]
        if unknown := sorted(set(named) - set(self.linears)):
            raise ValueError(f"not in any subset: {', '.join(unknown)}")
        if len(set(self.linears)) < len(self.linears):
            raise ValueError("a linear is in two subsets")
        return self

    def parameter_name(self, stored: str) -> str:
        """The parameter's name in the module, for its name in a checkpoint: ``h.0.ln_1.bias`` of the hub's gpt2."""
        for old, new in self.renamed.items():
            if stored.startswith(old):
                return new + stored.removeprefix(old)
        return stored if stored.startswith((self.base_prefix, f"{self.head}.")) else self.base_prefix + stored

    def hidden_dims(self, parameter: str, shape: Sequence[int], config: object) -> tuple[int, ...]:
        """The dimensions of a parameter, as stored, that run along the residual stream; () for none.

        `parameter` is the full name in the module. A tied head and embedding are one tensor: handle it once.
        """
        if parameter in self.hidden.outside:
            size = _number(config, self.hidden.size)
            return tuple(dim for dim in self.hidden.outside[parameter] if shape[dim] == size)
        inside = re.fullmatch(rf"{re.escape(self.blocks)}\.\d+\.(.+)\.(weight|bias)", parameter)
        if inside is None:
            return ()
        module, kind = inside.groups()
        if module in self.hidden.vectors:
            return (0,)
        if kind == "bias":
            return (0,) if module in self.hidden.writes else ()
        rows, columns = (1, 0) if module in self.transposed else (0, 1)
        return (rows,) * (module in self.hidden.writes) + (columns,) * (module in self.hidden.reads)


@cache
def _families() -> dict[str, Architecture]:
    """Every model type that a file in ``architectures/`` serves."""
    families: dict[str, Architecture] = {}
    for path in sorted(FOLDER.glob("*.toml")):
        architecture = Architecture.model_validate(tomllib.loads(path.read_text(encoding="utf-8")))
        for model_type in architecture.model_types:
            if model_type in families:
                raise ModelError(f'"{model_type}" is served by two files', where=str(path), fix="remove it from one")
            families[model_type] = architecture
    return families


def known_model_types() -> list[str]:
    """The model types of all families."""
    return list(_families())


def architecture_for(model_type: str) -> Architecture:
    """The family of a model whose configuration says `model_type`; ModelError for an unknown one."""
    families = _families()
    model_type = model_type.removeprefix(HETEROGENEOUS)
    if model_type not in families:
        raise ModelError(
            f'unknown architecture "{model_type}"{nearest(model_type, families)}',
            where="config.json: model_type",
            fix=f"write compress/architectures/{model_type}.toml, about 40 lines of data: copy the nearest of the known"
            f" families ({', '.join(sorted(families))}) and change the names",
        )
    return families[model_type]
