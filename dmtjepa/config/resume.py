"""Which settings may change when a run is resumed. Each field of the schema says so; fields without a mark may not."""

from __future__ import annotations

from collections.abc import Iterator
from enum import Enum
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel
from pydantic.fields import FieldInfo

if TYPE_CHECKING:
    from dmtjepa.config.settings import Config


class Resume(Enum):
    """Whether a setting may change when a run is resumed; part of its type, e.g. `Annotated[int, Resume.FREE]`."""

    FIXED = "no"
    """It changes what is trained. The default."""
    FREE = "yes"
    """It does not change what is trained, or, like the number of steps to skip, decides only whether a run goes on."""
    SAME_GLOBAL_BATCH = "at the same global batch"


def resume_rule(field: FieldInfo) -> Resume:
    """The mark of a field of the schema."""
    return next((mark for mark in field.metadata if isinstance(mark, Resume)), Resume.FIXED)


def resume_rules(model: type[BaseModel]) -> dict[str, Resume]:
    """The rule of every setting of a schema by its key, e.g. `data.batch_size`."""
    return {key: resume_rule(field) for key, field in _walk_fields(model)}


def changed_settings(earlier: Config, now: Config) -> list[tuple[str, Any, Any]]:
    """(key, earlier value, present value) of each setting that differs although it is fixed.

    The global batch, on which `Resume.SAME_GLOBAL_BATCH` depends, is not compared here: it depends on the number of
    processes, too.
    """
    rules = resume_rules(type(now))
    return [change for change in different_settings(earlier, now) if rules[change[0]] is Resume.FIXED]


def different_settings(earlier: Config, now: Config) -> list[tuple[str, Any, Any]]:
    """(key, earlier value, present value) of each setting that differs."""
    old, new = earlier.model_dump(mode="json"), now.model_dump(mode="json")
    pairs = [(key, _look_up(old, key), _look_up(new, key)) for key in sorted(resume_rules(type(now)))]
    return [(key, before, after) for key, before, after in pairs if before != after]


def _walk_fields(model: type[BaseModel], prefix: str = "") -> Iterator[tuple[str, FieldInfo]]:
    for name, field in model.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            yield from _walk_fields(field.annotation, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", field


def _look_up(values: dict[str, Any], key: str) -> Any:
    value: Any = values
    for name in key.split("."):
        value = value[name]
    return value
