"""What a pass is: one frozen object whose fields are the TOML keys, and two class variables that the lock checks.

A *local* pass (`LinearPass`) is fused into sweeps over decoder blocks; it sees one linear and the moments of its
input, and may only change the `LinearState`. The rules of composition are data: what a pass establishes, requires
and preserves. `compress.rules` refuses an order that breaks them.
"""

from __future__ import annotations

import fnmatch
from abc import abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from enum import StrEnum
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Self

from pydantic import (
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    model_validator,
)

from compress.calibration.moments import Moments, Statistics
from compress.errors import SettingError as SettingError
from compress.errors import nearest
from compress.settings import Settings, wrong_shape
from compress.state import LinearState

if TYPE_CHECKING:
    import torch

    from compress.architecture import Architecture
    from compress.barrier import WholeModel
    from compress.grid import GridSpec
    from compress.lock import Lock
    from compress.reconstruct import BlockForward

__all__ = [
    "BlockPass",
    "BlockState",
    "Invariant",
    "LinearPass",
    "LinearState",
    "Moments",
    "Note",
    "Pass",
    "Statistics",
    "Survey",
    "Where",
]


class Invariant(StrEnum):
    """What a model may promise from some pass on (DESIGN section 6)."""

    MASK = "mask"  # pruned entries are exactly 0 and stay pruned
    PATTERN = "pattern"  # at most N of every M
    GRID = "grid"  # every weight is a code of its grid
    LOW_RANK = "low-rank branch"  # what the weight lacks is in a branch beside it
    SHAPES = "shapes"  # the widths of the model are final
    TIES = "ties"  # tied parameters are equal
    FUNCTION = "function"  # the outputs have not changed


def _patterns(value: Any) -> Any:
    return (value,) if isinstance(value, str) else value


Patterns = Annotated[tuple[str, ...], BeforeValidator(_patterns)]


class Where(Settings):
    """Other settings for the linears that `match` (glob patterns on full names); the last match wins."""

    model_config = ConfigDict(frozen=True, extra="allow")

    match: Patterns

    def overrides(self) -> dict[str, Any]:
        """The settings this table gives."""
        return dict(self.model_extra or {})


Note = dict[str, Any]
"""What a pass has to say of one linear: keys of the ledger line, such as ``damping`` or ``dead_columns``."""

Survey = Callable[[], Iterator[LinearState]]
"""Reads every targeted linear of the model once, in model order, one at a time."""


class Pass(Settings):
    """The base of every pass. Subclasses add fields (the TOML keys) and declare how they compose."""

    match: Patterns = Field(default=("*",), description="glob patterns of the linears to work on")
    except_: Patterns = Field(default=(), alias="except", description="glob patterns of the linears to leave alone")
    where: tuple[Where, ...] = Field(default=(), description="other settings for some linears")

    rule: ClassVar[int] = 3  # the composition rule of DESIGN section 6 that places this pass
    establishes: ClassVar[frozenset[Invariant]] = frozenset()
    requires: ClassVar[frozenset[Invariant]] = frozenset()
    preserves: ClassVar[frozenset[Invariant]] = frozenset()

    @model_validator(mode="after")
    def _overrides_are_valid(self) -> Pass:
        known = sorted(set(type(self).model_fields) - set(Pass.model_fields))
        for index, table in enumerate(self.where):
            for key in table.overrides():
                if key not in known:
                    problem = f'unknown key "{key}"{nearest(key, known)}'
                    raise SettingError(problem, f"the settings are {', '.join(known)}", ("where", index, key))
            try:
                self.with_settings(table.overrides())
            except ValidationError as error:  # the location is that of the table, not of the pass
                first = error.errors()[0]
                cause = first.get("ctx", {}).get("error")
                name = str(first["loc"][-1]) if first["loc"] else ""
                field = type(self).model_fields.get(name)
                fix = f"{name} is {field.description}" if field and field.description else "correct the value"
                fix = cause.fix if isinstance(cause, SettingError) else fix
                problem = str(cause) if cause else f"{first['msg']}, not {first['input']!r}"
                shape = wrong_shape(first["type"], first["input"], field.annotation, name) if field else None
                problem, fix = (shape[0], shape[1] or fix) if shape else (problem, fix)
                raise SettingError(problem, fix, ("where", index, *first["loc"])) from None
        return self

    def with_settings(self, overrides: dict[str, Any]) -> Self:
        """The bare pass, without match, except and where, with some settings replaced."""
        given = {name: getattr(self, name) for name in self.model_fields_set if name not in Pass.model_fields}
        return type(self)(**self._merge(given, overrides))

    def _merge(self, given: dict[str, Any], overrides: dict[str, Any]) -> dict[str, Any]:
        """Settings with overrides; a pass whose settings exclude each other drops the one that was replaced."""
        return given | overrides

    @classmethod
    def use(cls) -> str:
        """The name a plan calls this pass by: its file's name here, ``module:Class`` elsewhere."""
        package, _, module = cls.__module__.rpartition(".")
        return module if package == "compress.passes" else f"{cls.__module__}:{cls.__qualname__}"

    def targets(self, name: str) -> bool:
        """Whether the pass works on the linear of this full name."""
        return matches(name, self.match) and not matches(name, self.except_)

    def for_linear(self, name: str) -> Self:
        """The pass with the settings it has for this linear: its own, then every matching ``where`` in order."""
        one = self.with_settings({})
        for table in self.where:
            if matches(name, table.match):
                one = one.with_settings(table.overrides())
        return one

    def settings(self) -> dict[str, Any]:
        """The method's own settings, defaults included, as JSON values."""
        return self.model_dump(mode="json", exclude=set(Pass.model_fields))

    def provides(self) -> frozenset[Invariant]:
        """What this configured pass establishes; at least the class's `establishes`."""
        return self.establishes

    def grid(self) -> GridSpec | None:
        """The grid on which this configured pass puts a linear; None when it leaves the weight as free as it was."""
        return None

    def barrier(self) -> bool:
        """Whether the pass needs the whole model in memory, and so stands between sweeps."""
        return False

    def breaks(self) -> frozenset[Invariant]:
        """What this configured pass breaks although passes of its class may preserve it."""
        return frozenset()

    def learns(self) -> bool:
        """Whether the pass trains on the calibration set."""
        return False

    def text(self) -> str | None:
        """A text file of its own that the pass trains on instead; None for the calibration set."""
        return None

    def solving_bytes(self, out_features: int, in_features: int) -> int:
        """Bytes beyond what most passes hold while a linear is solved, such as matrices in float64."""
        return 0

    def needs_fisher(self) -> bool:
        """Whether the pass wants the diagonal Fisher information of the dense model, as `linear.fisher`."""
        return False

    def added_rank(self) -> int | None:
        """The rank of the branch that this configured pass gives a linear, at most; None when it gives none."""
        return None

    def check_shape(self, out_features: int, in_features: int) -> None:
        """Raise SettingError when the settings cannot apply to a linear of this shape. Called by the lock."""

    def check_lock(self, lock: Lock, index: int) -> None:
        """Raise SettingError when the settings fit neither model nor calibration set. Called by the lock.

        Args:
            lock: all but these checks is done.
            index: of this pass in the plan.
        """


class LinearPass(Pass):
    """A pass over one linear at a time. Consecutive ones share a sweep, its activations and its moments."""

    statistics: ClassVar[Statistics] = Statistics.NONE

    def needed(self) -> Statistics:
        """The statistics that this configured pass needs."""
        return self.statistics

    def surveys(self) -> bool:
        """Whether the pass must see the whole model before it works on the first linear; begins a new sweep."""
        return False

    def survey(self, linears: Survey) -> dict[str, dict[str, Any]]:
        """Settings that only a look at the whole model can give, by linear name. Called once, before the sweep."""
        raise TypeError(f"{type(self).__name__} declares surveys() but has no survey()")

    @abstractmethod
    def apply(self, linear: LinearState, moments: Moments) -> Note:
        """Compress one linear in place.

        Args:
            linear: the layer; `weight` is float32 and may be replaced, `mask` may only lose bits.
            moments: the statistics of its input that the pass declared.

        Returns:
            entries for the ledger line, often empty.
        """


@dataclass
class BlockState:
    """One decoder block, as a block pass sees it; names are those within the block.

    A pass changes the states of `linears`, replaces `parameters` (norms and biases, float32) by new tensors, and
    `moments` where it changed what a linear reads. What structured pruning finds goes into `found`, by the keys of
    `compress.structure`.
    """

    architecture: Architecture
    config: Any
    linears: dict[str, LinearState]
    moments: dict[str, Moments]
    parameters: dict[str, torch.Tensor]
    followers: dict[str, Pass | None]  # the pass that will quantize the linear
    forward: BlockForward | None = None  # runs the block, for a pass that learns
    spread: dict[str, int] | None = None  # how many units it keeps, once a sweep has scored those of all blocks
    found: dict[str, torch.Tensor] = field(default_factory=dict)


class BlockPass(Pass):
    """A pass over one block at a time; it begins a sweep, whose later passes see the block as it left it."""

    statistics: ClassVar[Statistics] = Statistics.NONE

    def needed(self) -> Statistics:
        """The statistics that this configured pass needs of each linear's input."""
        return self.statistics

    def needed_of(self, linear: str, architecture: Architecture, config: Any) -> Statistics:
        """The statistics that it needs of the input of one linear that it takes, by its name in the block."""
        return self.needed()

    def scores(self) -> bool:
        """Whether it walks over the blocks twice: first it only scores units, into ``found["channels:score"]``.

        What all blocks are to keep together is spread by these scores (`compress.spread`), and `BlockState.spread` says
        so the second time.
        """
        return False

    def takes(self, architecture: Architecture, config: Any, targets: list[str], quantized: set[str]) -> list[str]:
        """Which linears of a block it works on, by names in the block. Raises SettingError.

        Args:
            architecture: the model's family.
            config: the model's configuration.
            targets: the linears that `match` and `except` leave.
            quantized: the linears that a later pass rounds to a grid of given settings.
        """
        return targets

    @abstractmethod
    def apply(self, block: BlockState) -> dict[str, Note]:
        """Change the block in place; returns entries for the ledger lines of its linears."""


class ModelPass(Pass):
    """A pass over the whole model, which is in memory for it: a barrier between sweeps."""

    def barrier(self) -> bool:
        """It is one."""
        return True

    @abstractmethod
    def apply_model(self, model: WholeModel) -> dict[str, Note]:
        """Change the model in place; returns entries for the ledger lines of its linears."""


def matches(name: str, patterns: tuple[str, ...]) -> bool:
    """Whether any glob matches the full name (``*`` crosses dots, case counts)."""
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)
