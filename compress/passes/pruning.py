"""What passes that choose a mask have in common: how much they prune, and what of a model stays true after them."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar

from pydantic import Field, PlainSerializer, PlainValidator, WithJsonSchema, model_validator

from compress.passes.base import Invariant, LinearPass, SettingError
from compress.state import Pattern


def _pattern(value: Any) -> Pattern:
    if isinstance(value, Pattern):
        return value
    try:
        return Pattern.parse(str(value))
    except ValueError as error:
        raise SettingError(str(error), 'write N:M, such as pattern = "2:4"') from None


PatternSetting = Annotated[
    Pattern,
    PlainValidator(_pattern),
    PlainSerializer(str),
    WithJsonSchema({"type": "string", "pattern": "^[0-9]+:[0-9]+$"}),
]


class PruningPass(LinearPass):
    """Fields and rules common to passes that choose a mask: `sparsity` or `pattern`, exactly one of them.

    Attributes:
        amounts: the fields that say how much to prune, of which one is given.
    """

    amounts: ClassVar[tuple[str, ...]] = ("sparsity", "pattern")

    sparsity: float | None = Field(default=None, ge=0, lt=1, description="fraction of weights to prune, in [0, 1)")
    pattern: PatternSetting | None = Field(default=None, description='N:M, N weights kept of every M, as in "2:4"')

    establishes: ClassVar[frozenset[Invariant]] = frozenset({Invariant.MASK})
    preserves: ClassVar[frozenset[Invariant]] = frozenset(
        {Invariant.MASK, Invariant.PATTERN, Invariant.GRID, Invariant.SHAPES, Invariant.TIES}
    )

    @model_validator(mode="after")
    def _one_target(self) -> PruningPass:
        given = [name for name in self.amounts if getattr(self, name) is not None]
        if len(given) != 1:
            problem = f"{' and '.join(given)} exclude each other" if given else "neither sparsity nor pattern"
            raise SettingError(problem, 'give exactly one, such as sparsity = 0.5 or pattern = "2:4"')
        if self.pattern and "scope" in self.model_fields_set:
            raise SettingError("scope has no meaning with an N:M pattern: groups compete", "leave scope out")
        return self

    def _merge(self, given: dict[str, Any], overrides: dict[str, Any]) -> dict[str, Any]:
        if any(name in overrides for name in self.amounts):
            given = {key: value for key, value in given.items() if key not in self.amounts}
        return given | overrides

    def provides(self) -> frozenset[Invariant]:
        """A pattern too, when one is asked for."""
        return self.establishes | ({Invariant.PATTERN} if self.pattern else frozenset())

    def check_shape(self, out_features: int, in_features: int) -> None:
        """The group of a pattern must divide the input width."""
        if self.pattern and in_features % self.pattern.group:
            fits = [m for m in (2, 4, 8, 16, 32) if in_features % m == 0]
            problem = (
                f"pattern {self.pattern} needs an input width that {self.pattern.group} divides, not {in_features}"
            )
            raise SettingError(
                problem, f"choose M among {', '.join(map(str, fits)) or 'none'}, or except these linears"
            )
