"""JSON Schema, as much of it as `autotune_configs/schema.json` uses."""

import re
from typing import Any

_TYPES: dict[str, tuple[type, ...]] = {
    "object": (dict,),
    "array": (list,),
    "string": (str,),
    "integer": (int,),
    "number": (int, float),
    "boolean": (bool,),
    "null": (type(None),),
}
_KNOWN = {
    "$schema", "title", "description", "type", "enum", "const", "pattern", "minimum",
    "minItems", "items", "required", "properties", "additionalProperties",
}  # fmt: skip


def first_fault(value: Any, schema: dict[str, Any], where: str = "$") -> str:
    """What is wrong with `value`, and where in it; empty where it fits.

    Raises: ValueError where the schema uses a word that is not understood here.
    """
    unknown = schema.keys() - _KNOWN
    if unknown:
        raise ValueError(f"the schema uses {sorted(unknown)}, which is not understood")
    if "const" in schema and (value != schema["const"] or isinstance(value, bool)):
        return f"{where} is {value!r}; it must be {schema['const']!r}"
    if "enum" in schema and value not in schema["enum"]:
        return f"{where} is {value!r}; it must be one of {', '.join(map(str, schema['enum']))}"
    if "type" in schema and not _is(value, schema["type"]):
        return f"{where} is {value!r:.60}; it must be of type {schema['type']}"
    if "minimum" in schema and not value >= schema["minimum"]:  # NaN is not
        return f"{where} is {value}; it must be {schema['minimum']} at least"
    if "pattern" in schema and not re.search(schema["pattern"], value):
        return f"{where} is {value!r}; it must match {schema['pattern']}"
    if isinstance(value, dict):
        return _fault_in_object(value, schema, where)
    if isinstance(value, list):
        if len(value) < schema.get("minItems", 0):
            return f"{where} has {len(value)} items; it must have {schema['minItems']} at least"
        faults = (first_fault(item, schema.get("items", {}), f"{where}[{i}]") for i, item in enumerate(value))
        return next(filter(None, faults), "")
    return ""


def _is(value: Any, types: str | list[str]) -> bool:
    names = [types] if isinstance(types, str) else types
    if isinstance(value, bool):
        return "boolean" in names
    return any(isinstance(value, _TYPES[name]) for name in names)


def _fault_in_object(value: dict, schema: dict[str, Any], where: str) -> str:
    properties = schema.get("properties", {})
    for name in schema.get("required", ()):
        if name not in value:
            return f"{where} has no {name!r}"
    for name, item in value.items():
        if name in properties:
            fault = first_fault(item, properties[name], f"{where}.{name}")
            if fault:
                return fault
        elif schema.get("additionalProperties") is False:
            return f"{where} has {name!r:.60}, which is not known"
    return ""
