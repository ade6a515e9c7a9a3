"""What all sections of the settings share."""

from __future__ import annotations

from typing import Annotated, TypeVar

from pydantic import BaseModel, ConfigDict, Field

from dmtjepa.config.resume import Resume

Fraction = Annotated[float, Field(gt=0, le=1)]
T = TypeVar("T")
# Whether a setting may change when a run is resumed; without a mark it may not.
Free = Annotated[T, Resume.FREE]
SameGlobalBatch = Annotated[T, Resume.SAME_GLOBAL_BATCH]


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", validate_default=True, protected_namespaces=())


def check_range(name: str, low: float, high: float) -> None:
    """Refuse a range whose ends are in the wrong order. Raises ValueError."""
    if low > high:
        raise ValueError(f"{name}: the first value ({low}) is larger than the second ({high})")
