"""The page docs/settings.md, made from the schema: a setting is described in one place."""

from __future__ import annotations

import inspect
import json
import textwrap
from collections.abc import Iterable
from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import annotated_types
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from dmtjepa.config.resume import resume_rule
from dmtjepa.config.settings import Config

HEAD = """# Settings

This page is made from the schema in `dmtjepa/config/settings.py`. After a change of the schema, make it again:

    dmtjepa settings --markdown > docs/settings.md

A settings file is YAML with the sections below. Each setting has a default. Any setting can follow on the command line
as `section.key=value`, with the value in YAML; the last one given wins. Unknown keys, keys that are given twice and
values out of range are refused.

For an editor that checks and completes YAML, `dmtjepa settings --json-schema > settings.schema.json` writes the schema.
Name it in the first line of a settings file: `# yaml-language-server: $schema=settings.schema.json`.

In paths, `~` and environment variables (`$NAME`, `${NAME}`) are replaced when the path is used. A variable that is not
set is an error.

A run resumes from its folder. Settings that may not change on resume decide what is trained: the folder is refused with
another value, unless the run has not made a step yet. `config.yaml` in the run folder holds the settings of the last
start, and `environment.json` what each start has changed.
"""
_NAMES = {bool: "true or false", int: "integer", float: "number", str: "text", type(None): "null"}


def make_markdown() -> str:
    """The page, as docs/settings.md holds it."""
    lines = [HEAD]
    for name, field in Config.model_fields.items():
        section = field.annotation
        assert isinstance(section, type)
        assert issubclass(section, BaseModel)
        lines += [f"## {name}", "", inspect.getdoc(section) or "", ""]
        lines += [
            "| setting | type and range | default | may change on resume | what it does |",
            "|---|---|---|---|---|",
        ]
        lines += [_make_row(f"{name}.{key}", setting) for key, setting in section.model_fields.items()]
        lines.append("")
    return "\n".join(lines)


def list_settings(prefix: str = "") -> list[str]:
    """Every setting whose name begins with the prefix: its values, its default and what it does."""
    lines = []
    for name, field in Config.model_fields.items():
        section = field.annotation
        assert isinstance(section, type)
        assert issubclass(section, BaseModel)
        for key, setting in section.model_fields.items():
            if f"{name}.{key}".startswith(prefix):
                values = describe_values(setting.annotation, setting.metadata)
                lines.append(f"{name}.{key} = {_to_text(setting.default)}   ({values})")
                lines += textwrap.wrap(setting.description or "", 100, initial_indent="    ", subsequent_indent="    ")
    return lines


def _make_row(name: str, field: FieldInfo) -> str:
    values = describe_values(field.annotation, field.metadata)
    cells = [f"`{name}`", values, f"`{_to_text(field.default)}`", resume_rule(field).value, field.description or ""]
    return f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |"


def describe_values(annotation: Any, metadata: Iterable[Any] = ()) -> str:
    """The values that a type allows, in words, e.g. `integer, at least 1`."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        inner, *marks = arguments
        return describe_values(inner, [part for mark in marks for part in getattr(mark, "metadata", [mark])])
    if origin is Literal:
        return ", ".join(f"`{value}`" for value in arguments)
    if origin in (Union, UnionType):
        return " or ".join(
            describe_values(argument, () if argument is type(None) else metadata) for argument in arguments
        )
    if origin is tuple and arguments[1:] == (...,):
        return f"list, each: {describe_values(arguments[0], metadata)}"
    if origin is tuple:
        first = describe_values(arguments[0], metadata)
        return f"[first, second], each {'an' if first.startswith('integer') else 'a'} {first}"
    return ", ".join([_NAMES[annotation], *_describe_limits(metadata)])


def _describe_limits(metadata: Iterable[Any]) -> list[str]:
    limits = []
    for mark in metadata:
        if isinstance(mark, annotated_types.Ge):
            limits.append(f"at least {mark.ge}")
        elif isinstance(mark, annotated_types.Gt):
            limits.append(f"more than {mark.gt}")
        elif isinstance(mark, annotated_types.Le):
            limits.append(f"at most {mark.le}")
        elif isinstance(mark, annotated_types.Lt):
            limits.append(f"less than {mark.lt}")
        elif getattr(mark, "pattern", None):
            limits.append(f"matching `{mark.pattern}`")
    return limits


def _to_text(value: Any) -> str:
    """A default as it is written in YAML."""
    return value if isinstance(value, str) and value else json.dumps(value)
