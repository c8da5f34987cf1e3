"""The base of every object that is also a TOML table: frozen, closed world."""

from __future__ import annotations

import json
from typing import Any, get_args, get_origin

from pydantic import BaseModel, ByteSize, ConfigDict, ValidationInfo, field_validator


class Settings(BaseModel):
    """A frozen table of settings. The TOML keys are the constructor's arguments; an unknown key is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid", populate_by_name=True, allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _says_what_it_means(cls, value: Any, info: ValidationInfo) -> Any:
        """TOML has types: true is no number, "2" is no number, 2.0 is no whole number, "yes" is no truth value."""
        kinds = _kinds(cls.model_fields[info.field_name].annotation) if info.field_name in cls.model_fields else set()
        names = {bool: "true or false", int: "a whole number", float: "a number", ByteSize: "a number of bytes"}
        wanted = [kind for kind in names if kind in kinds]
        given = type(value)
        spelled = (given is int and float in kinds) or (given in (int, str) and ByteSize in kinds)
        if given in (bool, str, int, float) and wanted and given not in kinds and not spelled:
            raise ValueError(f"must be {' or '.join(names[kind] for kind in wanted)}")
        return value


def wrong_shape(kind: str, given: Any, annotation: Any, place: str) -> tuple[str, str | None] | None:
    """Problem and fix of a value or table where a list belongs, or the other way round; None for other errors.

    Args:
        kind: pydantic's type of the error.
        given: the value.
        annotation: of its field.
        place: the dotted name of the table or the key.
    """
    tables = any(isinstance(one, type) and issubclass(one, Settings) for one in _kinds(annotation))
    shown = "a table" if isinstance(given, dict) else "a list" if isinstance(given, list) else repr(given)
    if kind == "tuple_type" and tables:
        return f"must be a list of tables, not {shown}", f"write [[{place}]]"
    if kind == "tuple_type":
        fits = type(given) in _kinds(annotation) or (isinstance(given, str) and given in _kinds(annotation))
        key = place.rpartition(".")[2]
        return f"must be a list, not {shown}", f"write {key} = [{json.dumps(given)}]" if fits else None
    if kind in ("model_type", "dict_type", "model_attributes_type"):
        several = get_origin(annotation) is tuple
        return f"must be a table, not {shown}", f"write [[{place}]]" if several else f"write [{place}]"
    return None


def _kinds(annotation: Any) -> set[Any]:
    """The plain types that an annotation is made of."""
    inner = get_args(annotation)
    return set().union(*map(_kinds, inner)) if inner else {annotation}
