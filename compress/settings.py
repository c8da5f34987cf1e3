"""The base of every object that is also a TOML table: frozen, closed world."""

from __future__ import annotations

from typing import Any, get_args

from pydantic import BaseModel, ConfigDict, ValidationInfo, field_validator


class Settings(BaseModel):
    """A frozen table of settings. The TOML keys are the constructor's arguments; an unknown key is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid", populate_by_name=True, allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _says_what_it_means(cls, value: Any, info: ValidationInfo) -> Any:
        """TOML has types: true is no number, "2" is no number, 2.0 is no whole number, "yes" is no truth value."""
        kinds = _kinds(cls.model_fields[info.field_name].annotation) if info.field_name in cls.model_fields else set()
        wanted = kinds & {bool, int, float}
        given = type(value)
        whole = given is int and float in kinds
        if given in (bool, str, int, float) and wanted and given not in kinds and not whole:
            names = {bool: "true or false", int: "a whole number", float: "a number"}
            raise ValueError(f"must be {' or '.join(names[kind] for kind in (bool, int, float) if kind in wanted)}")
        return value


def _kinds(annotation: Any) -> set[Any]:
    """The plain types that an annotation is made of."""
    inner = get_args(annotation)
    return set().union(*map(_kinds, inner)) if inner else {annotation}
