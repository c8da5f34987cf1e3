"""The JSON Schema of a plan, for editors: ``compress schema``."""

from __future__ import annotations

from typing import Any

from compress.passes.base import Pass
from compress.plan import Plan
from compress.plan_passes import key_names, pass_classes


def json_schema() -> dict[str, Any]:
    """JSON Schema of a plan, for editors (``compress schema``). Passes of other packages are allowed by name."""
    schema = Plan.model_json_schema(by_alias=True)
    definitions = schema.setdefault("$defs", {})
    tables = []
    for use, cls in sorted(pass_classes().items()):
        one = cls.model_json_schema(by_alias=True)
        definitions |= one.pop("$defs", {})
        one["properties"] = {"use": {"const": use, "description": (cls.__doc__ or "").split("\n")[0]}} | one[
            "properties"
        ]
        one["required"] = ["use", *one.get("required", [])]
        # A `where` takes the pass's own settings, and no other key.
        own_settings = {key: one["properties"][key] for key in key_names(cls)[1:] if key not in key_names(Pass)}
        where = definitions["Where"]
        closed = {"properties": where["properties"] | own_settings, "additionalProperties": False}
        one["properties"]["where"] = one["properties"]["where"] | {"items": where | closed}
        definitions[cls.__name__] = one
        tables.append({"$ref": f"#/$defs/{cls.__name__}"})
    own = {
        "type": "object",
        "properties": {"use": {"type": "string", "pattern": "^[A-Za-z_][\\w.]*:[A-Za-z_]\\w*$"}},
        "required": ["use"],
    }
    schema["properties"]["pass"] = {"type": "array", "minItems": 1, "items": {"anyOf": [*tables, own]}}
    for unused in ("Pass", "Where"):
        definitions.pop(unused, None)
    head = {"$schema": "https://json-schema.org/draft/2020-12/schema"}
    return {**head, **_one_or_many(schema), "title": "compress plan"}


def _one_or_many(value: Any) -> Any:
    """A schema in which a list of strings may be a single string, as it may in a plan."""
    if isinstance(value, list):
        return [_one_or_many(item) for item in value]
    if not isinstance(value, dict):
        return value
    if value.get("type") == "array" and value.get("items") == {"type": "string"}:
        rest = {key: item for key, item in value.items() if key not in ("type", "items")}
        return rest | {"anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "string"}}]}
    return {key: _one_or_many(item) for key, item in value.items()}
