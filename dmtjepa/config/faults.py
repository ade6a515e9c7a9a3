"""What a user reads when settings cannot be used: the key at fault and the remedy."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from typing import Any, Union, get_args, get_origin

from pydantic import BaseModel

from dmtjepa.config.documentation import describe_values
from dmtjepa.config.settings import Config, Section

_SHAPE_FAULTS = {"missing", "too_long", "too_short", "tuple_type"}


def explain_fault(fault: Mapping[str, Any]) -> str:
    """One fault of pydantic's as a line that names the key and the remedy."""
    place = [str(part) for part in fault["loc"]]
    if fault["type"] == "extra_forbidden":
        valid = _keys(place[:-1])
        near = difflib.get_close_matches(place[-1], valid, n=1) or _elsewhere(place[-1])
        remedy = f"did you mean {near[0]}?" if near else f"valid are {', '.join(valid)}"
        return f"{'.'.join(place)}: unknown key; {remedy}"
    shape = _describe_shape(fault)
    if shape:
        return f"{'.'.join(place[:2])}: must be {shape} (it is {fault['input']!r})"
    message = fault["msg"].removeprefix("Value error, ").replace("Input should be", "must be")
    if not place:
        return message
    last = place[-1]
    if message.startswith(last):  # a section's own check already names its key
        return f"{'.'.join(place[:-1])}.{message}"
    given = "" if isinstance(fault["input"], (dict, Section)) else f" (it is {fault['input']!r})"
    separator = "." if len(place) == 1 and message.split(":")[0] in _keys(place) else ": "
    return f"{'.'.join(place)}{separator}{message}{given if separator == ': ' else ''}"


def _describe_shape(fault: Mapping[str, Any]) -> str:
    """The values that a setting takes, if the fault is that its value has another shape: a list, a single number."""
    section, key, *inner = [*fault["loc"], "", ""][: max(2, len(fault["loc"]))]
    if section not in Config.model_fields or key not in _keys([section]):
        return ""
    model: Any = Config.model_fields[section].annotation
    field = model.model_fields[key]
    in_branch = bool(inner) and isinstance(inner[0], str)  # pydantic names the type of a union that it has tried
    return describe_values(field.annotation, field.metadata) if in_branch or fault["type"] in _SHAPE_FAULTS else ""


def _keys(place: list[str]) -> list[str]:
    """Valid keys at a place in the tree."""
    model: Any = Config
    for part in place:
        annotation = model.model_fields[part].annotation if part in model.model_fields else None
        if get_origin(annotation) is Union:
            annotation = get_args(annotation)[0]
        if not (isinstance(annotation, type) and issubclass(annotation, BaseModel)):
            return []
        model = annotation
    return list(model.model_fields)


def _elsewhere(key: str) -> list[str]:
    """The `section.key` of a key that was put into the wrong section."""
    names = {name: f"{section}.{name}" for section in Config.model_fields for name in _keys([section])}
    return [names[name] for name in difflib.get_close_matches(key, names, n=1)]
